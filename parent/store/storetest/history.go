package storetest

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

// History is what clients asked of a store and were answered, in an order that
// says which call ended before which began. It is safe for concurrent use.
type History struct {
	mu    sync.Mutex
	clock int64
	calls []porcupine.Operation
}

// answer is how a call ended: with a value, with a sentinel, or unknown.
type answer struct {
	value   any
	refused error // a sentinel
	unknown bool
}

// What a call asked.
type (
	claimCall   struct{ store.Claim }
	commitCall  struct{ store.Commit }
	releaseCall struct {
		store.Batch
		end store.End
	}
	crashCall struct {
		store.Batch
		crashed []uint32
	}
	requeueCall struct {
		id  record.BatchID
		now time.Time
	}
	batchCall  struct{ id record.BatchID }
	resultCall struct{ id record.BatchID }
	leaseCall  struct{ id record.KeyID }
	openCall   struct {
		store.Import
		lost bool // it was aborted in the end
	}
	putCall     struct{ store.Batch }
	finishCall  struct{ store.Import }
	abortCall   struct{ id record.ImportID } // the tombstone
	sweepCall   struct{ id record.ImportID } // what goes with it
	importCall  struct{ id record.ImportID }
	reserveCall struct {
		ref  store.RecordRef
		over *store.RecordRef
		lost bool // another holds it in the end
	}
	recordCall struct{ id string }
	onceCall   struct { // a write where absent
		name, content string
		returns       bool // it answers what is there, and never refuses
	}
	lookCall struct{ name string } // reads what was written once
)

// reads have no effect, so one without an answer says nothing.
func reads(call any) bool {
	switch call.(type) {
	case batchCall, resultCall, leaseCall, importCall, recordCall, lookCall:
		return true
	}
	return false
}

var refusals = []error{store.ErrNotFound, store.ErrFenced, store.ErrTaken, store.ErrDiffers, store.ErrAborted}

// Client is a store whose calls become part of h. Each concurrent caller has one
// of its own. Index reads may be stale and are not recorded.
func (h *History) Client(n int, s store.Store) store.Store { return &client{Store: s, h: h, n: n} }

type client struct {
	store.Store
	h *History
	n int
}

func (h *History) tick() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.clock++
	return h.clock
}

