package sign_test

import (
	"context"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhold/keyhold/enclave/internal/sign"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

// stage is an engine in a bubble whose batches stop before each record until
// they are let on. Its clock is the bubble's.
type stage struct {
	*fixture
	at   chan string   // a payload about to be signed
	goOn chan struct{} // lets one record be signed
}

func newStage(t *testing.T, keys int) *stage {
	t.Helper()
	s := &stage{at: make(chan string, 16), goOn: make(chan struct{})}
	start := time.Now()
	s.fixture = newFixture(t, func(o *sign.Options) {
		mono := func() time.Duration { return time.Since(start) }
		o.Clock = sign.Clock{Mono: mono, Wall: time.Now}
		o.BeforeRecord = func(p []byte) {
			s.at <- string(p)
			<-s.goOn
		}
	})
	s.open(t, keys, config.Create{Algorithm: record.Secp256k1, Policy: "messages"})
	return s
}

// begin signs in the background on a lane of its own.
func (s *stage) begin(ctx context.Context, t *testing.T, change ...func(*wire.Sign)) <-chan error {
	t.Helper()
	l, m := s.lane(t), s.request(change...)
	done := make(chan error, 1)
	go func() {
		_, err := s.engine.Sign(ctx, l, m)
		done <- err
	}()
	return done
}

func fenceAt(n record.Fence) func(*wire.Sign) { return func(m *wire.Sign) { m.KeyFence = n } }

func TestCancelAnswersAtOnceAndTheRunningBatchIsNotReleased(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, 1)
		done := s.begin(t.Context(), t, fenceAt(3))
		<-s.at
		_, err := s.engine.Cancel(&wire.Cancel{KeyID: s.keys[0].KeyID, KeyFence: 3})
		want(t, err, "")
		close(s.goOn)
		want(t, <-done, refusal.FenceStale)
		if st := s.engine.Status(); st.Batches != 0 {
			t.Error("a cancelled batch was released")
		}
	})
}

func TestABatchThatTookTooLongIsNotReleased(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, 1)
		done := s.begin(t.Context(), t)
		<-s.at
		time.Sleep(9 * time.Second) //nolint:forbidigo // a bubble's clock
		close(s.goOn)
		want(t, <-done, refusal.Deadline)
	})
}

func TestOneBatchAtATimeUsesAKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, 2)
		first := s.begin(t.Context(), t, fenceAt(1))
		<-s.at
		second := s.begin(t.Context(), t, fenceAt(1))
		other := s.begin(t.Context(), t, func(m *wire.Sign) { m.KeyID = s.keys[1].KeyID })
		synctest.Wait()
		if n := len(s.at); n != 1 {
			t.Fatalf("%d batches entered beside the first, want only that of the other key", n)
		}
		close(s.goOn)
		want(t, <-first, "")
		want(t, <-second, "")
		want(t, <-other, "")
		if _, used := s.engine.TestingOnlyGates(); used != 0 {
			t.Errorf("%d keys still in use", used)
		}
	})
}

func TestWaitingForAKeyEndsWithTheDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, 1)
		first := s.begin(t.Context(), t)
		<-s.at
		second := s.begin(t.Context(), t, func(m *wire.Sign) { m.LeaseMS = 3000 })
		before := time.Now()
		want(t, <-second, refusal.Deadline)
		if waited := time.Since(before); waited != 2*time.Second {
			t.Errorf("waited %v, want 2s", waited)
		}
		close(s.goOn)
		want(t, <-first, "")
		if _, used := s.engine.TestingOnlyGates(); used != 0 {
			t.Errorf("%d keys still in use", used)
		}
	})
}

func TestWaitingForAKeyEndsWithTheContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, 1)
		first := s.begin(t.Context(), t)
		<-s.at
		ctx, cancel := context.WithCancel(t.Context())
		second := s.begin(ctx, t)
		synctest.Wait()
		cancel()
		if err := <-second; err == nil {
			t.Error("signed without the key")
		}
		close(s.goOn)
		want(t, <-first, "")
	})
}

func TestANewerFenceRevokesTheBatchAtWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, 1)
		old := s.begin(t.Context(), t, fenceAt(1))
		<-s.at
		newer := s.begin(t.Context(), t, fenceAt(2))
		synctest.Wait()
		close(s.goOn)
		want(t, <-old, refusal.FenceStale)
		want(t, <-newer, "")
	})
}

func TestTwoBatchesUnderOneFenceCannotBothWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, 1)
		first := s.begin(t.Context(), t, fenceAt(1))
		<-s.at
		// Neither is known to the gate yet when both queue under fence 2.
		a := s.begin(t.Context(), t, fenceAt(2))
		synctest.Wait()
		b := s.begin(t.Context(), t, fenceAt(2), func(m *wire.Sign) { m.BatchID = "imp-b0000001" })
		synctest.Wait()
		close(s.goOn)
		want(t, <-first, refusal.FenceStale)
		want(t, <-a, "")
		want(t, <-b, refusal.FenceConflict)
	})
}

