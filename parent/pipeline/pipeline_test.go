package pipeline_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/pipeline"
	"github.com/keyhold/keyhold/parent/signclient"
	"github.com/keyhold/keyhold/parent/store"
)

func TestEveryRecordIsSignedOnce(t *testing.T) {
	tables := []struct {
		name    string
		plan    plan
		parents int
	}{
		{"by one parent", plan{keys: 20, batches: 200, records: 3}, 1},
		{"by two parents that share an enclave", plan{keys: 20, batches: 200, records: 3}, 2},
		{"by three parents and two enclaves", plan{keys: 20, batches: 200, records: 3, enclaves: 2}, 3},
		{"with fewer keys than slots", plan{keys: 1, batches: 30, records: 1}, 2},
		{"with batches that name their key", plan{keys: 5, batches: 60, records: 1, pinned: 30}, 2},
		{"by an enclave that has to load the keys", plan{keys: 5, batches: 20, records: 1, bare: true}, 1},
	}
	for _, c := range tables {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, c.plan)
				var stops []func()
				for range c.parents {
					cfg := w.config()
					cfg.Store = (&faulty{Store: w.store}).atRandom(uint64(w.parents), 0)
					stops = append(stops, w.start(cfg))
				}
				w.await(3*time.Minute, record.Signed)
				for _, stop := range stops {
					stop()
				}
				if refused := w.check(); len(refused) != 0 {
					t.Errorf("refused: %v", refused)
				}
				if n := w.attempts(); n != w.plan.batches {
					t.Errorf("%d attempts for %d batches: somebody was robbed", n, w.plan.batches)
				}
			})
		})
	}
}

// ordered counts, for each claim of a free key, the idle keys used longer ago.
type ordered struct {
	*faulty
	w *world

	mu            *sync.Mutex
	claims, worst *int
}

func (o *ordered) Claim(ctx context.Context, c store.Claim) (store.Batch, error) {
	o.mu.Lock() // the memory store does not wait for anything
	defer o.mu.Unlock()
	chosen, err := o.w.store.Lease(ctx, c.KeyID)
	if err != nil {
		return store.Batch{}, err
	}
	overtaken := 0
	for id := range o.w.public {
		l, err := o.w.store.Lease(ctx, id)
		if err != nil {
			return store.Batch{}, err
		}
		if l.Idle() && l.Used < chosen.Used {
			overtaken++
		}
	}
	b, err := o.w.store.Claim(ctx, c)
	if err == nil {
		*o.claims++
		*o.worst = max(*o.worst, overtaken)
	}
	return b, err
}

func TestKeysAreTakenLeastRecentlyUsedFirst(t *testing.T) {
	for _, parents := range []int{1, 2, 4} {
		t.Run(fmt.Sprintf("%d parents", parents), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, plan{keys: 50, batches: 400, records: 1})
				var mu sync.Mutex
				claims, worst := 0, 0
				var stops []func()
				for range parents {
					cfg := w.slowly()
					cfg.Store = &ordered{(&faulty{Store: w.store}).atRandom(uint64(w.parents), 0), w, &mu, &claims, &worst}
					stops = append(stops, w.start(cfg))
				}
				w.await(3*time.Minute, record.Signed)
				for _, stop := range stops {
					stop()
				}
				flight := parents * 2 * 2 // two workers with two batches each
				if parents == 1 {
					flight = 0
				}
				t.Logf("%d claims, at most %d idle keys overtaken", claims, worst)
				if worst > flight || claims != w.plan.batches {
					t.Errorf("%d claims, %d older idle keys overtaken, want at most %d", claims, worst, flight)
				}
			})
		})
	}
}

func TestZombieParentCannotCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, plan{keys: 4, batches: 6, records: 2, enclaves: 2})
		zombie, other := w.config(), w.config()
		zombie.Enclaves, other.Enclaves = zombie.Enclaves[:1], other.Enclaves[1:]
		zombie.Workers = 1
		var once sync.Once
		zombie.Store = &faulty{Store: w.store, slow: func(op string) (d time.Duration) {
			if op == "commit" {
				once.Do(func() { d = time.Minute })
			}
			return d
		}}
		var dropped atomic.Int32
		zombie.Observer.Dropped = func(*store.Batch) { dropped.Add(1) }
		stopZombie := w.start(zombie)
		w.until(time.Minute, func() bool { return w.attempts() > 0 })
		stopOther := w.start(other)
		w.await(50*time.Second, record.Signed)
		pass(time.Minute)
		stopZombie()
		stopOther()
		w.check()
		if dropped.Load() != 1 {
			t.Errorf("%d claims dropped, want the one that was taken over", dropped.Load())
		}
		again := 0
		for _, b := range w.batches() {
			if b.Attempts == 2 {
				again++
				if b.Owner != other.Owner || b.History[0].End != store.EndLost {
					t.Errorf("%s is signed by %s, history %v", b.ID, b.Owner, b.History)
				}
			}
		}
		if again != 1 {
			t.Errorf("%d batches were claimed twice, want 1", again)
		}
	})
}

// spy looks at each release before it is made.
type spy struct {
	*faulty
	release func(b store.Batch, e store.End)
}

func (s *spy) Release(ctx context.Context, b store.Batch, e store.End) error {
	s.release(b, e)
	return s.faulty.Release(ctx, b, e)
}

// The connection is cut while the first batch is being answered. The enclave
// lives, so the claim comes back at once, but not before it was cancelled.
func TestLostAnswerIsCancelledThenReleasedAndSignedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, plan{keys: 2, batches: 1, records: 2})
		cfg := w.config()
		l := newLink(w.enclaves[0], 1, time.Millisecond)
		l.slow = func() time.Duration { return 50 * time.Millisecond }
		cfg.Enclaves[0].Connect = l.connect
		var once sync.Once
		cfg.Observer.Claimed = func(*store.Batch) {
			once.Do(func() { time.AfterFunc(10*time.Millisecond, l.cut) })
		}
		released := 0
		cfg.Store = &spy{&faulty{Store: w.store}, func(b store.Batch, e store.End) {
			released++
			want := store.End{State: record.Ready, Reason: "connection_lost", Attempt: true, KeepKey: true, Now: e.Now}
			if d := cmp.Diff(want, e); d != "" {
				t.Errorf("release (-want +got):\n%s", d)
			}
			if err := signUnder(t, w, &b); !errors.Is(err, refusal.FenceStale) {
				t.Errorf("the enclave would still sign: %v", err)
			}
		}}
		stop := w.start(cfg)
		w.await(lease/2, record.Signed)
		stop()
		w.check()
		if released != 1 || w.attempts() != 2 {
			t.Errorf("%d releases, %d attempts", released, w.attempts())
		}
		receipts := 0
		for lane := range uint32(20) {
			must(t, w.store.Receipts(context.WithoutCancel(t.Context()), w.batches()[0].BootID, lane, 1, func(store.Receipt) error {
				receipts++
				return nil
			}))
		}
		if receipts != 2 {
			t.Errorf("%d receipts stored, want that of the lost answer too", receipts)
		}
	})
}

// The enclave lives, but cannot say so: the way to it stays cut.
func TestClaimThatCannotBeCancelledIsLeftToRunOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, plan{keys: 2, batches: 1, records: 2})
		cfg := w.config()
		l := newLink(w.enclaves[0], 1, time.Millisecond)
		l.slow = func() time.Duration { return 50 * time.Millisecond }
		cfg.Enclaves[0].Connect = l.connect
		var first atomic.Bool
		claims := make(chan time.Time, 2)
		ctx := t.Context()
		cfg.Observer.Claimed = func(*store.Batch) {
			claims <- time.Now()
			if first.CompareAndSwap(false, true) {
				go func() { // hello and receipts take 100 ms, so no cancel gets through
					for end := time.Now().Add(lease / 2); time.Now().Before(end) && ctx.Err() == nil; {
						pass(40 * time.Millisecond)
						l.cut()
					}
				}()
			}
		}
		cfg.Observer.GaveBack = func(b *store.Batch, why string) {
			if err := signUnder(t, w, b); !errors.Is(err, refusal.FenceStale) {
				t.Errorf("given back (%s) while the enclave would sign: %v", why, err)
			}
		}
		stop := w.start(cfg)
		w.await(3*lease, record.Signed)
		stop()
		w.check()
		if begin, again := <-claims, <-claims; again.Sub(begin) < lease/2 {
			t.Errorf("claimed again after %s", again.Sub(begin))
		}
	})
}

