package dynamo

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

// AbortImport implements store.Intake. No batch can be added to an aborted
// import, so its batches can be counted then. Their number is noted before the
// first is deleted: afterwards gaps would look like the end.
func (s *Store) AbortImport(ctx context.Context, id record.ImportID) (int, error) {
	const what = "abort import"
	there, err := s.markAborted(ctx, what, id)
	if err != nil {
		return 0, err
	}
	r := reader{m: there}
	end := r.int(aEnd)
	if _, noted := there[aEnd]; !noted {
		if end, err = s.countBatches(ctx, what, id); err == nil {
			end, err = s.noteEnd(ctx, what, id, end)
		}
	}
	if err = errors.Join(r.err, err); err != nil {
		return 0, partly(ctx, what, err)
	}
	kept, err := s.deleteUnclaimed(ctx, what, id, end)
	if err != nil {
		return 0, partly(ctx, what, err)
	}
	return kept, nil
}

// markAborted writes the tombstone where the import is OPEN and returns the item.
func (s *Store) markAborted(ctx context.Context, what string, id record.ImportID) (item, error) {
	aborted := item{aState: text(string(store.ImportAborted))}
	old, err := s.update(ctx, what, become(tableImports, importKey(id), aborted, stateIs(store.ImportOpen), aState))
	if err != nil || old == nil {
		return aborted, err
	}
	there, err := readImport(old)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s: %w", what, err)
	case there.State == "":
		return nil, fmt.Errorf("%s: %w", what, store.ErrNotFound)
	case there.State != store.ImportAborted:
		return nil, fmt.Errorf("%s: %w", what, store.ErrTaken)
	}
	return old, nil
}

// noteEnd notes end where none is noted and returns the one that is: whoever
// counted first saw most.
func (s *Store) noteEnd(ctx context.Context, what string, id record.ImportID, end int) (int, error) {
	w := same(item{aState: text(string(store.ImportAborted))}, aState, aEnd)
	old, err := s.update(ctx, what, become(tableImports, importKey(id), item{aEnd: number(end)}, w, aEnd))
	if err != nil || old == nil {
		return end, err
	}
	r := reader{m: old}
	return r.int(aEnd), r.err
}

// countBatches finds the number after the last batch or payload of an import.
// They are written out of order by less than the import window.
func (s *Store) countBatches(ctx context.Context, what string, id record.ImportID) (end int, err error) {
	for n := 0; n < end+store.ImportWindow; n++ {
		batch := record.MakeBatchID(id, n)
		_, err := s.get(ctx, what, tableBatches, batchKey(batch), aBatch)
		if errors.Is(err, store.ErrNotFound) {
			_, err = s.get(ctx, what, tableSegments, segmentKey(batch, partPayload), aBatch)
		}
		switch {
		case err == nil:
			end = n + 1
		case !errors.Is(err, store.ErrNotFound):
			return 0, err
		}
	}
	return end, nil
}

// deleteUnclaimed deletes what nobody has claimed and counts the rest.
func (s *Store) deleteUnclaimed(ctx context.Context, what string, id record.ImportID, end int) (int, error) {
	fresh := batchItem(store.Batch{State: record.Ready})
	unclaimed := same(fresh, aState, aFence).orAbsent(aBatch)
	var kept atomic.Int64
	err := inParallel(end, func(n int) error {
		batch := record.MakeBatchID(id, n)
		r, err := s.transact(ctx, what,
			s.txDelete(tableBatches, batchKey(batch), unclaimed),
			s.txDelete(tableSegments, segmentKey(batch, partPayload), when{}))
		if err == nil && r != nil {
			kept.Add(1)
		}
		return err
	})
	return int(kept.Load()), err
}
