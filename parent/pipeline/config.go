package pipeline

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/keyhold/keyhold/parent/signclient"
	"github.com/keyhold/keyhold/parent/store"
)

// Limits of Config.
const (
	MaxWorkers   = 64
	DefaultLease = 10 * time.Second
	MinLease     = time.Second
	MaxLease     = 10 * time.Minute
)

// Store is what a pipeline needs of the tables.
type Store interface {
	store.Queue
	store.Leases
	store.Archive
	store.Keyrings
}

// Enclave is one enclave that this parent may use.
type Enclave struct {
	Name string // for logs and metrics
	// Connect opens one connection. The pipeline calls it again, with jittered
	// back-off, whenever the one before is dead, and closes what it gets.
	Connect func(ctx context.Context) (*signclient.Client, error)
}

// Config of one parent's pipeline. Owner and Rand must differ between processes:
// the owner is how a parent knows its own claims.
type Config struct {
	Store    Store
	Enclaves []Enclave
	Workers  int           // connections to each enclave, each with two batches in flight
	Lease    time.Duration // of every claim; longer than signing a batch takes, 0 is DefaultLease; the enclave cuts it to its own limit
	Owner    string        // random per process
	Rand     *rand.Rand    // ids, jitter, first shards; the pipeline guards it
	// Now is the wall clock. It is only a hint of when to look; nil is time.Now.
	Now func() time.Time
	// Elapsed is the time since some moment; it never goes back. Leases are watched on
	// it. Nil is the monotonic clock.
	Elapsed  func() time.Duration
	Logger   *slog.Logger
	Observer Observer
}

// Observer is told what happens, for metrics. Nil functions are left out; none
// may block.
type Observer struct {
	Claimed      func(b *store.Batch)
	Committed    func(b *store.Batch, refused int, took time.Duration) // took: from claim to commit
	GaveBack     func(b *store.Batch, reason string)                   // released, or quarantined
	Dropped      func(b *store.Batch)                                  // left to run out, or fenced
	StoreFailed  func(op string)
	Connected    func(enclave string)
	Disconnected func(enclave string)
}

// Validate reports everything that is wrong.
func (c *Config) Validate() error {
	var errs []error
	bad := func(is bool, text string) {
		if is {
			errs = append(errs, errors.New("pipeline: "+text))
		}
	}
	bad(c.Store == nil, "store is missing")
	bad(len(c.Enclaves) == 0, "no enclave is given")
	for i, e := range c.Enclaves {
		bad(e.Connect == nil, fmt.Sprintf("enclave %d has no way to connect", i))
	}
	bad(c.Workers < 1 || c.Workers > MaxWorkers, fmt.Sprintf("workers must be between 1 and %d", MaxWorkers))
	bad(c.Lease != 0 && (c.Lease < MinLease || c.Lease > MaxLease), fmt.Sprintf("lease must be between %s and %s", MinLease, MaxLease))
	bad(c.Owner == "", "owner is missing")
	bad(c.Rand == nil, "source of randomness is missing")
	bad(c.Logger == nil, "logger is missing")
	return errors.Join(errs...)
}

func (c *Config) withDefaults() Config {
	d := *c
	if d.Lease == 0 {
		d.Lease = DefaultLease
	}
	if d.Now == nil {
		d.Now = time.Now
	}
	if d.Elapsed == nil {
		start := time.Now()
		d.Elapsed = func() time.Duration { return time.Since(start) }
	}
	o := &d.Observer
	o.Claimed = orNothing(o.Claimed)
	o.Dropped = orNothing(o.Dropped)
	o.StoreFailed = orNothing(o.StoreFailed)
	o.Connected = orNothing(o.Connected)
	o.Disconnected = orNothing(o.Disconnected)
	if o.GaveBack == nil {
		o.GaveBack = func(*store.Batch, string) {}
	}
	if o.Committed == nil {
		o.Committed = func(*store.Batch, int, time.Duration) {}
	}
	return d
}

func orNothing[T any](f func(T)) func(T) {
	if f != nil {
		return f
	}
	return func(T) {}
}

// dice guards the one source of randomness.
type dice struct {
	mu sync.Mutex
	r  *rand.Rand
}

// around returns between half of d and one and a half of it.
func (d *dice) around(t time.Duration) time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	return t/2 + time.Duration(d.r.Int64N(int64(t)+1))
}

func (d *dice) below(n int) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.r.IntN(n)
}

// id returns 128 random bits as hex.
func (d *dice) id() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return fmt.Sprintf("%016x%016x", d.r.Uint64(), d.r.Uint64())
}