// signUnder asks the enclave to sign under b's claim, over a connection of its own.
func signUnder(t *testing.T, w *world, b *store.Batch) error {
	t.Helper()
	c, err := signclient.Connect(t.Context(), w.enclaves[0].Dial, signclient.Options{})
	must(t, err)
	defer c.Close()
	payload, err := w.store.Payload(t.Context(), b.ID)
	must(t, err)
	_, err = c.Sign(t.Context(), &wire.Sign{
		Ticket: c.Hello().Ticket, BatchID: b.ID, ImportID: b.ImportID, BatchFence: b.Fence, KeyID: b.KeyID, KeyFence: b.KeyFence,
		LeaseMS: b.Lease.Milliseconds(), Kind: b.Kind, Payload: payload, Refuse: []uint32{}, Probe: wire.NoProbe,
	})
	return err
}

// From another boot nothing follows about the one before.
func TestClaimOfADeadEnclaveIsLeftToRunOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, plan{keys: 2, batches: 1, records: 2})
		cfg := w.config()
		l := newLink(w.enclaves[0], 1, time.Millisecond)
		l.slow = func() time.Duration { return 50 * time.Millisecond }
		cfg.Enclaves[0].Connect = l.connect
		first := make(chan time.Time, 2)
		cfg.Observer.Claimed = func(*store.Batch) { first <- time.Now() }
		cfg.Observer.GaveBack = func(_ *store.Batch, why string) { t.Errorf("claim given back: %s", why) }
		stop := w.start(cfg)
		claimed := <-first
		pass(10 * time.Millisecond)
		w.enclaves[0].Crash()
		must(t, w.enclaves[0].Restart(t.Context()))
		w.await(3*lease, record.Signed)
		stop()
		if again := <-first; again.Sub(claimed) < lease {
			t.Errorf("taken over after %s", again.Sub(claimed))
		}
		w.check()
	})
}

// ghost claims the first batch for a parent that is gone.
func ghost(t *testing.T, w *world, boot record.BootID, lease time.Duration, next time.Time) store.Batch {
	t.Helper()
	b := w.batches()[0]
	for id := range w.public {
		b, err := w.store.Claim(t.Context(), store.Claim{
			Batch: b, KeyID: id, Owner: "ghost", ClaimID: "ghost-1", BootID: boot, Lease: lease, Used: 1, Now: time.Now(), Next: next,
		})
		must(t, err)
		return b
	}
	return b
}

func TestTakeOverByWatchingWaitsForTheLeaseInTheItem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const long = 25 * time.Second // not the watcher's own 10
		w := newWorld(t, plan{keys: 3, batches: 2, records: 1})
		ghost(t, w, record.BootID{1}, long, time.Now().Add(-time.Hour))
		begin := time.Now()
		cfg := w.config()
		var took time.Duration
		cfg.Observer.Claimed = func(b *store.Batch) {
			if b.ID == record.MakeBatchID(importID, 0) {
				took = time.Since(begin)
			}
		}
		stop := w.start(cfg)
		w.await(time.Minute, record.Signed)
		stop()
		w.check()
		if took < long || took > long+5*time.Second {
			t.Errorf("taken over after %s, want %s and a little", took, long)
		}
	})
}

func TestTakeOverByFenceIsImmediateOnceItIsOverdue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, plan{keys: 3, batches: 2, records: 1})
		old := ghost(t, w, w.enclaves[0].BootID(), lease, time.Now().Add(3*time.Second))
		begin := time.Now()
		stop := w.start(w.config())
		w.await(lease, record.Signed)
		took := time.Since(begin)
		if took < 3*time.Second || took > 6*time.Second {
			t.Errorf("taken over after %s", took)
		}
		if err := signUnder(t, w, &old); !errors.Is(err, refusal.FenceStale) {
			t.Errorf("the enclave signs for the ghost: %v", err)
		}
		stop()
		w.check()
	})
}

