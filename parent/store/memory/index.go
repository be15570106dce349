package memory

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

// readyEntry is a batch in the ready index.
type readyEntry struct {
	visible time.Time
	id      record.BatchID
}

func compareReady(a, b readyEntry) int {
	return cmp.Or(a.visible.Compare(b.visible), strings.Compare(string(a.id), string(b.id)))
}

func compareIdle(a, b store.IdleKey) int {
	return cmp.Or(cmp.Compare(a.Used, b.Used), slices.Compare(a.KeyID[:], b.KeyID[:]))
}

// ordered is a sorted slice that takes a million entries in any order: it sorts
// late, and both ends are cheap, which is where a least-recently-used index works.
type ordered[E any] struct {
	entries []E
	dirty   bool
	compare func(a, b E) int
}

func (o *ordered[E]) sort() {
	if o.dirty {
		slices.SortFunc(o.entries, o.compare)
		o.dirty = false
	}
}

func (o *ordered[E]) add(e E) {
	if n := len(o.entries); n > 0 && o.compare(o.entries[n-1], e) > 0 {
		o.dirty = true
	}
	o.entries = append(o.entries, e)
}

func (o *ordered[E]) remove(e E) {
	o.sort()
	i, found := slices.BinarySearchFunc(o.entries, e, o.compare)
	switch {
	case !found:
	case i == 0:
		o.entries = o.entries[1:]
	default:
		o.entries = slices.Delete(o.entries, i, i+1)
	}
}

// idleShard names a partition of the idle index.
type idleShard struct {
	pool  string
	shard int
}

// indexes are the ready and the idle index. Changes reach them late by a number
// of writes, as those of DynamoDB's indexes may.
type indexes struct {
	ready map[int]*ordered[readyEntry]
	idle  map[idleShard]*ordered[store.IdleKey]

	lag     int
	pending []func() // oldest first
}

func newIndexes() *indexes {
	return &indexes{ready: map[int]*ordered[readyEntry]{}, idle: map[idleShard]*ordered[store.IdleKey]{}}
}

// change queues one write's changes and applies those that are due.
func (x *indexes) change(f func()) {
	x.pending = append(x.pending, f)
	x.settle()
}

func (x *indexes) settle() {
	for len(x.pending) > x.lag {
		x.pending[0]()
		x.pending = x.pending[1:]
	}
}

func (x *indexes) readyShard(shard int) *ordered[readyEntry] {
	if x.ready[shard] == nil {
		x.ready[shard] = &ordered[readyEntry]{compare: compareReady}
	}
	return x.ready[shard]
}

func (x *indexes) idleShard(s idleShard) *ordered[store.IdleKey] {
	if x.idle[s] == nil {
		x.idle[s] = &ordered[store.IdleKey]{compare: compareIdle}
	}
	return x.idle[s]
}

// batch moves a batch from where before was to where after is; either may be nil.
func (x *indexes) batch(before, after *store.Batch) {
	if before != nil {
		if shard, in := before.Shard(); in {
			x.readyShard(shard).remove(readyEntry{before.VisibleAt, before.ID})
		}
	}
	if after != nil {
		if shard, in := after.Shard(); in {
			x.readyShard(shard).add(readyEntry{after.VisibleAt, after.ID})
		}
	}
}

// lease moves a key from where before was to where after is; before may be nil.
func (x *indexes) lease(before, after *store.Lease) {
	if before != nil && before.Idle() {
		x.idleShard(idleShardOf(before)).remove(idleKey(before))
	}
	if after.Idle() {
		x.idleShard(idleShardOf(after)).add(idleKey(after))
	}
}

func idleShardOf(l *store.Lease) idleShard {
	return idleShard{l.Pool, store.IdleShard(l.KeyID)}
}

func idleKey(l *store.Lease) store.IdleKey {
	return store.IdleKey{KeyID: l.KeyID, Fence: l.Fence, Used: l.Used}
}
