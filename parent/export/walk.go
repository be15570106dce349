// Package export reads what imports have come to and prints it: records and
// batches as JSON Lines. It writes nothing to the tables and judges nothing.
package export

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/parent/store"
)

const (
	ahead    = 16     // batches that are read while earlier ones are handled
	keptKeys = 10_000 // public keys kept at a time, so a large pool needs no memory
)

// What is read of a batch beside its control item, side by side.
const (
	payloadPart = iota
	resultPart
	keyPart
	receiptPart
	allParts
)

// Store is what a walk reads.
type Store interface {
	Imports(ctx context.Context) ([]store.Import, error)
	Import(ctx context.Context, id record.ImportID) (store.Import, error)
	Batch(ctx context.Context, id record.BatchID) (store.Batch, error)
	Payload(ctx context.Context, id record.BatchID) ([]byte, error)
	Result(ctx context.Context, id record.BatchID) ([]byte, error)
	Key(ctx context.Context, id record.KeyID) (store.Key, error)
	Receipt(ctx context.Context, ref store.ReceiptRef) (store.Receipt, error)
}

// Item is one batch and what belongs to it.
type Item struct {
	Batch    store.Batch
	Records  []record.Record
	Outcomes []record.Outcome // of a SIGNED batch, else nil
	Key      *sealed.Public   // nil where the batch has no key yet, or the key is lost
	Receipt  []byte           // encoded receipt.Signed; nil where there is none
	Problem  error            // a segment, key or receipt that cannot be read or is missing
}

// RecordID of the record at index i: its own, or the one that its place gives it.
func (it *Item) RecordID(i int) string {
	if id := it.Records[i].ID; id != "" {
		return id
	}
	return record.DefaultID(it.Batch.ID, i)
}

// State of the record at index i.
func (it *Item) State(i int) record.State {
	if it.Outcomes != nil && it.Outcomes[i].Refusal != "" {
		return record.Refused
	}
	return it.Batch.State
}

// Selected returns the imports with these ids, or all where there are none.
func Selected(ctx context.Context, s Store, ids []record.ImportID) ([]store.Import, error) {
	if len(ids) == 0 {
		all, err := s.Imports(ctx)
		if err != nil {
			return nil, fmt.Errorf("list the imports: %w", err)
		}
		return all, nil
	}
	var out []store.Import
	for _, id := range ids {
		im, err := s.Import(ctx, id)
		if err != nil {
			return nil, fmt.Errorf("read import %s: %w", id, err)
		}
		out = append(out, im)
	}
	return out, nil
}

// Walk calls f for every batch of these imports, in order. Batches are read
// ahead; f is never called twice at once. Its memory does not grow with their
// number. A batch that is missing although its import is done is an error.
func Walk(ctx context.Context, s Store, imports []store.Import, f func(Item) error) error {
	return WalkOver(ctx, s, imports, errMissing, f)
}

func errMissing(id record.BatchID) error {
	return fmt.Errorf("batch %s is missing, although its import is done: %w", id, store.ErrNotFound)
}

// WalkOver is Walk for who goes on past batches that are missing although their
// import is done: missing is called for each, in its place of the order.
func WalkOver(ctx context.Context, s Store, imports []store.Import, missing func(record.BatchID) error, f func(Item) error) error {
	keys := newKeyCache(s)
	return walkAll(ctx, imports, missing, f, func(ctx context.Context, im store.Import, id record.BatchID) place {
		return read(ctx, s, keys, im, id)
	})
}

// Controls calls f for the control item of every batch of these imports, as Walk
// does, and reads nothing else.
func Controls(ctx context.Context, s Store, imports []store.Import, f func(*store.Batch) error) error {
	return walkAll(ctx, imports, errMissing, func(it Item) error { return f(&it.Batch) },
		func(ctx context.Context, im store.Import, id record.BatchID) place {
			return readControl(ctx, s, im, id)
		})
}

