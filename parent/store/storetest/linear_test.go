package storetest_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/memory"
	"github.com/keyhold/keyhold/parent/store/storetest"
)

var errNoAnswer = errors.New("no answer")

// losing is a store whose writes sometimes fail, before or after they were applied.
type losing struct {
	store.Store
	mu sync.Mutex
	r  *rand.Rand
}

const lost = 0.12 // of all writes

func lose[T any](l *losing, write func() (T, error)) (T, error) {
	var none T
	l.mu.Lock()
	x := l.r.Float64()
	l.mu.Unlock()
	if x < lost/2 {
		return none, errNoAnswer
	}
	runtime.Gosched()
	v, err := write()
	runtime.Gosched()
	if x < lost {
		return none, errNoAnswer
	}
	return v, err
}

func lose0(l *losing, write func() error) error {
	_, err := lose(l, func() (struct{}, error) { return struct{}{}, write() })
	return err
}

func (l *losing) Claim(ctx context.Context, c store.Claim) (store.Batch, error) {
	return lose(l, func() (store.Batch, error) { return l.Store.Claim(ctx, c) })
}

func (l *losing) Commit(ctx context.Context, c store.Commit) error {
	return lose0(l, func() error { return l.Store.Commit(ctx, c) })
}

func (l *losing) Release(ctx context.Context, b store.Batch, e store.End) error {
	return lose0(l, func() error { return l.Store.Release(ctx, b, e) })
}

func (l *losing) NoteCrash(ctx context.Context, b store.Batch, crashed []uint32) error {
	return lose0(l, func() error { return l.Store.NoteCrash(ctx, b, crashed) })
}

func (l *losing) Requeue(ctx context.Context, id record.BatchID, now time.Time) error {
	return lose0(l, func() error { return l.Store.Requeue(ctx, id, now) })
}

func (l *losing) OpenImport(ctx context.Context, i store.Import) (store.Import, error) {
	return lose(l, func() (store.Import, error) { return l.Store.OpenImport(ctx, i) })
}

func (l *losing) PutBatch(ctx context.Context, b store.Batch) error {
	return lose0(l, func() error { return l.Store.PutBatch(ctx, b) })
}

func (l *losing) FinishImport(ctx context.Context, i store.Import) error {
	return lose0(l, func() error { return l.Store.FinishImport(ctx, i) })
}

func (l *losing) AbortImport(ctx context.Context, id record.ImportID) (int, error) {
	return lose(l, func() (int, error) { return l.Store.AbortImport(ctx, id) })
}

func (l *losing) ReserveRecord(ctx context.Context, ref store.RecordRef, over *store.RecordRef) (store.RecordRef, error) {
	return lose(l, func() (store.RecordRef, error) { return l.Store.ReserveRecord(ctx, ref, over) })
}

func (l *losing) PutPayload(ctx context.Context, id record.BatchID, p []byte) ([]byte, error) {
	return lose(l, func() ([]byte, error) { return l.Store.PutPayload(ctx, id, p) })
}

func (l *losing) PutReceipt(ctx context.Context, r store.Receipt) error {
	return lose0(l, func() error { return l.Store.PutReceipt(ctx, r) })
}

func (l *losing) PutKeyring(ctx context.Context, id string, header []byte) error {
	return lose0(l, func() error { return l.Store.PutKeyring(ctx, id, header) })
}

// histories of memory stores, through wrap.
func histories(rounds int, wrap func(store.Store) store.Store) storetest.Linear {
	return storetest.Linear{
		Rounds: rounds, Clients: 5, Steps: 40,
		Open: func(_ *testing.T, seed uint64) (clean, clients store.Store) {
			s := memory.New()
			return s, &losing{Store: wrap(s), r: rand.New(rand.NewPCG(seed, 99))}
		},
	}
}

func TestConcurrentHistoriesOfMemoryHaveAnOrder(t *testing.T) {
	rounds := 60
	if testing.Short() {
		rounds = 8
	}
	v := histories(rounds, func(s store.Store) store.Store { return s }).Run(t)
	t.Log(v)
	if v.Rejected > 0 || v.Undecided > 0 || v.Calls < 100*rounds || v.Unknown < 3*rounds {
		t.Errorf("%v", v)
	}
}

