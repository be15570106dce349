package dynamo_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"

	"github.com/keyhold/keyhold/internal/awslocal/fault"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/dynamo"
)

const sdkAttempts = 3

// story is what happens to the writes of one call, in their order; the last
// fault happens to all that follow.
type story struct {
	name   string
	faults []fault.Kind
	// What a method of one write must answer.
	wantNil      bool
	wantSentinel error
}

func stories() []story {
	const none = fault.None
	return []story{
		{"nothing", []fault.Kind{none}, true, nil},
		{"lost before it arrived, once", []fault.Kind{fault.DropRequest, none}, true, nil},
		{"lost before it arrived, always", []fault.Kind{fault.DropRequest}, false, nil},
		{"answer lost, once", []fault.Kind{fault.DropAnswer, none}, true, nil},
		{"answer lost, twice", []fault.Kind{fault.DropAnswer, fault.DropAnswer, none}, true, nil},
		{"answer lost, always", []fault.Kind{fault.DropAnswer}, false, nil},
		{"answer cut, once", []fault.Kind{fault.CutAnswer, none}, true, nil},
		{"answer cut, always", []fault.Kind{fault.CutAnswer}, false, nil},
		{"500 once", []fault.Kind{fault.ServerError, none}, true, nil},
		{"500 always", []fault.Kind{fault.ServerError}, false, nil},
		{"throttled once", []fault.Kind{fault.Throttle, none}, true, nil},
		{"throttled always", []fault.Kind{fault.Throttle}, false, store.ErrThrottled},
		{"rate limited always", []fault.Kind{fault.RateLimit}, false, store.ErrThrottled},
		{"conflict once", []fault.Kind{fault.TransactionConflict, none}, true, nil},
		{"conflict always", []fault.Kind{fault.TransactionConflict}, false, store.ErrThrottled},
		{"answer lost, then throttled", []fault.Kind{fault.DropAnswer, fault.Throttle}, false, nil},
		{"500, then throttled", []fault.Kind{fault.ServerError, fault.Throttle}, false, nil},
		{"throttled, then answer lost", []fault.Kind{fault.Throttle, fault.DropAnswer, none}, true, nil},
		{"answer lost, then conflict once", []fault.Kind{fault.DropAnswer, fault.TransactionConflict, none}, true, nil},
		{"answer lost, then conflict", []fault.Kind{fault.DropAnswer, fault.TransactionConflict}, false, nil},
		{"first answer arrives, second is lost", []fault.Kind{none, fault.DropAnswer, none}, true, nil},
		{"first answer arrives, the others are lost", []fault.Kind{none, fault.DropAnswer}, true, nil},
		{"first answer arrives, then throttled", []fault.Kind{none, fault.Throttle}, true, nil},
	}
}

var writes = []string{"PutItem", "UpdateItem", "TransactWriteItems"}

func (s *story) choose() fault.Choose {
	var n atomic.Int64
	return func(c fault.Call) fault.Fault {
		if !slices.Contains(writes, c.Operation) {
			return fault.Fault{}
		}
		i := min(int(n.Add(1)), len(s.faults)) - 1
		return fault.Fault{Kind: s.faults[i]}
	}
}

// world is names of its own for one case, so that cases share tables.
type world int

func (w world) importID() record.ImportID { return record.ImportID(fmt.Sprintf("import-%d", w)) }

func (w world) newImport() store.Import {
	i := newImport()
	i.ID = w.importID()
	return i
}

func (w world) batch(n int) store.Batch {
	b := newBatch(n)
	b.ImportID = w.importID()
	b.ID = record.MakeBatchID(b.ImportID, n)
	return b
}

func (w world) key(n int) store.Key {
	k := newKey(n)
	k.ID[2], k.ID[3] = byte(w>>8), byte(w)
	return k
}

func (w world) claim() store.Claim {
	c := claimOf(0)
	c.Batch, c.KeyID = w.batch(0), w.key(0).ID
	return c
}

func (w world) bootID() record.BootID { return record.BootID{0: byte(w >> 8), 1: byte(w), 31: 3} }

func (w world) receipt() store.Receipt {
	return store.Receipt{Ref: store.ReceiptRef{BootID: w.bootID(), Lane: 1, Seq: 1}, Signed: []byte("receipt")}
}

func (w world) ref(n int) store.RecordRef {
	return store.RecordRef{ID: fmt.Sprintf("record-%d", w), BatchID: w.batch(n).ID, Index: n, PayloadHash: [32]byte{31: 1}}
}

