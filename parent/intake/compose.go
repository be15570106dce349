package intake

import (
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sync/errgroup"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/store"
)

// overhead is what a segment holds beside the bytes of its records, at most.
const overhead = 64

// composer cuts the input into batches. Payload segments are written one after
// the other: only so can a later run tell which input each of them took.
type composer struct {
	s       Store
	in      *spoolReader
	o       Options
	total   int             // records of the input
	dup     int             // records that a batch of some import holds already
	skipped []record.Record // input that an earlier run's segments passed over: looked at again at the end
}

// next composes one batch, reserves its ids and writes its payload segment.
// Where an earlier run wrote the segment, that decides what the batch holds.
// io.EOF: the input is used up.
func (c *composer) next(ctx context.Context, id record.BatchID) (store.Batch, error) {
	stored, err := c.s.Payload(ctx, id)
	if err == nil {
		return c.settle(id, nil, stored)
	}
	if !errors.Is(err, store.ErrNotFound) {
		return store.Batch{}, fmt.Errorf("look for the payload of batch %s: %w", id, err)
	}
	for {
		rs, err := c.take()
		if err != nil {
			return store.Batch{}, err
		}
		fresh, err := c.reserve(ctx, id, rs)
		if err != nil {
			return store.Batch{}, err
		}
		if len(fresh) < len(rs) { // some are duplicates: fill the batch up and try again
			c.dup += len(rs) - len(fresh)
			c.in.putBack(fresh...)
			continue
		}
		stored, err := c.s.PutPayload(ctx, id, record.EncodePayload(rs))
		if err != nil {
			return store.Batch{}, fmt.Errorf("write the payload of batch %s: %w", id, err)
		}
		return c.settle(id, rs, stored)
	}
}

// input returns the next record of the input and, after its end, once more what
// was skipped.
func (c *composer) input() (record.Record, error) {
	r, err := c.in.next()
	if errors.Is(err, io.EOF) && len(c.skipped) > 0 {
		c.in.putBack(c.skipped...)
		c.skipped = nil
		return c.in.next()
	}
	return r, err
}

// take returns the next records that fit one batch, by number and by the bytes
// of both segments.
func (c *composer) take() ([]record.Record, error) {
	payload, result := overhead, overhead
	var rs []record.Record
	for len(rs) < c.o.BatchSize {
		r, err := c.input()
		if errors.Is(err, io.EOF) && len(rs) > 0 {
			return rs, nil
		}
		if err != nil {
			return nil, err
		}
		payload += len(r.ID) + len(r.Payload) + 8
		result += c.o.SigLen
		if len(rs) > 0 && (payload > record.MaxSegmentLen || result > record.MaxSegmentLen) {
			c.in.putBack(r)
			return rs, nil
		}
		rs = append(rs, r)
	}
	return rs, nil
}

// settle lines the input up with the payload segment that is stored. rs is what
// was taken from the input for it; what the segment does not hold goes back.
func (c *composer) settle(id record.BatchID, rs []record.Record, stored []byte) (store.Batch, error) {
	kept, err := record.DecodePayload(stored)
	if err != nil {
		return store.Batch{}, fmt.Errorf("read the payload of batch %s: %w", id, err)
	}
	missed := 0 // since the last match; after all of the input the record is not in it
	for i := 0; i < len(kept); {
		if len(rs) == 0 {
			r, err := c.input()
			if err != nil && !errors.Is(err, io.EOF) {
				return store.Batch{}, err
			}
			if err != nil || missed > c.total {
				return store.Batch{}, fmt.Errorf("batch %s holds records that are not in the input: %w", id, refusal.ImportConflict)
			}
			rs = append(rs, r)
		}
		if sameRecord(rs[0], kept[i]) {
			i, missed = i+1, 0
		} else {
			c.skipped = append(c.skipped, rs[0])
			missed++
		}
		rs = rs[1:]
	}
	c.in.putBack(rs...)
	return control(c.o, id, kept), nil
}

func sameRecord(a, b record.Record) bool {
	return a.ID == b.ID && string(a.Payload) == string(b.Payload)
}

// reserve claims the ids of rs for the batch and returns the records that are
// not duplicates, in order.
func (c *composer) reserve(ctx context.Context, id record.BatchID, rs []record.Record) ([]record.Record, error) {
	dup := make([]bool, len(rs))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(reserveParallel)
	for i, r := range rs {
		if r.ID == "" {
			continue
		}
		g.Go(func() (err error) {
			ref := store.RecordRef{ID: r.ID, BatchID: id, Index: i, PayloadHash: PayloadHash(c.o.Kind, r.Payload)}
			dup[i], err = c.reserveOne(ctx, ref)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var fresh []record.Record
	for i, r := range rs {
		if !dup[i] {
			fresh = append(fresh, r)
		}
	}
	return fresh, nil
}

// reserveOne reports whether the record is a duplicate of one that is in a
// batch already. An id of another payload, and one that an unfinished import
// holds, are errors.
func (c *composer) reserveOne(ctx context.Context, ref store.RecordRef) (dup bool, err error) {
	var over *store.RecordRef
	for {
		holder, err := c.s.ReserveRecord(ctx, ref, over)
		if err != nil {
			return false, fmt.Errorf("reserve the id of record %d of batch %s: %w", ref.Index, ref.BatchID, err)
		}
		if holder == ref {
			return false, nil
		}
		free, err := c.free(ctx, holder)
		switch {
		case err != nil:
			return false, err
		case free:
			over = &holder
		case holder.PayloadHash != ref.PayloadHash:
			return false, fmt.Errorf("record id %q of the input is in batch %s: %w", ref.ID, holder.BatchID, refusal.RecordConflict)
		default:
			return true, nil
		}
	}
}

// free reports whether the holder's place was never filled and may be taken:
// its import was aborted, or is this one and cut its batches otherwise then. An
// unfinished import of another id is named in the error.
func (c *composer) free(ctx context.Context, holder store.RecordRef) (bool, error) {
	_, err := c.s.Batch(ctx, holder.BatchID)
	if err == nil {
		return false, nil
	}
	if !errors.Is(err, store.ErrNotFound) {
		return false, fmt.Errorf("look for batch %s: %w", holder.BatchID, err)
	}
	id, _, err := holder.BatchID.Split()
	if err != nil {
		return false, fmt.Errorf("the holder of a record id: %w", err)
	}
	if id == c.o.ImportID {
		return true, nil
	}
	im, err := c.s.Import(ctx, id)
	switch {
	case errors.Is(err, store.ErrNotFound), err == nil && im.State == store.ImportAborted:
		return true, nil
	case err != nil:
		return false, fmt.Errorf("look for import %s: %w", id, err)
	}
	return false, fmt.Errorf("a record of the input belongs to import %s: %w", id, refusal.ImportPending)
}
