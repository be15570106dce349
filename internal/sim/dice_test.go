package sim_test

import (
	"bytes"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"runtime"
	"strconv"
	"sync"
	"time"
)

// dice gives every call draws of its own, so that no draw depends on which of two
// goroutines the scheduler ran first. A call is known by what it is about and by
// how often that came before. Where production code says nothing about itself, it
// is known by the moment, or by what its goroutine read last.
type dice struct {
	seed uint64

	mu     sync.Mutex
	counts map[string]uint64
	last   map[uint64]string // by goroutine: the batch that it works on
}

func newDice(seed uint64) *dice {
	return &dice{seed: seed, counts: map[string]uint64{}, last: map[uint64]string{}}
}

// of returns the stream of the next call with that name.
func (d *dice) of(name string) *rand.Rand {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.counts[name]++
	return d.stream(name, d.counts[name])
}

func (d *dice) stream(name string, n uint64) *rand.Rand {
	h := fnv.New64a()
	h.Write([]byte(name))
	return rand.New(rand.NewPCG(d.seed^h.Sum64(), n))
}

// worksOn says what the calling goroutine works on from now on.
func (d *dice) worksOn(name string) {
	id := goroutine()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.counts[name]++
	d.last[id] = fmt.Sprintf("%s %d", name, d.counts[name])
}

// mine returns a stream for a goroutine, by what it works on.
func (d *dice) mine(id uint64, name string) *rand.Rand {
	d.mu.Lock()
	last := d.last[id]
	d.mu.Unlock()
	return d.of(name + " at " + last)
}

// source is a rand.Source for the production code of one parent: what is drawn
// depends on the moment, and on how often the parent drew at that moment.
type source struct {
	d    *dice
	name string

	mu sync.Mutex
	at int64 // ns since the epoch, of the newest draw
	n  uint64
}

func (s *source) Uint64() uint64 {
	now := time.Now().UnixNano()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.at != now {
		s.at, s.n = now, 0
	}
	s.n++
	return s.d.stream(s.name+" draws", uint64(now)+s.n<<48).Uint64()
}

// goroutine returns the number of the calling goroutine.
func goroutine() uint64 {
	var buf [40]byte
	b := bytes.TrimPrefix(buf[:runtime.Stack(buf[:], false)], []byte("goroutine "))
	n, err := strconv.ParseUint(string(b[:bytes.IndexByte(b, ' ')]), 10, 64)
	if err != nil {
		panic(fmt.Sprintf("sim: goroutine number: %v", err))
	}
	return n
}

// upTo returns a time of 1 ns to d: never two alike, as good as.
func upTo(r *rand.Rand, d time.Duration) time.Duration { return 1 + time.Duration(r.Int64N(int64(d))) }