// Its clock is fast, so every lease seems to be over.
func TestParentWithAFastClockRobsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, plan{keys: 20, batches: 100, records: 1})
		var stops []func()
		for _, fast := range []time.Duration{0, 30 * time.Second, -30 * time.Second} {
			cfg := w.slowly()
			cfg.Store = (&faulty{Store: w.store}).atRandom(uint64(w.parents), 0)
			cfg.Now = func() time.Time { return time.Now().Add(fast) }
			stops = append(stops, w.start(cfg))
		}
		w.await(time.Minute, record.Signed)
		for _, stop := range stops {
			stop()
		}
		w.check()
		if n := w.attempts(); n != w.plan.batches {
			t.Errorf("%d attempts for %d batches", n, w.plan.batches)
		}
	})
}

// supervise boots an enclave again whenever it is down.
func supervise(t *testing.T, w *world) {
	t.Helper()
	ended := make(chan struct{})
	ctx := t.Context()
	go func() {
		defer close(ended)
		for ctx.Err() == nil {
			for _, e := range w.enclaves {
				if e.BootID().IsZero() {
					if err := e.Restart(ctx); err != nil && ctx.Err() == nil {
						t.Errorf("restart: %v", err)
					}
				}
			}
			pass(300 * time.Millisecond)
		}
	}()
	t.Cleanup(func() { <-ended })
}

func TestRecordThatTakesTheEnclaveDownIsRefusedAndTheRestIsSigned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, plan{
			keys: 8, batches: 20, records: 6, enclaves: 2,
			poison: func(p []byte) bool { return string(p) == "payload 4 of batch 7" },
		})
		supervise(t, w)
		w.checkOneIsRefused([]pipeline.Config{w.slowly(), w.slowly()})
	})
}

func TestManyRecordsThatTakeTheEnclaveDownAreRefusedAndTheRestIsSigned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		poisoned := map[string]bool{
			"payload 0 of batch 3": true, "payload 1 of batch 3": true, "payload 3 of batch 3": true, "payload 5 of batch 3": true,
		}
		w := newWorld(t, plan{
			keys: 8, batches: 8, records: 6, enclaves: 2,
			poison: func(p []byte) bool { return poisoned[string(p)] },
		})
		supervise(t, w)
		stop := w.start(w.slowly())
		w.await(30*time.Minute, record.Signed)
		stop()
		if d := cmp.Diff(map[string]int{"enclave_crash": 4}, w.check()); d != "" {
			t.Errorf("refused (-want +got):\n%s", d)
		}
		if b := w.batches()[3]; !cmp.Equal(b.Crashed, []uint32{0, 1, 3, 5}) || b.Attempts <= 5 {
			t.Errorf("crashed %v after %d attempts", b.Crashed, b.Attempts)
		}
	})
}

func TestRecordThatMakesTheEnclavePanicIsRefusedAndTheRestIsSigned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, plan{
			keys: 8, batches: 20, records: 6,
			poison: func(p []byte) bool {
				if string(p) == "payload 4 of batch 7" {
					panic("a bug that this payload finds")
				}
				return false
			},
		})
		w.checkOneIsRefused([]pipeline.Config{w.slowly()})
	})
}

// slowly is the config of a parent whose requests are answered a little later,
// and not at all once the enclave is gone.
func (w *world) slowly() pipeline.Config {
	cfg := w.config()
	for i, e := range w.enclaves {
		cfg.Enclaves[i].Connect = newLink(e, w.plan.seed+uint64(10*w.parents+i), time.Millisecond).connect
	}
	return cfg
}