// fill puts two batches and two keys.
func (w world) fill(t *testing.T, s store.Store) {
	t.Helper()
	must[store.Import](t)(s.OpenImport(t.Context(), w.newImport()))
	for n := range 2 {
		must[[]byte](t)(s.PutPayload(t.Context(), w.batch(n).ID, []byte("payload")))
		noError(t, s.PutBatch(t.Context(), w.batch(n)))
		noError(t, s.PutKeys(t.Context(), []store.Key{w.key(n)}))
	}
}

// write is a method that writes.
type write struct {
	name string
	many bool // it makes several writes, so that part of it may be in the table
	// prepare fills the tables and returns the call.
	prepare func(*testing.T, store.Store, world) func(context.Context, store.Store) error
	// state reads what is in the tables: whether anything of the call is, and all of it.
	state func(*testing.T, store.Store, world) (begun, done bool)
}

func single(done func(*testing.T, store.Store, world) bool) func(*testing.T, store.Store, world) (bool, bool) {
	return func(t *testing.T, s store.Store, w world) (bool, bool) {
		t.Helper()
		is := done(t, s, w)
		return is, is
	}
}

// is reports whether a batch has a state, and whether its key is idle or held as it must be then.
func batchIs(state record.State, attempts int) func(*testing.T, store.Store, world) bool {
	return func(t *testing.T, s store.Store, w world) bool {
		t.Helper()
		b := must[store.Batch](t)(s.Batch(t.Context(), w.batch(0).ID))
		l := must[store.Lease](t)(s.Lease(t.Context(), w.key(0).ID))
		if held := b.State == record.Claimed; held == l.Idle() || held && (l.Fence != b.KeyFence || l.Owner != b.Owner) {
			t.Errorf("the batch is %s under key fence %d, but its key: %+v", b.State, b.KeyFence, l)
		}
		return b.State == state && b.Attempts == attempts
	}
}

// present reports whether a read finds something.
func present[T any](t *testing.T, _ T, err error) bool {
	t.Helper()
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		t.Fatal(err)
	}
	return err == nil
}

func TestTheAnswerOfAWriteMatchesWhatIsInTheTable(t *testing.T) {
	for _, w := range slices.Concat(claimWrites(), intakeWrites(), archiveWrites()) {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			name := prefix()
			clean := newStore(t, dynamo.Options{Prefix: name})
			for n, s := range stories() {
				t.Run(s.name, func(t *testing.T) {
					w.check(t, clean, name, s, world(n+1))
				})
			}
		})
	}
}

// check runs the call under a story's faults and then once more without.
func (w *write) check(t *testing.T, clean *dynamo.Store, prefix string, s story, at world) {
	t.Helper()
	call := w.prepare(t, clean, at)
	if begun, _ := w.state(t, clean, at); begun {
		t.Fatal("the tables say that it is done before it is")
	}
	err := call(t.Context(), faulty(t, prefix, s.choose()))
	begun, done := w.state(t, clean, at)
	if err == nil && !done {
		t.Error("no error, but it is not in the table")
	}
	if sentinel(err) && begun {
		t.Errorf("error %v says that nothing was written, but it is in the table", err)
	}
	if !w.many {
		s.check(t, err)
	}
	if err := call(t.Context(), clean); err != nil {
		t.Errorf("again: %v", err)
	}
	if _, done := w.state(t, clean, at); !done {
		t.Error("again: it is not in the table")
	}
}

// check compares the answer of a method of one write.
func (s *story) check(t *testing.T, err error) {
	t.Helper()
	switch {
	case s.wantNil:
		if err != nil {
			t.Errorf("error %v, want none", err)
		}
	case s.wantSentinel != nil:
		if !errors.Is(err, s.wantSentinel) {
			t.Errorf("error %v, want %v", err, s.wantSentinel)
		}
	case err == nil || sentinel(err):
		t.Errorf("error %v, want one that is no sentinel: the outcome is not known", err)
	}
}

func sentinel(err error) bool {
	return slices.ContainsFunc([]error{
		store.ErrNotFound, store.ErrFenced, store.ErrTaken, store.ErrDiffers,
		store.ErrAborted, store.ErrThrottled, store.ErrNoTables,
	}, func(s error) bool { return errors.Is(err, s) })
}

// faulty is a store over the same tables whose requests suffer faults.
func faulty(t *testing.T, prefix string, choose fault.Choose) *dynamo.Store {
	t.Helper()
	o := newClient(t, func(next http.RoundTripper) http.RoundTripper { return fault.New(next, choose) }).Options()
	o.Retryer = retry.NewStandard(func(o *retry.StandardOptions) {
		o.MaxAttempts = sdkAttempts
		o.Backoff = retry.BackoffDelayerFunc(func(int, error) (time.Duration, error) { return time.Millisecond, nil })
	})
	return dynamo.TestingOnlyImpatient(dynamo.New(dynamodb.New(o), dynamo.Options{Prefix: prefix}))
}
