package memory

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

// Ready implements store.Queue.
func (s *Store) Ready(ctx context.Context, shard int, until time.Time, limit int, page string) (store.ReadyPage, error) {
	if err := ctx.Err(); err != nil {
		return store.ReadyPage{}, fmt.Errorf("query ready batches: %w", err)
	}
	after, err := parsePage(page)
	if err != nil {
		return store.ReadyPage{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	index := s.index.readyShard(shard)
	index.sort()
	rest := index.entries
	if i, found := slices.BinarySearchFunc(rest, after, compareReady); found {
		rest = rest[i+1:]
	} else {
		rest = rest[i:]
	}
	var p store.ReadyPage
	for i, e := range rest {
		if e.visible.After(until) {
			break
		}
		if i == limit {
			p.Next = rest[i-1].page()
			break
		}
		p.Batches = append(p.Batches, e.id)
	}
	return p, nil
}

func (e readyEntry) page() string {
	return strconv.FormatInt(e.visible.UnixNano(), 10) + "/" + string(e.id)
}

func parsePage(page string) (readyEntry, error) {
	if page == "" {
		return readyEntry{}, nil
	}
	at, id, _ := strings.Cut(page, "/")
	ns, err := strconv.ParseInt(at, 10, 64)
	if err != nil {
		return readyEntry{}, fmt.Errorf("query ready batches: malformed page token")
	}
	return readyEntry{time.Unix(0, ns).UTC(), record.BatchID(id)}, nil
}

// CountReady implements store.Queue.
func (s *Store) CountReady(ctx context.Context, shard int) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, fmt.Errorf("count ready batches: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.index.readyShard(shard).entries), nil
}

// Batch implements store.Queue.
func (s *Store) Batch(ctx context.Context, id record.BatchID) (store.Batch, error) {
	b, err := get(ctx, s, s.batches, id, "batch")
	return b.Clone(), err
}

// Payload implements store.Queue.
func (s *Store) Payload(ctx context.Context, id record.BatchID) ([]byte, error) {
	b, err := get(ctx, s, s.payloads, id, "payload")
	return bytes.Clone(b), err
}

// get reads one item. The caller copies what it shares with the map.
func get[K comparable, V any](ctx context.Context, s *Store, from map[K]V, key K, what string) (V, error) {
	var none V
	if err := ctx.Err(); err != nil {
		return none, fmt.Errorf("read %s: %w", what, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := from[key]
	if !ok {
		return none, fmt.Errorf("read %s: %w", what, store.ErrNotFound)
	}
	return v, nil
}

// Idle implements store.Leases.
func (s *Store) Idle(ctx context.Context, pool string, shard, limit int) ([]store.IdleKey, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("query idle keys: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	index := s.index.idleShard(idleShard{pool, shard})
	index.sort()
	return slices.Clone(index.entries[:min(limit, len(index.entries))]), nil
}

// Lease implements store.Leases.
func (s *Store) Lease(ctx context.Context, id record.KeyID) (store.Lease, error) {
	return get(ctx, s, s.leases, id, "lease")
}

// Claim implements store.Leases.
func (s *Store) Claim(ctx context.Context, c store.Claim) (store.Batch, error) {
	if err := ctx.Err(); err != nil {
		return store.Batch{}, fmt.Errorf("claim batch: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b, found := s.batches[c.Batch.ID]
	if found && c.Made(&b) {
		return b.Clone(), nil
	}
	l, foundKey := s.leases[c.KeyID]
	if !found || !foundKey || !c.Fits(&b) || !c.FitsKey(&l) {
		return store.Batch{}, fmt.Errorf("claim batch: %w", store.ErrTaken)
	}
	claimed := c.Claimed(l.Used)
	taken := claimed.Taken()
	s.write(&claimed, &taken)
	return normal(claimed), nil
}

// Commit implements store.Leases.
func (s *Store) Commit(ctx context.Context, c store.Commit) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("commit batch: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.batches[c.Batch.ID]
	result, written := s.results[c.Batch.ID]
	if written && c.Made(&b) && equal(result, c.Result) {
		return nil
	}
	l := s.leases[c.Batch.KeyID]
	if written || !c.Batch.Holds(&b) || !c.Batch.HoldsKey(&l) {
		return fmt.Errorf("commit batch: %w", store.ErrFenced)
	}
	s.results[c.Batch.ID] = bytes.Clone(c.Result)
	c.Batch = b // the caller's copy may be older than the newest crash
	signed, idle := c.Committed(), l.Idled()
	s.write(&signed, &idle)
	return nil
}

// Release implements store.Leases.
func (s *Store) Release(ctx context.Context, held store.Batch, e store.End) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("release batch: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.batches[held.ID]
	if held.ReleasedAs(e, &b) {
		return nil
	}
	l := s.leases[held.KeyID]
	if !held.Holds(&b) || !held.HoldsKey(&l) {
		return fmt.Errorf("release batch: %w", store.ErrFenced)
	}
	released, idle := b.Released(e), l.Idled()
	s.write(&released, &idle)
	return nil
}

// NoteCrash implements store.Leases.
func (s *Store) NoteCrash(ctx context.Context, held store.Batch, crashed []uint32) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("note a crash: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.batches[held.ID]
	if !held.Holds(&b) {
		return fmt.Errorf("note a crash: %w", store.ErrFenced)
	}
	b = b.Clone()
	b.Crashed = append(b.Crashed, crashed...)
	slices.Sort(b.Crashed)
	b.Crashed = slices.Compact(b.Crashed)
	s.write(&b, nil)
	return nil
}
