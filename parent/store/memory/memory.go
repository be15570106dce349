// Package memory keeps everything that package store describes in this process,
// for tests and simulators. It refuses nothing that DynamoDB would take, forgets
// everything with the process, and answers the same calls in the same order with
// the same results.
package memory

import (
	"bytes"
	"sync"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

// Store is a store.Store in memory. It is safe for concurrent use.
type Store struct {
	mu       sync.Mutex
	imports  map[record.ImportID]store.Import
	batches  map[record.BatchID]store.Batch
	payloads map[record.BatchID][]byte
	results  map[record.BatchID][]byte
	records  map[string]store.RecordRef
	keys     map[record.KeyID]store.Key
	leases   map[record.KeyID]store.Lease
	keyrings map[string][]byte
	boots    map[record.BootID]store.Boot
	receipts map[lane][]store.Receipt // by seq
	index    *indexes
}

// lane is where receipts are in a row.
type lane struct {
	boot record.BootID
	lane uint32
}

var _ store.Store = (*Store)(nil)

// New returns an empty store.
func New() *Store {
	return &Store{
		imports:  map[record.ImportID]store.Import{},
		batches:  map[record.BatchID]store.Batch{},
		payloads: map[record.BatchID][]byte{},
		results:  map[record.BatchID][]byte{},
		records:  map[string]store.RecordRef{},
		keys:     map[record.KeyID]store.Key{},
		leases:   map[record.KeyID]store.Lease{},
		keyrings: map[string][]byte{},
		boots:    map[record.BootID]store.Boot{},
		receipts: map[lane][]store.Receipt{},
		index:    newIndexes(),
	}
}

// SetIndexLag makes Ready, CountReady and Idle miss the newest writes to batches
// and leases, this many of them. 0, where a store starts, misses none.
func (s *Store) SetIndexLag(writes int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.index.lag = writes
	s.index.settle()
}

// write puts a batch and a lease in one step. Either may be nil.
func (s *Store) write(b *store.Batch, l *store.Lease) {
	var oldBatch *store.Batch
	var oldLease *store.Lease
	if b != nil {
		if old, ok := s.batches[b.ID]; ok {
			oldBatch = &old
		}
		s.batches[b.ID] = normal(*b)
		after := s.batches[b.ID]
		b = &after
	}
	if l != nil {
		if old, ok := s.leases[l.KeyID]; ok {
			oldLease = &old
		}
		s.leases[l.KeyID] = *l
		after := *l
		l = &after
	}
	s.index.change(func() {
		if b != nil {
			s.index.batch(oldBatch, b)
		}
		if l != nil {
			s.index.lease(oldLease, l)
		}
	})
}

// normal is b as a database would give it back: times in UTC without a
// monotonic reading, nothing shared with the caller.
func normal(b store.Batch) store.Batch {
	b = b.Clone()
	for _, t := range []*time.Time{&b.VisibleAt, &b.ClaimedAt, &b.CommittedAt} {
		*t = plain(*t)
	}
	return b
}

func plain(t time.Time) time.Time {
	if t.IsZero() {
		return time.Time{}
	}
	return time.Unix(0, t.UnixNano()).UTC()
}

// equal compares public bytes: segments, receipts, sealed keys, documents.
func equal(a, b []byte) bool { return bytes.Equal(a, b) } //nolint:forbidigo // nothing secret is stored
