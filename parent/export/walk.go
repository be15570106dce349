// Package export reads what imports have come to and prints it: records and
// batches as JSON Lines. It writes nothing to the tables and judges nothing.
package export

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/parent/store"
)

const (
	ahead     = 16     // batches that are read while earlier ones are handled
	keptKeys  = 10_000 // public keys kept at a time, so a large pool needs no memory
	readAlone = 4      // reads in flight per batch at most
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
// number.
func Walk(ctx context.Context, s Store, imports []store.Import, f func(Item) error) error {
	for _, im := range imports {
		if err := walkImport(ctx, s, im, f); err != nil {
			return err
		}
	}
	return nil
}

// place is what becomes of one batch number: an item, or nothing there.
type place struct {
	item  Item
	found bool
}

func walkImport(ctx context.Context, s Store, im store.Import, f func(Item) error) error {
	g, ctx := errgroup.WithContext(ctx)
	keys := newKeyCache(s)
	queue := make(chan chan place, ahead)
	stop := make(chan struct{}) // closed when an unfinished import has no more batches
	g.Go(func() error {
		defer close(queue)
		for n := 0; im.State != store.ImportDone || n < im.Batches; n++ {
			slot := make(chan place, 1)
			select {
			case queue <- slot:
			case <-stop:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
			g.Go(func() error {
				p, err := read(ctx, s, keys, record.MakeBatchID(im.ID, n))
				slot <- p
				return err
			})
		}
		return nil
	})
	err := consume(ctx, im, queue, stop, f)
	if errWait := g.Wait(); err == nil || errors.Is(err, context.Canceled) && errWait != nil {
		err = errWait
	}
	return err
}

// consume hands the batches on in order. An unfinished or aborted import has
// gaps; store.ImportWindow of them in a row are its end.
func consume(ctx context.Context, im store.Import, queue <-chan chan place, stop chan struct{}, f func(Item) error) (err error) {
	missing := 0
	stopped := false
	for slot := range queue {
		p := <-slot
		switch {
		case err != nil || stopped || ctx.Err() != nil: // drain
		case p.found:
			missing = 0
			err = f(p.item)
		case im.State == store.ImportDone:
			err = fmt.Errorf("a batch of import %s is missing, although the import is done: %w", im.ID, store.ErrNotFound)
		default:
			missing++
		}
		if !stopped && (err != nil || missing > store.ImportWindow) {
			stopped = true
			close(stop)
		}
	}
	return err
}

// read fetches one batch. Only a failing store is an error; what is wrong with
// the batch itself is its Problem.
func read(ctx context.Context, s Store, keys *keyCache, id record.BatchID) (place, error) {
	b, err := s.Batch(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		return place{}, nil
	}
	if err != nil {
		return place{}, fmt.Errorf("read batch %s: %w", id, err)
	}
	it := Item{Batch: b}
	var payload, result []byte
	var problems [readAlone]error
	g, ctx := errgroup.WithContext(ctx)
	fetch := func(i int, what string, get func() error) {
		g.Go(func() error {
			err := get()
			if errors.Is(err, store.ErrNotFound) {
				problems[i] = fmt.Errorf("the %s of batch %s is missing", what, id)
				return nil
			}
			if errors.Is(err, sealed.ErrMalformed) { // edited: a finding about this batch, not the end of the walk
				problems[i] = fmt.Errorf("the %s of batch %s: %w", what, id, err)
				return nil
			}
			if err != nil {
				return fmt.Errorf("read the %s of batch %s: %w", what, id, err)
			}
			return nil
		})
	}
	fetch(0, "payload", func() (err error) { payload, err = s.Payload(ctx, id); return err })
	if b.State == record.Signed {
		fetch(1, "result", func() (err error) { result, err = s.Result(ctx, id); return err })
	}
	if !b.KeyID.IsZero() {
		fetch(2, "key", func() (err error) { it.Key, err = keys.get(ctx, b.KeyID); return err })
	}
	if b.Receipt.Seq != 0 {
		fetch(3, "receipt", func() error {
			r, err := s.Receipt(ctx, b.Receipt)
			it.Receipt = r.Signed
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return place{}, err
	}
	if b.State == record.Signed && b.Refused == b.Count {
		problems[2] = nil // a lost key is why they were refused
	}
	it.Problem = errors.Join(append(problems[:], it.decode(payload, result))...)
	return place{item: it, found: true}, nil
}

// decode fills Records and Outcomes, so that each has Batch.Count places or is nil.
func (it *Item) decode(payload, result []byte) error {
	if payload != nil {
		rs, err := record.DecodePayload(payload)
		if err != nil || len(rs) != it.Batch.Count {
			return fmt.Errorf("the payload of batch %s is malformed: %w", it.Batch.ID, record.ErrSegment)
		}
		it.Records = rs
	}
	if result != nil {
		_, out, err := record.DecodeResult(result)
		if err != nil || len(out) != it.Batch.Count {
			return fmt.Errorf("the result of batch %s is malformed: %w", it.Batch.ID, record.ErrSegment)
		}
		it.Outcomes = out
	}
	return nil
}