// The second write may find the tombstone of what the first one opened.
func TestHistoriesOfWritesMadeAgainHaveAnOrder(t *testing.T) {
	v := histories(12, func(s store.Store) store.Store { return interrupted{s, runtime.Gosched} }).Run(t)
	t.Log(v)
	if v.Rejected > 0 || v.Undecided > 0 {
		t.Errorf("%v", v)
	}
	h := &storetest.History{}
	s := memory.New()
	opener := h.Client(1, interrupted{s, func() { _, _ = h.Client(2, s).AbortImport(t.Context(), "i") }})
	if _, err := opener.OpenImport(t.Context(), store.Import{ID: "i"}); !errors.Is(err, store.ErrAborted) {
		t.Fatalf("got %v, want %v", err, store.ErrAborted)
	}
	if v := h.CheckImports(t); v.Rejected > 0 || v.Histories != 1 {
		t.Errorf("%v", v)
	}
}

// interrupted never hears of its first write and makes it again. Others are served between.
type interrupted struct {
	store.Store
	between func()
}

func (s interrupted) OpenImport(ctx context.Context, i store.Import) (store.Import, error) {
	if _, err := s.Store.OpenImport(ctx, i); err != nil {
		return store.Import{}, err
	}
	s.between()
	return s.Store.OpenImport(ctx, i)
}

// Each of these stores breaks one promise.
type (
	zombiesCommit  struct{ store.Store }
	zombiesRelease struct{ store.Store }
	claimsTwice    struct{ store.Store }
	takesTheHeld   struct{ store.Store }
	staleBatches   struct {
		store.Store
		old sync.Map
	}
	staleLeases struct {
		store.Store
		old sync.Map
	}
	losesCommits    struct{ store.Store }
	refusesAndDoes  struct{ store.Store }
	forgetsCrashes  struct{ store.Store }
	requeuesAnyhow  struct{ store.Store }
	reservesOver    struct{ store.Store }
	putsIntoAborted struct{ store.Store }
	finishesAborted struct{ store.Store }
	abortsDone      struct{ store.Store }
	opensAborted    struct{ store.Store }
	takesReceipts   struct{ store.Store }
	echoesPayloads  struct{ store.Store }
)

// Commit ignores the fences: it takes those of whoever has the batch now.
func (s zombiesCommit) Commit(ctx context.Context, c store.Commit) error {
	if now, err := s.Batch(ctx, c.Batch.ID); err == nil {
		c.Batch = now
	}
	return s.Store.Commit(ctx, c)
}

// Release ignores the fences too.
func (s zombiesRelease) Release(ctx context.Context, b store.Batch, e store.End) error {
	if now, err := s.Batch(ctx, b.ID); err == nil {
		b = now
	}
	return s.Store.Release(ctx, b, e)
}

// Claim is applied twice, as by a client that repeats what it should recognise.
func (s claimsTwice) Claim(ctx context.Context, c store.Claim) (store.Batch, error) {
	b, err := s.Store.Claim(ctx, c)
	if err != nil {
		return b, err
	}
	c.Batch, c.KeySeen, c.TakeOver = b, b.KeyFence, true
	return s.Store.Claim(ctx, c)
}

// Claim believes in no fence that the caller saw of the key.
func (s takesTheHeld) Claim(ctx context.Context, c store.Claim) (store.Batch, error) {
	if l, err := s.Lease(ctx, c.KeyID); err == nil {
		c.KeySeen = l.Fence
	}
	if b, err := s.Batch(ctx, c.Batch.ID); err == nil {
		c.Batch = b
	}
	return s.Store.Claim(ctx, c)
}

// Batch answers what the read before found.
func (s *staleBatches) Batch(ctx context.Context, id record.BatchID) (store.Batch, error) {
	b, err := s.Store.Batch(ctx, id)
	if old, ok := s.old.Swap(id, b); ok && err == nil {
		b, _ = old.(store.Batch)
	}
	return b, err
}