func (w *world) checkOneIsRefused(parents []pipeline.Config) {
	w.t.Helper()
	var stops []func()
	for _, cfg := range parents {
		stops = append(stops, w.start(cfg))
	}
	w.await(10*time.Minute, record.Signed)
	for _, stop := range stops {
		stop()
	}
	if d := cmp.Diff(map[string]int{"enclave_crash": 1}, w.check()); d != "" {
		w.t.Errorf("refused (-want +got):\n%s", d)
	}
	if b := w.batches()[7]; !cmp.Equal(b.Crashed, []uint32{4}) {
		w.t.Errorf("crashed %v after %d attempts", b.Crashed, b.Attempts)
	}
}

// vanished has no sealed entry for one key.
type vanished struct {
	*faulty
	id record.KeyID
}

func (v *vanished) Key(ctx context.Context, id record.KeyID) (store.Key, error) {
	if id == v.id {
		return store.Key{}, store.ErrNotFound
	}
	return v.faulty.Key(ctx, id)
}

func TestWhatCannotBeSignedIsRefusedWithItsReason(t *testing.T) {
	t.Run("key without a sealed entry", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, plan{keys: 4, batches: 12, records: 2, bare: true})
			var gone record.KeyID
			for gone = range w.public {
				break
			}
			cfg := w.config()
			cfg.Store = &vanished{&faulty{Store: w.store}, gone}
			stop := w.start(cfg)
			w.await(time.Minute, record.Signed)
			stop()
			refused := w.check()
			for _, b := range w.batches() {
				if (b.KeyID == gone) != (b.Refused == 2) {
					t.Errorf("%s with key %s: %d refused", b.ID, b.KeyID, b.Refused)
				}
			}
			if len(refused) != 1 || refused["key_unavailable"] == 0 {
				t.Errorf("refused: %v", refused)
			}
		})
	})
	t.Run("kind that the policy does not grant", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, plan{keys: 4, batches: 12, records: 2, kind: record.Raw})
			stop := w.start(w.config())
			w.await(time.Minute, record.Signed)
			stop()
			if d := cmp.Diff(map[string]int{"policy_denied": 24}, w.check()); d != "" {
				t.Errorf("refused (-want +got):\n%s", d)
			}
		})
	})
}

// lacking has no payload for one batch.
type lacking struct {
	*faulty
	id record.BatchID
}

func (l *lacking) Payload(ctx context.Context, id record.BatchID) ([]byte, error) {
	if id == l.id {
		return nil, store.ErrNotFound
	}
	return l.faulty.Payload(ctx, id)
}

func TestBatchThatFailsFiveTimesIsQuarantinedAndFreesItsKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, plan{keys: 2, batches: 5, records: 1})
		id := record.MakeBatchID(importID, 3)
		cfg := w.config()
		cfg.Store = &lacking{&faulty{Store: w.store}, id}
		stop := w.start(cfg)
		w.await(2*time.Minute, record.Signed, record.Quarantined)
		stop()
		for _, b := range w.batches() {
			if (b.ID == id) != (b.State == record.Quarantined) {
				t.Errorf("%s is %s", b.ID, b.State)
			}
			if b.ID == id && b.Attempts != 5 {
				t.Errorf("%d attempts, want 5", b.Attempts)
			}
		}
		for key := range w.public {
			if l, err := w.store.Lease(t.Context(), key); err != nil || !l.Idle() {
				t.Errorf("key %s: %v, %v", key, l, err)
			}
		}
	})
}

// The last attempt was made by a parent that is gone.
func TestBatchLostFiveTimesIsQuarantined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, plan{keys: 1, batches: 1, records: 1})
		b := ghost(t, w, record.BootID{1}, lease, time.Now())
		for range 4 {
			var err error
			b, err = w.store.Claim(t.Context(), store.Claim{
				Batch: b, KeyID: b.KeyID, KeySeen: b.KeyFence, TakeOver: true, Owner: "ghost", ClaimID: time.Now().String(),
				BootID: record.BootID{1}, Lease: lease, Now: time.Now(), Next: time.Now(),
			})
			must(t, err)
			pass(time.Second)
		}
		stop := w.start(w.config())
		w.await(3*lease, record.Quarantined)
		stop()
		if l, err := w.store.Lease(t.Context(), b.KeyID); err != nil || !l.Idle() {
			t.Errorf("key: %v, %v", l, err)
		}
	})
}