// note keeps one call. An unknown outcome never returns: it may come to pass at
// any later time, or not at all. After ErrThrottled nothing was written, and the
// history goes on as if the call had never been made.
func (h *History) note(client int, began int64, value any, err error, calls ...any) {
	a := answer{value: value}
	if err != nil {
		at := slices.IndexFunc(refusals, func(r error) bool { return errors.Is(err, r) })
		if a.value = nil; at >= 0 {
			a.refused = refusals[at]
		} else {
			a.unknown = true
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.clock++
	ended := h.clock
	if a.unknown {
		if reads(calls[0]) || errors.Is(err, store.ErrThrottled) {
			return
		}
		ended = math.MaxInt64
	}
	for _, c := range calls {
		h.calls = append(h.calls, porcupine.Operation{ClientId: client, Input: c, Call: began, Output: shownTo(a), Return: ended})
	}
}

func ask[T any](c *client, in any, call func() (T, error)) (T, error) {
	began := c.h.tick()
	v, err := call()
	c.h.note(c.n, began, v, err, in)
	return v, err
}

func tell(c *client, in any, call func() error) error {
	began := c.h.tick()
	err := call()
	c.h.note(c.n, began, nil, err, in)
	return err
}

func (c *client) Claim(ctx context.Context, claim store.Claim) (store.Batch, error) {
	return ask(c, claimCall{claim}, func() (store.Batch, error) { return c.Store.Claim(ctx, claim) })
}

func (c *client) Commit(ctx context.Context, commit store.Commit) error {
	return tell(c, commitCall{commit}, func() error { return c.Store.Commit(ctx, commit) })
}

func (c *client) Release(ctx context.Context, b store.Batch, e store.End) error {
	return tell(c, releaseCall{b, e}, func() error { return c.Store.Release(ctx, b, e) })
}

func (c *client) NoteCrash(ctx context.Context, b store.Batch, crashed []uint32) error {
	return tell(c, crashCall{b, crashed}, func() error { return c.Store.NoteCrash(ctx, b, crashed) })
}

func (c *client) Requeue(ctx context.Context, id record.BatchID, now time.Time) error {
	return tell(c, requeueCall{id, now}, func() error { return c.Store.Requeue(ctx, id, now) })
}

func (c *client) Batch(ctx context.Context, id record.BatchID) (store.Batch, error) {
	return ask(c, batchCall{id}, func() (store.Batch, error) { return c.Store.Batch(ctx, id) })
}

func (c *client) Result(ctx context.Context, id record.BatchID) ([]byte, error) {
	return ask(c, resultCall{id}, func() ([]byte, error) { return c.Store.Result(ctx, id) })
}

func (c *client) Lease(ctx context.Context, id record.KeyID) (store.Lease, error) {
	return ask(c, leaseCall{id}, func() (store.Lease, error) { return c.Store.Lease(ctx, id) })
}

// OpenImport that finds a tombstone is two steps: a retry below may find that its
// own write was made, and that the import was aborted since.
func (c *client) OpenImport(ctx context.Context, i store.Import) (store.Import, error) {
	began := c.h.tick()
	there, err := c.Store.OpenImport(ctx, i)
	calls := []any{openCall{Import: i}}
	if errors.Is(err, store.ErrAborted) {
		calls = []any{openCall{Import: i, lost: true}, openCall{Import: i}}
	}
	c.h.note(c.n, began, there, err, calls...)
	return there, err
}

func (c *client) PutBatch(ctx context.Context, b store.Batch) error {
	return tell(c, putCall{b}, func() error { return c.Store.PutBatch(ctx, b) })
}

func (c *client) FinishImport(ctx context.Context, i store.Import) error {
	return tell(c, finishCall{i}, func() error { return c.Store.FinishImport(ctx, i) })
}

// AbortImport is two steps: the contract has the tombstone first, and then the
// batches go one by one.
func (c *client) AbortImport(ctx context.Context, id record.ImportID) (int, error) {
	began := c.h.tick()
	kept, err := c.Store.AbortImport(ctx, id)
	c.h.note(c.n, began, kept, err, abortCall{id}, sweepCall{id})
	return kept, err
}

func (c *client) Import(ctx context.Context, id record.ImportID) (store.Import, error) {
	return ask(c, importCall{id}, func() (store.Import, error) { return c.Store.Import(ctx, id) })
}

// ReserveRecord that names another holder is two steps: a retry below may find
// that its own write was made, and has been taken over since.
func (c *client) ReserveRecord(ctx context.Context, ref store.RecordRef, over *store.RecordRef) (store.RecordRef, error) {
	began := c.h.tick()
	holder, err := c.Store.ReserveRecord(ctx, ref, over)
	if err == nil && holder != ref {
		c.h.note(c.n, began, holder, nil, reserveCall{ref, over, true}, recordCall{ref.ID})
	} else {
		c.h.note(c.n, began, holder, err, reserveCall{ref, over, false})
	}
	return holder, err
}

func (c *client) Record(ctx context.Context, id string) (store.RecordRef, error) {
	return ask(c, recordCall{id}, func() (store.RecordRef, error) { return c.Store.Record(ctx, id) })
}

// once records a write where absent, or a look at it, with the content as its value.
func once[T any](c *client, in any, content func(T) string, call func() (T, error)) (T, error) {
	began := c.h.tick()
	v, err := call()
	c.h.note(c.n, began, content(v), err, in)
	return v, err
}

func asString(b []byte) string { return string(b) }

func (c *client) PutPayload(ctx context.Context, id record.BatchID, p []byte) ([]byte, error) {
	call := onceCall{name: payloadName(id), content: string(p), returns: true}
	return once(c, call, asString, func() ([]byte, error) { return c.Store.PutPayload(ctx, id, p) })
}

func (c *client) Payload(ctx context.Context, id record.BatchID) ([]byte, error) {
	return once(c, lookCall{payloadName(id)}, asString, func() ([]byte, error) { return c.Store.Payload(ctx, id) })
}

func (c *client) PutReceipt(ctx context.Context, r store.Receipt) error {
	return tell(c, onceCall{name: receiptName(r.Ref), content: string(r.Signed)}, func() error { return c.Store.PutReceipt(ctx, r) })
}

func (c *client) Receipt(ctx context.Context, ref store.ReceiptRef) (store.Receipt, error) {
	content := func(r store.Receipt) string { return string(r.Signed) }
	return once(c, lookCall{receiptName(ref)}, content, func() (store.Receipt, error) { return c.Store.Receipt(ctx, ref) })
}

func (c *client) PutKeyring(ctx context.Context, id string, header []byte) error {
	return tell(c, onceCall{name: "keyring " + id, content: string(header)}, func() error { return c.Store.PutKeyring(ctx, id, header) })
}

func (c *client) Keyring(ctx context.Context, id string) ([]byte, error) {
	return once(c, lookCall{"keyring " + id}, asString, func() ([]byte, error) { return c.Store.Keyring(ctx, id) })
}

func payloadName(id record.BatchID) string { return "payload " + string(id) }

func receiptName(r store.ReceiptRef) string {
	return fmt.Sprintf("receipt %x %d %d", r.BootID[:2], r.Lane, r.Seq)
}

// describe one call for people.
func describe(input, output any) string {
	out, _ := output.(answer)
	how := fmt.Sprintf("%v", out.value)
	switch {
	case out.unknown:
		how = "unknown"
	case out.refused != nil:
		how = out.refused.Error()
	}
	switch c := input.(type) {
	case claimCall:
		return fmt.Sprintf("claim %s fence %d with key %d fence %d, take over %v: %s", c.Batch.ID, c.Batch.Fence, keyNumber(c.KeyID), c.KeySeen, c.TakeOver, how)
	case commitCall:
		return fmt.Sprintf("commit %s fence %d: %s", c.Batch.ID, c.Batch.Fence, how)
	case releaseCall:
		return fmt.Sprintf("release %s fence %d to %s, attempt %v, keep %v: %s", c.ID, c.Fence, c.end.State, c.end.Attempt, c.end.KeepKey, how)
	case crashCall:
		return fmt.Sprintf("crash %s fence %d %v: %s", c.ID, c.Fence, c.crashed, how)
	}
	return fmt.Sprintf("%T %+v: %s", input, input, how)
}
