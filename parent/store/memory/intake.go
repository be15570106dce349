package memory

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

// OpenImport implements store.Intake.
func (s *Store) OpenImport(ctx context.Context, i store.Import) (store.Import, error) {
	if err := ctx.Err(); err != nil {
		return store.Import{}, fmt.Errorf("open import: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old, found := s.imports[i.ID]
	switch {
	case !found:
		i.State = store.ImportOpen
		i.Duplicates, i.Batches, i.DoneAt = 0, 0, time.Time{}
		i.CreatedAt = plain(i.CreatedAt)
		s.imports[i.ID] = i
		return i, nil
	case old.State == store.ImportAborted:
		return store.Import{}, fmt.Errorf("open import: %w", store.ErrAborted)
	case !i.SameInput(&old):
		return store.Import{}, fmt.Errorf("open import: %w", store.ErrDiffers)
	}
	return old, nil
}

// ReserveRecord implements store.Intake.
func (s *Store) ReserveRecord(ctx context.Context, ref store.RecordRef, over *store.RecordRef) (store.RecordRef, error) {
	if err := ctx.Err(); err != nil {
		return store.RecordRef{}, fmt.Errorf("reserve record: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	holder, found := s.records[ref.ID]
	if found && (over == nil || holder != *over) {
		return holder, nil
	}
	s.records[ref.ID] = ref
	return ref, nil
}

// PutPayload implements store.Intake.
func (s *Store) PutPayload(ctx context.Context, id record.BatchID, payload []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("put payload: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, found := s.payloads[id]; !found {
		s.payloads[id] = bytes.Clone(payload)
	}
	return bytes.Clone(s.payloads[id]), nil
}

// PutBatch implements store.Intake.
func (s *Store) PutBatch(ctx context.Context, b store.Batch) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("put batch: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	i, known := s.imports[b.ImportID]
	old, found := s.batches[b.ID]
	switch {
	case !known:
		return fmt.Errorf("put batch: import: %w", store.ErrNotFound)
	case i.State == store.ImportAborted:
		return fmt.Errorf("put batch: %w", store.ErrAborted)
	case found && b.SameImported(&old):
		return nil
	case found:
		return fmt.Errorf("put batch: %w", store.ErrDiffers)
	case i.State != store.ImportOpen:
		return fmt.Errorf("put batch: import is done: %w", store.ErrTaken)
	}
	fresh := b.Imported()
	s.write(&fresh, nil)
	return nil
}

// FinishImport implements store.Intake.
func (s *Store) FinishImport(ctx context.Context, i store.Import) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("finish import: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old, found := s.imports[i.ID]
	switch {
	case !found:
		return fmt.Errorf("finish import: %w", store.ErrNotFound)
	case old.State == store.ImportAborted:
		return fmt.Errorf("finish import: %w", store.ErrAborted)
	case old.State == store.ImportDone && !i.SameTotals(&old):
		return fmt.Errorf("finish import: %w", store.ErrDiffers)
	case old.State == store.ImportDone:
		return nil
	}
	old.State, old.DoneAt = store.ImportDone, plain(i.DoneAt)
	old.Records, old.Duplicates, old.Batches = i.Records, i.Duplicates, i.Batches
	s.imports[i.ID] = old
	return nil
}

// AbortImport implements store.Intake.
func (s *Store) AbortImport(ctx context.Context, id record.ImportID) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, fmt.Errorf("abort import: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	i, found := s.imports[id]
	switch {
	case !found:
		return 0, fmt.Errorf("abort import: %w", store.ErrNotFound)
	case i.State == store.ImportDone:
		return 0, fmt.Errorf("abort import: %w", store.ErrTaken)
	}
	i.State = store.ImportAborted
	s.imports[id] = i
	return s.deleteUnclaimed(id), nil
}

// deleteUnclaimed deletes what nobody has claimed and counts the rest.
func (s *Store) deleteUnclaimed(id record.ImportID) (kept int) {
	for _, name := range slices.Sorted(maps.Keys(s.batches)) {
		b := s.batches[name]
		switch {
		case b.ImportID != id:
		case b.State == record.Ready && b.Fence == 0:
			delete(s.batches, name)
			s.index.change(func() { s.index.batch(&b, nil) })
		default:
			kept++
		}
	}
	for name := range s.payloads {
		owner, _, err := name.Split()
		if _, used := s.batches[name]; err == nil && owner == id && !used {
			delete(s.payloads, name)
		}
	}
	return kept
}

// Import implements store.Intake.
func (s *Store) Import(ctx context.Context, id record.ImportID) (store.Import, error) {
	return get(ctx, s, s.imports, id, "import")
}

// Imports implements store.Intake.
func (s *Store) Imports(ctx context.Context) ([]store.Import, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("list imports: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []store.Import
	for _, id := range slices.Sorted(maps.Keys(s.imports)) {
		all = append(all, s.imports[id])
	}
	return all, nil
}

// Record implements store.Intake.
func (s *Store) Record(ctx context.Context, id string) (store.RecordRef, error) {
	return get(ctx, s, s.records, id, "record")
}

// Requeue implements store.Intake.
func (s *Store) Requeue(ctx context.Context, id record.BatchID, now time.Time) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("requeue batch: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b, found := s.batches[id]
	switch {
	case !found:
		return fmt.Errorf("requeue batch: %w", store.ErrNotFound)
	case b.RequeuedAt(now):
		return nil
	case b.State != record.Quarantined:
		return fmt.Errorf("requeue batch: %w", store.ErrTaken)
	}
	requeued := b.Requeued(now)
	s.write(&requeued, nil)
	return nil
}