func walkAll(ctx context.Context, imports []store.Import, missing func(record.BatchID) error, f func(Item) error,
	read func(context.Context, store.Import, record.BatchID) place,
) error {
	for _, im := range imports {
		w := walk{im: im, read: read, missing: missing, f: f, queue: make(chan chan place, ahead)}
		if err := w.run(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Batch reads one batch of an import as Walk does. store.ErrNotFound.
func Batch(ctx context.Context, s Store, im store.Import, id record.BatchID) (Item, error) {
	p := read(ctx, s, newKeyCache(s), im, id)
	if p.err == nil && !p.found {
		p.err = fmt.Errorf("read batch %s: %w", id, store.ErrNotFound)
	}
	return p.item, p.err
}

// place is what becomes of one batch number: an item, nothing there, or a store
// that failed.
type place struct {
	item  Item
	found bool
	err   error
}

// walk is that of one import.
type walk struct {
	im      store.Import
	read    func(context.Context, store.Import, record.BatchID) place
	missing func(record.BatchID) error
	f       func(Item) error
	queue   chan chan place // in order; its length bounds what is read ahead
}

// run ends the reads that are under way as soon as nobody needs them.
func (w *walk) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var reads sync.WaitGroup
	reads.Go(func() {
		defer close(w.queue)
		for n := 0; w.im.State != store.ImportDone || n < w.im.Batches; n++ {
			slot := make(chan place, 1)
			select {
			case w.queue <- slot:
			case <-ctx.Done():
				return
			}
			reads.Go(func() { slot <- w.read(ctx, w.im, record.MakeBatchID(w.im.ID, n)) })
		}
	})
	err := w.consume()
	if err == nil {
		err = ctx.Err()
	}
	cancel()
	reads.Wait()
	return err
}

// consume hands the batches on in order, up to the first error.
func (w *walk) consume() error {
	end := tail{im: w.im, fewest: w.im.BatchSize}
	n := 0
	for slot := range w.queue {
		p := <-slot
		var err error
		switch {
		case p.err != nil:
			err = p.err
		case p.found:
			end.found(p.item.Batch.Count)
			err = w.f(p.item)
		case w.im.State == store.ImportDone:
			err = w.missing(record.MakeBatchID(w.im.ID, n))
		case end.reached(n):
			return nil
		}
		if err != nil {
			return err
		}
		n++
	}
	return nil
}

// tail finds the end of an import that is not DONE, whose number of batches
// nobody wrote down. An open one has gaps of less than store.ImportWindow. An
// aborted one keeps what was claimed, however far apart, so its end is where its
// records would all have found a place in batches like those that are there.
type tail struct {
	im     store.Import
	fewest int // records in one batch that is not the last
	last   int // records of the newest batch found, 0 before the first
	gap    int
}

func (t *tail) found(count int) {
	if t.last > 0 {
		t.fewest = min(t.fewest, t.last) // another one came after it
	}
	t.last, t.gap = count, 0
}

// reached reports whether after the missing batch n no other can be.
func (t *tail) reached(n int) bool {
	t.gap++
	if t.gap <= store.ImportWindow {
		return false
	}
	return t.im.State != store.ImportAborted || n >= t.im.Records/max(t.fewest, 1)
}

// readControl fetches the control item of one batch.
func readControl(ctx context.Context, s Store, im store.Import, id record.BatchID) place {
	b, err := s.Batch(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		return place{}
	}
	if err != nil {
		return place{err: fmt.Errorf("read batch %s: %w", id, err)}
	}
	it := Item{Batch: b}
	if b.ID != id || b.ImportID != im.ID || b.Kind != im.Kind || b.Pool != im.Pool || !im.KeyID.IsZero() && b.KeyID != im.KeyID {
		it.Problem = fmt.Errorf("batch %s is not as its import asked for it", id)
		it.Batch.ID = id
	}
	return place{item: it, found: true}
}

// read fetches one batch. Only a failing store is an error; what is wrong with
// the batch itself is its Problem.
func read(ctx context.Context, s Store, keys *keyCache, im store.Import, id record.BatchID) place {
	p := readControl(ctx, s, im, id)
	if !p.found {
		return p
	}
	parts, err := p.item.fetch(ctx, s, keys)
	if err != nil {
		return place{err: err}
	}
	problems := append([]error{p.item.Problem}, parts.problems[:]...)
	p.item.Problem = errors.Join(append(problems, p.item.decode(parts))...)
	return p
}

// parts of a batch as the store has them.
type parts struct {
	payload, result []byte
	problems        [allParts]error // missing or malformed
}

// fetch reads what belongs to the control item, side by side.
func (it *Item) fetch(ctx context.Context, s Store, keys *keyCache) (*parts, error) {
	b, p := &it.Batch, &parts{}
	g, ctx := errgroup.WithContext(ctx)
	fetch := func(i int, what string, get func() error) {
		g.Go(func() error {
			err := get()
			switch {
			case errors.Is(err, store.ErrNotFound):
				p.problems[i] = fmt.Errorf("the %s of batch %s is missing", what, b.ID)
			case errors.Is(err, errKey):
				p.problems[i] = fmt.Errorf("the %s of batch %s: %w", what, b.ID, err)
			case err != nil:
				return fmt.Errorf("read the %s of batch %s: %w", what, b.ID, err)
			}
			return nil
		})
	}
	fetch(payloadPart, "payload", func() (err error) { p.payload, err = s.Payload(ctx, b.ID); return err })
	if b.State == record.Signed {
		fetch(resultPart, "result", func() (err error) { p.result, err = s.Result(ctx, b.ID); return err })
	}
	if !b.KeyID.IsZero() {
		fetch(keyPart, "key", func() (err error) {
			it.Key, err = keys.get(ctx, b.KeyID)
			if errors.Is(err, store.ErrNotFound) {
				return nil // a lost key is no problem of what it did not sign
			}
			return err
		})
	}
	if b.Receipt.Seq != 0 {
		fetch(receiptPart, "receipt", func() error {
			r, err := s.Receipt(ctx, b.Receipt)
			it.Receipt = r.Signed
			return err
		})
	}
	return p, g.Wait() //nolint:wrapcheck // wrapped above
}

// decode fills Records and Outcomes, so that each has Batch.Count places or is
// nil, and a signature comes with its key.
func (it *Item) decode(p *parts) error {
	if p.payload != nil {
		rs, err := record.DecodePayload(p.payload)
		if err != nil || len(rs) != it.Batch.Count {
			return fmt.Errorf("the payload of batch %s is malformed: %w", it.Batch.ID, record.ErrSegment)
		}
		it.Records = rs
	}
	if p.result == nil {
		return nil
	}
	sigLen, out, err := record.DecodeResult(p.result)
	if err != nil || len(out) != it.Batch.Count {
		return fmt.Errorf("the result of batch %s is malformed: %w", it.Batch.ID, record.ErrSegment)
	}
	it.Outcomes = out
	if !slices.ContainsFunc(out, func(o record.Outcome) bool { return o.Refusal == "" }) {
		return nil
	}
	if it.Key == nil && p.problems[keyPart] != nil {
		return nil //nolint:nilerr // it is there, and that it is bad has been said
	}
	if it.Key == nil {
		return fmt.Errorf("the key that signed batch %s is missing", it.Batch.ID)
	}
	if sigLen != it.Key.Algorithm.SignatureLen() {
		return fmt.Errorf("the result of batch %s is not of its key's algorithm: %w", it.Batch.ID, record.ErrSegment)
	}
	return nil
}