func TestShutdownFinishesWhatWasSentAndReleasesTheRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, plan{keys: 8, batches: 8, records: 1})
		cfg := w.config()
		l := newLink(w.enclaves[0], 1, time.Millisecond)
		l.slow = func() time.Duration { return time.Second }
		cfg.Enclaves[0].Connect, cfg.Workers = l.connect, 1
		claimed, gaveBack := 0, 0
		both := make(chan struct{})
		cfg.Observer.Claimed = func(*store.Batch) {
			if claimed++; claimed == 2 {
				close(both)
			}
		}
		cfg.Observer.GaveBack = func(_ *store.Batch, why string) {
			gaveBack++
			if why != "shutdown" {
				t.Errorf("given back: %s", why)
			}
		}
		stop := w.start(cfg)
		<-both
		begin := time.Now()
		stop()
		if took := time.Since(begin); took > lease {
			t.Errorf("shutdown took %s", took)
		}
		states := map[record.State]int{}
		for _, b := range w.batches() {
			states[b.State]++
			if b.State == record.Ready && (b.Attempts != 0 || !b.KeyID.IsZero()) {
				t.Errorf("%s: %d attempts, key %s", b.ID, b.Attempts, b.KeyID)
			}
		}
		if d := cmp.Diff(map[record.State]int{record.Signed: 1, record.Ready: 7}, states); d != "" || gaveBack != 1 {
			t.Errorf("%d given back; states (-want +got):\n%s", gaveBack, d)
		}
	})
}

func TestShutdownTakesNoLongerThanALease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, plan{keys: 4, batches: 8, records: 1})
		cfg := w.config()
		l := newLink(w.enclaves[0], 1, time.Millisecond)
		var hangs atomic.Bool
		l.slow = func() time.Duration {
			if hangs.Load() {
				return time.Hour
			}
			return time.Millisecond
		}
		cfg.Enclaves[0].Connect = l.connect
		cfg.Observer.Claimed = func(*store.Batch) { hangs.Store(true) }
		stop := w.start(cfg)
		w.until(time.Minute, func() bool { return w.attempts() > 0 })
		begin := time.Now()
		stop()
		if took := time.Since(begin); took > lease+time.Second {
			t.Errorf("shutdown took %s", took)
		}
	})
}

func TestPipelineOutlivesADatabaseThatIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, plan{keys: 8, batches: 100, records: 1})
		cfg := w.config()
		tables := (&faulty{Store: w.store}).atRandom(1, 0)
		begin := time.Now()
		tables.decide = func(string, int) fate {
			if since := time.Since(begin); since > 100*time.Millisecond && since < 5*time.Minute {
				return before
			}
			return fine
		}
		cfg.Store = tables
		stop := w.start(cfg)
		w.await(6*time.Minute, record.Signed)
		stop()
		w.check()
		if n := tables.made(); n > 20_000 {
			t.Errorf("%d calls: no back-off", n)
		}
	})
}

func TestAnIdleParentAsksSeldom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, plan{keys: 2, batches: 1, records: 1})
		cfg := w.config()
		tables := &faulty{Store: w.store}
		cfg.Store = tables
		stop := w.start(cfg)
		w.await(time.Minute, record.Signed)
		pass(10 * time.Second)
		before := tables.made()
		pass(time.Minute)
		if n := tables.made() - before; n < store.ReadyShards || n > 60*store.ReadyShards {
			t.Errorf("%d calls in an idle minute", n)
		}
		stop()
	})
}

func TestConfigNamesEverythingThatIsMissing(t *testing.T) {
	err := pipeline.Run(t.Context(), pipeline.Config{Lease: time.Millisecond})
	want := `pipeline: store is missing
pipeline: no enclave is given
pipeline: workers must be between 1 and 64
pipeline: lease must be between 1s and 10m0s
pipeline: owner is missing
pipeline: source of randomness is missing
pipeline: logger is missing`
	if err == nil || err.Error() != want {
		t.Errorf("got %v", err)
	}
}
