package lease

import (
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

// MaxWatched bounds the memory of a Watch: claims of others in flight at once.
const MaxWatched = 1 << 14

// Watch remembers when held batches were first seen under their fences, on this
// process's own clock. It is for one goroutine.
type Watch struct {
	seen map[record.BatchID]sight
}

type sight struct {
	fence, key record.Fence
	since      time.Duration // the first read had been answered by then
	lease      time.Duration // as it stands in the items
	looked     time.Duration // newest answer
}

// NewWatch returns a watch that has seen nothing.
func NewWatch() *Watch { return &Watch{seen: map[record.BatchID]sight{}} }

// Saw takes consistent reads of a held batch and of the key it holds, sent after
// asked and answered before answered. It reports whether the lease ran out under
// our eyes: the same fences, for the lease in the items, between the first
// answer and the newest question.
func (w *Watch) Saw(b *store.Batch, l *store.Lease, asked, answered time.Duration) bool {
	if b.State != record.Claimed || l.KeyID != b.KeyID || !b.HoldsKey(l) {
		delete(w.seen, b.ID) // read between two claims, or not held at all
		return false
	}
	first, ok := w.seen[b.ID]
	if !ok || first.fence != b.Fence || first.key != b.KeyFence {
		w.start(b.ID, sight{b.Fence, b.KeyFence, answered, max(b.Lease, l.Lease), answered})
		return false
	}
	first.looked = answered
	w.seen[b.ID] = first
	return asked-first.since >= first.lease
}

// start makes room where there is none: whatever should have been looked at long
// ago was committed or taken meanwhile. What finds no room is watched later.
func (w *Watch) start(id record.BatchID, s sight) {
	if len(w.seen) >= MaxWatched {
		for old, o := range w.seen {
			if s.since-o.since > 2*o.lease {
				delete(w.seen, old)
			}
		}
	}
	if len(w.seen) < MaxWatched {
		w.seen[id] = s
	}
}

// Waits reports whether it is too early to look at a batch again: a tenth of its
// lease has not gone by, in which its holder may have given it back, nor all of it.
func (w *Watch) Waits(id record.BatchID, now time.Duration) bool {
	s, ok := w.seen[id]
	return ok && now-s.since < s.lease && now-s.looked < s.lease/10
}

// Watched returns for how long a batch has been seen under its newest fences.
func (w *Watch) Watched(id record.BatchID, now time.Duration) time.Duration {
	if s, ok := w.seen[id]; ok {
		return now - s.since
	}
	return 0
}

// Forget a batch: it is signed, or ours.
func (w *Watch) Forget(id record.BatchID) { delete(w.seen, id) }
