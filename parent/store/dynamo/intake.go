package dynamo

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/dynamodb"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

func importKey(id record.ImportID) item { return item{aImport: text(string(id))} }

// stateIs is the condition that an item is in a state.
func stateIs[S ~string](state S) when { return same(item{aState: text(string(state))}, aState) }

// OpenImport implements store.Intake.
func (s *Store) OpenImport(ctx context.Context, i store.Import) (store.Import, error) {
	const what = "open import"
	i.State = store.ImportOpen
	i.Duplicates, i.Batches, i.DoneAt = 0, 0, time.Time{}
	fresh := importItem(i)
	var a attempts
	old, err := s.putNoting(ctx, what, tableImports, fresh, absent(aImport), &a)
	if err != nil {
		return store.Import{}, err
	}
	if old == nil {
		return readImport(fresh)
	}
	there, err := readImport(old)
	switch {
	case err != nil:
		return store.Import{}, fmt.Errorf("%s: %w", what, err)
	case there.State == store.ImportAborted && i.SameInput(&there):
		return store.Import{}, a.refuse(what, store.ErrAborted) // it may be ours that somebody aborted
	case there.State == store.ImportAborted:
		return store.Import{}, fmt.Errorf("%s: %w", what, store.ErrAborted)
	case !i.SameInput(&there):
		return store.Import{}, fmt.Errorf("%s: %w", what, store.ErrDiffers)
	}
	return there, nil
}

// ReserveRecord implements store.Intake.
func (s *Store) ReserveRecord(ctx context.Context, ref store.RecordRef, over *store.RecordRef) (store.RecordRef, error) {
	const what = "reserve record"
	w := absent(aRecord)
	if over != nil {
		w = same(recordItem(*over), aBatch, aIndex, aHash).orAbsent(aRecord)
	}
	old, err := s.put(ctx, what, tableRecords, recordItem(ref), w)
	if err != nil {
		return store.RecordRef{}, err
	}
	if old == nil {
		return ref, nil
	}
	holder, err := readRecord(old)
	if err != nil {
		return store.RecordRef{}, fmt.Errorf("%s: %w", what, err)
	}
	return holder, nil
}

// PutPayload implements store.Intake.
func (s *Store) PutPayload(ctx context.Context, id record.BatchID, payload []byte) ([]byte, error) {
	const what = "put payload"
	segment := segmentKey(id, partPayload)
	segment[aData] = bytesValue(payload)
	old, err := s.putAbsent(ctx, what, tableSegments, aBatch, segment)
	if err != nil {
		return nil, err
	}
	if old == nil {
		return slices.Clone(payload), nil
	}
	r := reader{m: old}
	there := r.binary(aData)
	if r.err != nil {
		return nil, fmt.Errorf("%s: %w", what, r.err)
	}
	return there, nil
}

// PutBatch implements store.Intake.
func (s *Store) PutBatch(ctx context.Context, b store.Batch) error {
	const what = "put batch"
	r, err := s.transact(ctx, what,
		s.txPut(tableBatches, aBatch, batchItem(b.Imported())),
		s.txCheck(tableImports, importKey(b.ImportID), stateIs(store.ImportOpen)))
	if err != nil || r == nil {
		return err
	}
	there, err := s.batchNow(ctx, what, r[0], b.ID)
	if err != nil {
		return err
	}
	m, err := s.now(ctx, what, r[1], tableImports, importKey(b.ImportID))
	if err != nil {
		return err
	}
	of, err := readImport(m)
	switch {
	case err != nil:
	case of.State == "":
		err = store.ErrNotFound
	case of.State == store.ImportAborted:
		err = store.ErrAborted
	case b.SameImported(&there):
		return nil
	case there.State != "":
		err = store.ErrDiffers
	default: // the import is DONE
		err = store.ErrTaken
	}
	return fmt.Errorf("%s: %w", what, err)
}

// FinishImport implements store.Intake.
func (s *Store) FinishImport(ctx context.Context, i store.Import) error {
	const what = "finish import"
	i.State = store.ImportDone
	old, err := s.update(ctx, what, become(tableImports, importKey(i.ID), importItem(i), stateIs(store.ImportOpen),
		aState, aRecords, aDuplicates, aCount, aDoneAt))
	if err != nil || old == nil {
		return err
	}
	there, err := readImport(old)
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", what, err)
	case there.State == "":
		err = store.ErrNotFound
	case there.State == store.ImportAborted:
		err = store.ErrAborted
	case i.SameTotals(&there):
		return nil
	default:
		err = store.ErrDiffers
	}
	return fmt.Errorf("%s: %w", what, err)
}

// Import implements store.Intake.
func (s *Store) Import(ctx context.Context, id record.ImportID) (store.Import, error) {
	m, err := s.get(ctx, "read import", tableImports, importKey(id), "")
	if err != nil {
		return store.Import{}, err
	}
	return readImport(m)
}

// Imports implements store.Intake.
func (s *Store) Imports(ctx context.Context) ([]store.Import, error) {
	all, err := scan(ctx, s, "list imports", tableImports, readImport)
	slices.SortFunc(all, func(a, b store.Import) int { return strings.Compare(string(a.ID), string(b.ID)) })
	return all, err
}

// scan reads a whole small table.
func scan[T any](ctx context.Context, s *Store, what, table string, read func(item) (T, error)) ([]T, error) {
	var all []T
	err := s.scanPages(ctx, what, &dynamodb.ScanInput{TableName: s.table(table)}, func(page []item) error {
		for _, m := range page {
			v, err := read(m)
			if err != nil {
				return fmt.Errorf("%s: %w", what, err)
			}
			all = append(all, v)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return all, nil
}

// scanPages calls f for the pages of a table.
func (s *Store) scanPages(ctx context.Context, what string, in *dynamodb.ScanInput, f func([]item) error) error {
	consistent := true
	in.ConsistentRead, in.ReturnConsumedCapacity = &consistent, s.capacity
	pages := dynamodb.NewScanPaginator(s.client, in)
	for pages.HasMorePages() {
		out, err := pages.NextPage(ctx, s.observeAs(what))
		if err != nil {
			return readFault(what, err)
		}
		page := make([]item, len(out.Items))
		for i, m := range out.Items {
			page[i] = m
		}
		if err := f(page); err != nil {
			return err
		}
	}
	return nil
}

// Record implements store.Intake.
func (s *Store) Record(ctx context.Context, id string) (store.RecordRef, error) {
	m, err := s.get(ctx, "read record", tableRecords, item{aRecord: text(id)}, "")
	if err != nil {
		return store.RecordRef{}, err
	}
	return readRecord(m)
}

// Requeue implements store.Intake.
func (s *Store) Requeue(ctx context.Context, id record.BatchID, now time.Time) error {
	const what = "requeue batch"
	back := (&store.Batch{ID: id, State: record.Quarantined}).Requeued(now)
	var a attempts
	old, err := s.updateNoting(ctx, what, become(tableBatches, batchKey(id), batchItem(back), stateIs(record.Quarantined),
		aState, aAttempts, aCrashed, aReadyShard, aVisible), &a)
	if err != nil || old == nil {
		return err
	}
	there, err := readBatch(old)
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", what, err)
	case there.State == "":
		return fmt.Errorf("%s: %w", what, store.ErrNotFound)
	case there.RequeuedAt(now):
		return nil
	}
	return a.refuse(what, store.ErrTaken)
}
