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

// dice gives every caller draws of its own, so that no draw depends on which of
// two goroutines the scheduler ran first. A call is known by what it is about
// and how often that came before; where production code says nothing about
// itself (jitter, ids) the goroutine is known by what it did first.
type dice struct {
	seed uint64

	mu      sync.Mutex
	counts  map[string]uint64
	streams map[uint64]*rand.Rand // by goroutine
}

func newDice(seed uint64) *dice {
	return &dice{seed: seed, counts: map[string]uint64{}, streams: map[uint64]*rand.Rand{}}
}

// of returns the stream of the next call with that name.
func (d *dice) of(name string) *rand.Rand {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.next(name)
}

func (d *dice) next(name string) *rand.Rand {
	h := fnv.New64a()
	h.Write([]byte(name)) //nolint:errcheck // a hash never fails
	d.counts[name]++
	return rand.New(rand.NewPCG(d.seed^h.Sum64(), d.counts[name])) //nolint:gosec // a simulator wants to be repeated
}

// mine returns the stream of the calling goroutine, which is called name where
// it was never seen before.
func (d *dice) mine(name string) *rand.Rand {
	id := goroutine()
	d.mu.Lock()
	defer d.mu.Unlock()
	r := d.streams[id]
	if r == nil {
		r = d.next("goroutine " + name)
		d.streams[id] = r
	}
	return r
}

// source is a rand.Source for production code that draws from several goroutines.
type source struct {
	d    *dice
	name string
}

func (s source) Uint64() uint64 { return s.d.mine(s.name).Uint64() }

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
