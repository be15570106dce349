package pipeline_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/memory"
)

// fate of one store call.
type fate int

const (
	fine   fate = iota
	before      // fails and nothing was done
	after       // fails although it was done
)

// faulty is one parent's view of the tables.
type faulty struct {
	*memory.Store
	t      *testing.T                    // where set, order is checked
	decide func(op string, nth int) fate // nth call of this parent, from 1; nil: all are fine
	slow   func(op string) time.Duration // nil: no call takes time

	mu      sync.Mutex
	calls   int
	killed  bool
	resumes time.Time // calls wait until then
}

// kill makes every call fail from now on, as if the process were gone.
func (f *faulty) kill() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.killed = true
}

// pause holds every call for d.
func (f *faulty) pause(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.resumes = time.Now().Add(d)
}

// made counts the calls so far.
func (f *faulty) made() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls
}

func (f *faulty) begin(ctx context.Context, op string) (fate, error) {
	f.mu.Lock()
	f.calls++
	what, d := fine, time.Until(f.resumes)
	if f.decide != nil {
		what = f.decide(op, f.calls)
	}
	f.mu.Unlock()
	if f.slow != nil {
		d = max(d, 0) + f.slow(op)
	}
	if d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return before, fmt.Errorf("%s: %w", op, ctx.Err())
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.killed || what == before {
		return before, fmt.Errorf("%s: %w", op, errUnknown)
	}
	return what, nil
}

// through makes one call and spoils its outcome.
func through[T any](ctx context.Context, f *faulty, op string, call func() (T, error)) (T, error) {
	var none T
	what, err := f.begin(ctx, op)
	if err != nil {
		return none, err
	}
	v, err := call()
	if what == after {
		return none, fmt.Errorf("%s: %w", op, errUnknown)
	}
	return v, err
}

func through0(ctx context.Context, f *faulty, op string, call func() error) error {
	_, err := through(ctx, f, op, func() (struct{}, error) { return struct{}{}, call() })
	return err
}

func (f *faulty) Ready(ctx context.Context, shard int, until time.Time, limit int, page string) (store.ReadyPage, error) {
	return through(ctx, f, "ready", func() (store.ReadyPage, error) { return f.Store.Ready(ctx, shard, until, limit, page) })
}

func (f *faulty) Batch(ctx context.Context, id record.BatchID) (store.Batch, error) {
	return through(ctx, f, "batch", func() (store.Batch, error) { return f.Store.Batch(ctx, id) })
}

func (f *faulty) Payload(ctx context.Context, id record.BatchID) ([]byte, error) {
	return through(ctx, f, "payload", func() ([]byte, error) { return f.Store.Payload(ctx, id) })
}

func (f *faulty) Idle(ctx context.Context, pool string, shard, limit int) ([]store.IdleKey, error) {
	return through(ctx, f, "idle", func() ([]store.IdleKey, error) { return f.Store.Idle(ctx, pool, shard, limit) })
}

func (f *faulty) Lease(ctx context.Context, id record.KeyID) (store.Lease, error) {
	return through(ctx, f, "lease", func() (store.Lease, error) { return f.Store.Lease(ctx, id) })
}

func (f *faulty) Claim(ctx context.Context, c store.Claim) (store.Batch, error) {
	return through(ctx, f, "claim", func() (store.Batch, error) { return f.Store.Claim(ctx, c) })
}

func (f *faulty) Commit(ctx context.Context, c store.Commit) error {
	return through0(ctx, f, "commit", func() error {
		if _, err := f.Receipt(ctx, c.Receipt); f.t != nil && err != nil {
			f.t.Errorf("%s is committed before its receipt is stored", c.Batch.ID)
		}
		return f.Store.Commit(ctx, c)
	})
}

func (f *faulty) Release(ctx context.Context, b store.Batch, e store.End) error {
	return through0(ctx, f, "release", func() error { return f.Store.Release(ctx, b, e) })
}

func (f *faulty) NoteCrash(ctx context.Context, b store.Batch, crashed []uint32) error {
	return through0(ctx, f, "note_crash", func() error { return f.Store.NoteCrash(ctx, b, crashed) })
}

func (f *faulty) PutReceipt(ctx context.Context, r store.Receipt) error {
	return through0(ctx, f, "put_receipt", func() error {
		f.inOrder(ctx, r.Ref)
		return f.Store.PutReceipt(ctx, r)
	})
}

// inOrder checks that no later receipt of the lane is stored before this one.
func (f *faulty) inOrder(ctx context.Context, r store.ReceiptRef) {
	if _, err := f.Receipt(ctx, r); f.t == nil || err == nil {
		return // delivered again
	}
	err := f.Receipts(ctx, r.BootID, r.Lane, r.Seq+1, func(store.Receipt) error { return errUnknown })
	if err != nil {
		f.t.Errorf("lane %d: receipt %d comes after later ones", r.Lane, r.Seq)
	}
}

func (f *faulty) PutBoot(ctx context.Context, b store.Boot) error {
	return through0(ctx, f, "put_boot", func() error { return f.Store.PutBoot(ctx, b) })
}

func (f *faulty) Key(ctx context.Context, id record.KeyID) (store.Key, error) {
	return through(ctx, f, "key", func() (store.Key, error) { return f.Store.Key(ctx, id) })
}

func (f *faulty) Keyring(ctx context.Context, id string) ([]byte, error) {
	return through(ctx, f, "keyring", func() ([]byte, error) { return f.Store.Keyring(ctx, id) })
}

// some calls fail, one way or the other; all take up to 20 ms. A nanosecond apart
// from each other, so that no two timers tie.
func (f *faulty) atRandom(seed uint64, share float64) *faulty {
	r, delays := rand.New(rand.NewPCG(seed, 7)), rand.New(rand.NewPCG(seed, 8))
	f.decide = func(string, int) fate { // under mu
		switch x := r.Float64(); {
		case x < share/2:
			return before
		case x < share:
			return after
		}
		return fine
	}
	var mu sync.Mutex
	f.slow = func(string) time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return time.Duration(1 + delays.Int64N(int64(20*time.Millisecond)))
	}
	return f
}