// Lease does so too.
func (s *staleLeases) Lease(ctx context.Context, id record.KeyID) (store.Lease, error) {
	l, err := s.Store.Lease(ctx, id)
	if old, ok := s.old.Swap(id, l); ok && err == nil {
		l, _ = old.(store.Lease)
	}
	return l, err
}

// Commit says that it is durable, and is not.
func (losesCommits) Commit(context.Context, store.Commit) error { return nil }

// Release is applied and says that it was not.
func (s refusesAndDoes) Release(ctx context.Context, b store.Batch, e store.End) error {
	if err := s.Store.Release(ctx, b, e); err != nil {
		return err
	}
	return store.ErrFenced
}

// NoteCrash keeps the first one only.
func (s forgetsCrashes) NoteCrash(ctx context.Context, b store.Batch, crashed []uint32) error {
	if now, err := s.Batch(ctx, b.ID); err == nil && len(now.Crashed) > 0 {
		crashed = nil
	}
	return s.Store.NoteCrash(ctx, b, crashed)
}

// Requeue says that it was done, whatever state the batch is in.
func (s requeuesAnyhow) Requeue(ctx context.Context, id record.BatchID, now time.Time) error {
	if err := s.Store.Requeue(ctx, id, now.Add(time.Second)); !errors.Is(err, store.ErrTaken) {
		return err
	}
	return nil
}

// ReserveRecord takes the id from whoever has it.
func (s reservesOver) ReserveRecord(ctx context.Context, ref store.RecordRef, _ *store.RecordRef) (store.RecordRef, error) {
	holder, err := s.Store.ReserveRecord(ctx, ref, nil)
	if err != nil || holder == ref {
		return holder, err
	}
	return s.Store.ReserveRecord(ctx, ref, &holder)
}

// PutBatch takes batches of an aborted import.
func (s putsIntoAborted) PutBatch(ctx context.Context, b store.Batch) error {
	if err := s.Store.PutBatch(ctx, b); !errors.Is(err, store.ErrAborted) {
		return err
	}
	return nil
}

// FinishImport finishes what was aborted.
func (s finishesAborted) FinishImport(ctx context.Context, i store.Import) error {
	if err := s.Store.FinishImport(ctx, i); !errors.Is(err, store.ErrAborted) {
		return err
	}
	return nil
}

// AbortImport says that it aborted what was done.
func (s abortsDone) AbortImport(ctx context.Context, id record.ImportID) (int, error) {
	kept, err := s.Store.AbortImport(ctx, id)
	if errors.Is(err, store.ErrTaken) {
		err = nil
	}
	return kept, err
}

// OpenImport calls what is open aborted.
func (s opensAborted) OpenImport(ctx context.Context, i store.Import) (store.Import, error) {
	there, err := s.Store.OpenImport(ctx, i)
	if err == nil && there.State == store.ImportOpen {
		return store.Import{}, store.ErrAborted
	}
	return there, err
}

// PutReceipt takes another receipt for one place in the chain.
func (s takesReceipts) PutReceipt(ctx context.Context, r store.Receipt) error {
	if err := s.Store.PutReceipt(ctx, r); !errors.Is(err, store.ErrDiffers) {
		return err
	}
	return nil
}

// PutPayload returns what it was given, not what is there.
func (s echoesPayloads) PutPayload(ctx context.Context, id record.BatchID, p []byte) ([]byte, error) {
	if _, err := s.Store.PutPayload(ctx, id, p); err != nil {
		return nil, err
	}
	return p, nil
}

