package dynamo_test

import (
	"errors"
	"testing"
	"time"

	"github.com/keyhold/keyhold/internal/awslocal/fault"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/dynamo"
)

// A recorded history showed it: the answer to a write is lost, another client
// moves the batch on, and the SDK's next attempt finds a condition that fails. A
// sentinel would say that nothing was written.
func TestAWriteThatWasAppliedAndOvertakenIsUnknown(t *testing.T) {
	quarantine := store.End{State: record.Quarantined, Reason: "quarantined", Attempt: true, KeepKey: true, Now: start}
	taken := func(t *testing.T, s store.Store, b store.Batch) {
		t.Helper()
		must[store.Batch](t)(s.Claim(t.Context(), store.Claim{
			Batch: b, KeyID: b.KeyID, KeySeen: b.KeyFence, TakeOver: b.State == record.Claimed,
			Owner: "p2", ClaimID: "another", Now: start, Next: start,
		}))
	}
	for _, c := range []struct {
		name  string
		begin func(*testing.T, store.Store, store.Batch)
		write func(*testing.T, store.Store, store.Batch) error
	}{
		{
			"NoteCrash",
			func(*testing.T, store.Store, store.Batch) {},
			func(t *testing.T, s store.Store, b store.Batch) error {
				t.Helper()
				return s.NoteCrash(t.Context(), b, []uint32{7})
			},
		},
		{
			"Requeue",
			func(t *testing.T, s store.Store, b store.Batch) {
				t.Helper()
				noError(t, s.Release(t.Context(), b, quarantine))
			},
			func(t *testing.T, s store.Store, b store.Batch) error {
				t.Helper()
				return s.Requeue(t.Context(), b.ID, start.Add(time.Hour))
			},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			name := prefix()
			clean := newStore(t, dynamo.Options{Prefix: name})
			world(1).fill(t, clean)
			b := must[store.Batch](t)(clean.Claim(t.Context(), world(1).claim()))
			c.begin(t, clean, b)
			overtake := func(call fault.Call) fault.Fault {
				switch {
				case call.Operation != "UpdateItem":
				case call.Nth == 1:
					return fault.Fault{Kind: fault.DropAnswer}
				case call.Nth == 2:
					taken(t, clean, must[store.Batch](t)(clean.Batch(t.Context(), b.ID)))
				}
				return fault.Fault{}
			}
			if err := c.write(t, faulty(t, name, overtake), b); err == nil || sentinel(err) {
				t.Errorf("error %v, want one that is no sentinel", err)
			}
			if now := must[store.Batch](t)(clean.Batch(t.Context(), b.ID)); now.ClaimID != "another" {
				t.Errorf("the batch was not overtaken: %+v", now)
			}
		})
	}
}

// The same where the import that somebody aborts is the one whose answer was
// lost. Asked again, the store says plainly that it was aborted.
func TestAnImportThatWasOpenedAndAbortedMeanwhileIsUnknown(t *testing.T) {
	name := prefix()
	clean := newStore(t, dynamo.Options{Prefix: name})
	abort := func(call fault.Call) fault.Fault {
		switch {
		case call.Operation != "PutItem":
		case call.Nth == 1:
			return fault.Fault{Kind: fault.DropAnswer}
		case call.Nth == 2:
			must[int](t)(clean.AbortImport(t.Context(), world(1).importID()))
		}
		return fault.Fault{}
	}
	if _, err := faulty(t, name, abort).OpenImport(t.Context(), world(1).newImport()); err == nil || sentinel(err) {
		t.Errorf("error %v, want one that is no sentinel", err)
	}
	if _, err := clean.OpenImport(t.Context(), world(1).newImport()); !errors.Is(err, store.ErrAborted) {
		t.Errorf("asked again: %v, want that it was aborted", err)
	}
}