func TestAPanicLeavesTheKeyFree(t *testing.T) {
	armed := true
	f := newFixture(t, hook(func([]byte) {
		if armed {
			armed = false
			panic("poison")
		}
	}))
	f.open(t, 1, config.Create{Algorithm: record.Secp256k1, Policy: "messages"})
	l := f.lane(t)
	func() {
		defer func() {
			if recover() == nil {
				t.Error("no panic")
			}
		}()
		_, _ = f.engine.Sign(t.Context(), l, f.request(func(m *wire.Sign) { m.Alone = true }))
	}()
	_, err := f.engine.Sign(t.Context(), l, f.request())
	want(t, err, "")
}

// Whoever waits for a suspect, or is one that waits, gives up with its deadline
// and with its connection, and leaves nothing taken. Outside of a bubble: a wait
// that ends with neither has to fail here, and not to hang.
func TestWaitingForASuspectEnds(t *testing.T) {
	const (
		short   = margin + 50 // milliseconds of a lease: 50 ms to wait
		patient = 20 * time.Second
	)
	for _, tc := range []struct {
		name          string
		first, second string // "suspect" asks to be alone
		behind        bool   // a third batch waits at the door, behind the second
	}{
		{name: "a batch for a suspect", first: "suspect", second: "plain"},
		{name: "a suspect for a batch", first: "plain", second: "suspect"},
		{name: "a suspect for a suspect", first: "suspect", second: "suspect"},
		{name: "a batch for a suspect that waits", first: "plain", second: "suspect", behind: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			at, goOn := make(chan struct{}, 4), make(chan struct{})
			f := newFixture(t, func(o *sign.Options) {
				o.MaxLanes = 8
				o.BeforeRecord = func([]byte) {
					at <- struct{}{}
					<-goOn
				}
			})
			f.open(t, 4, config.Create{Algorithm: record.Secp256k1, Policy: "messages"})
			var running sync.WaitGroup
			defer running.Wait()
			begin := func(ctx context.Context, key int, text string, leaseMS int64) <-chan error {
				l, done := f.lane(t), make(chan error, 1)
				m := f.request(func(m *wire.Sign) {
					m.KeyID, m.Alone, m.LeaseMS = f.keys[key].KeyID, text == "suspect", leaseMS
				})
				running.Go(func() {
					_, err := f.engine.Sign(ctx, l, m)
					done <- err
				})
				return done
			}
			soon := func(done <-chan error) error {
				timer := time.NewTimer(patient)
				defer timer.Stop()
				select {
				case err := <-done:
					return err
				case <-timer.C:
					close(goOn)
					t.Fatal("still waiting after its deadline or its connection")
					return nil
				}
			}
			first := begin(t.Context(), 0, tc.first, lease)
			<-at
			want(t, soon(begin(t.Context(), 1, tc.second, short)), refusal.Deadline)
			ctx, hangUp := context.WithCancel(t.Context())
			cut := begin(ctx, 2, tc.second, lease)
			if tc.behind {
				for !f.engine.TestingOnlyDoorHeld() {
					runtime.Gosched()
				}
				want(t, soon(begin(t.Context(), 1, "plain", short)), refusal.Deadline)
			}
			hangUp()
			if err := soon(cut); err == nil {
				t.Error("signed although its connection is gone")
			}
			close(goOn)
			want(t, soon(first), "")
			want(t, soon(begin(t.Context(), 3, "suspect", lease)), "") // it needs every share
		})
	}
}

// Mutexes are no durable block in a bubble, so this runs outside of one. Who
// must not get in is given a moment to do so.
func TestASuspectIsSignedWithNoOtherBatch(t *testing.T) {
	const moment = 50 * time.Millisecond
	for _, tc := range []struct {
		name          string
		first, second string // "suspect" asks to be alone
		together      bool
	}{
		{"a batch waits for a suspect", "suspect", "plain", false},
		{"a suspect waits for a batch", "plain", "suspect", false},
		{"two suspects", "suspect", "suspect", false},
		{"two batches", "plain", "other plain", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			at, goOn := make(chan string, 2), make(chan struct{})
			f := newFixture(t, hook(func(p []byte) {
				at <- string(p)
				<-goOn
			}))
			f.open(t, 2, config.Create{Algorithm: record.Secp256k1, Policy: "messages"})
			var wg sync.WaitGroup
			begin := func(key int, text string) {
				l := f.lane(t)
				m := f.request(func(m *wire.Sign) {
					m.KeyID, m.Alone, m.Payload = f.keys[key].KeyID, text == "suspect", record.EncodePayload(records(text))
				})
				wg.Go(func() {
					_, err := f.engine.Sign(t.Context(), l, m)
					want(t, err, "")
				})
			}
			begin(0, tc.first)
			<-at
			begin(1, tc.second)
			together := false
			timer := time.NewTimer(moment)
			if tc.together {
				timer.Reset(time.Minute)
			}
			select {
			case <-at:
				together = true
			case <-timer.C:
			}
			if together != tc.together {
				t.Errorf("signed side by side: %t, want %t", together, tc.together)
			}
			close(goOn)
			wg.Wait()
		})
	}
}