func TestHistoriesOfABrokenStoreHaveNoOrder(t *testing.T) {
	for _, broken := range []struct {
		name string
		wrap func(store.Store) store.Store
	}{
		{"commits ignore the fence", func(s store.Store) store.Store { return zombiesCommit{s} }},
		{"releases ignore the fence", func(s store.Store) store.Store { return zombiesRelease{s} }},
		{"claims are applied twice", func(s store.Store) store.Store { return claimsTwice{s} }},
		{"claims ignore the fences that were seen", func(s store.Store) store.Store { return takesTheHeld{s} }},
		{"control items are read stale", func(s store.Store) store.Store { return &staleBatches{Store: s} }},
		{"leases are read stale", func(s store.Store) store.Store { return &staleLeases{Store: s} }},
		{"commits are lost", func(s store.Store) store.Store { return losesCommits{s} }},
		{"releases are applied under a sentinel", func(s store.Store) store.Store { return refusesAndDoes{s} }},
		{"crashes are forgotten", func(s store.Store) store.Store { return forgetsCrashes{s} }},
		{"requeues are said to be done", func(s store.Store) store.Store { return requeuesAnyhow{s} }},
		{"reservations take every id", func(s store.Store) store.Store { return reservesOver{s} }},
		{"batches are put into an aborted import", func(s store.Store) store.Store { return putsIntoAborted{s} }},
		{"aborted imports are finished", func(s store.Store) store.Store { return finishesAborted{s} }},
		{"done imports are aborted", func(s store.Store) store.Store { return abortsDone{s} }},
		{"open imports are called aborted", func(s store.Store) store.Store { return opensAborted{s} }},
		{"receipts are replaced", func(s store.Store) store.Store { return takesReceipts{s} }},
		{"payloads are not the ones that are there", func(s store.Store) store.Store { return echoesPayloads{s} }},
	} {
		t.Run(broken.name, func(t *testing.T) {
			v := histories(12, broken.wrap).Run(t)
			t.Log(v)
			if v.Rejected == 0 {
				t.Error("nothing was rejected")
			}
		})
	}
}

// One parent is taken over by another and then gives the key back all the same.
func TestAKeyThatAZombieGivesBackHasNoOrder(t *testing.T) {
	for _, c := range []struct {
		name string
		wrap func(store.Store) store.Store
		want int // rejected
	}{
		{"sound", func(s store.Store) store.Store { return s }, 0},
		{"releases ignore the fence", func(s store.Store) store.Store { return zombiesRelease{s} }, 1},
		{"claims are applied twice", func(s store.Store) store.Store { return claimsTwice{s} }, 1},
		{"claims ignore the fences that were seen", func(s store.Store) store.Store { return takesTheHeld{s} }, 1},
		{"releases are applied under a sentinel", func(s store.Store) store.Store { return refusesAndDoes{s} }, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := &storetest.History{}
			robbed(t, h, memory.New(), c.wrap)
			if v := h.CheckLeases(t); v.Rejected != c.want || v.Histories != 1 {
				t.Errorf("%v, want %d rejected", v, c.want)
			}
		})
	}
}

func robbed(t *testing.T, h *storetest.History, s *memory.Store, wrap func(store.Store) store.Store) {
	t.Helper()
	ctx := t.Context()
	key, batch := record.KeyID{1: 1}, record.MakeBatchID("i", 0)
	_, err := s.OpenImport(ctx, store.Import{ID: "i"})
	err = errors.Join(err, s.PutBatch(ctx, store.Batch{ID: batch, ImportID: "i"}), s.PutKeys(ctx, []store.Key{{ID: key}}))
	if err != nil {
		t.Fatal(err)
	}
	first, second := h.Client(1, wrap(s)), h.Client(2, wrap(s))
	b, err := first.Batch(ctx, batch)
	if err != nil {
		t.Fatal(err)
	}
	claim := store.Claim{Batch: b, KeyID: key, ClaimID: "first", Owner: "first"}
	held, err := first.Claim(ctx, claim)
	if err != nil {
		t.Fatal(err)
	}
	late := store.Claim{Batch: held, KeyID: key, KeySeen: 1, TakeOver: true, ClaimID: "second", Owner: "second"}
	taken, err := second.Claim(ctx, late)
	if err != nil { // some of the broken stores never get further
		_, _ = second.Lease(ctx, key)
		return
	}
	late.ClaimID, late.Owner = "third", "third"
	_, _ = second.Claim(ctx, late) // with fences that are gone
	end := store.End{State: record.Ready, Attempt: true, KeepKey: true}
	_ = first.Release(ctx, held, end)
	_, _ = second.Lease(ctx, key)
	_ = second.Release(ctx, taken, end)
	_, _ = second.Lease(ctx, key)
}
