// Package lease decides which key is used next and which held key may be taken
// over. It writes nothing, loads no pool as a whole, and calls no lease over that
// it has not watched running out itself.
package lease

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

const (
	perShard     = 16               // keys asked of each shard: 256 a fill, so a fill is rare
	maxConflicts = 4                // lost races after which the window is filled anew
	indexLag     = 10 * time.Second // how long our own knowledge of a key goes before the index
)

// Index lists idle keys of one shard of a pool, least recently used first. It
// may lag behind. store.Leases is one.
type Index interface {
	Idle(ctx context.Context, pool string, shard, limit int) ([]store.IdleKey, error)
}

// Window holds the least recently used idle keys of one pool: the merged heads
// of its shards. It is exact for what this process knows, and as fresh as the
// index for what others did. Its methods may be called from several goroutines,
// but Next from one at a time.
type Window struct {
	index   Index
	pool    string
	elapsed func() time.Duration
	refresh time.Duration // age after which keys used since the fill are not trusted to be next

	mu        sync.Mutex
	idle      []store.IdleKey // by stamp, then id
	bound     uint64          // a key with a higher stamp may not be next: some shard has more
	highest   uint64          // stamp seen in this pool
	horizon   uint64          // highest at the newest fill
	filled    time.Duration   // when that was
	conflicts int             // since then
	own       map[record.KeyID]knowledge
}

// knowledge is what this process did to a key or learnt by a consistent read.
type knowledge struct {
	key  store.IdleKey
	idle bool
	at   time.Duration
}

// olderThan an entry of the index: others used the key since, or gave it back
// under the very fence under which we knew it to be held. A key is held under a
// fence before it is idle under it, never after.
func (o knowledge) olderThan(k store.IdleKey) bool {
	return o.key.Fence < k.Fence || o.key.Fence == k.Fence && !o.idle
}

// NewWindow returns an empty window, which fills itself. elapsed is the time
// since some moment and never goes back.
func NewWindow(index Index, pool string, elapsed func() time.Duration, refresh time.Duration) *Window {
	return &Window{index: index, pool: pool, elapsed: elapsed, refresh: refresh, own: map[record.KeyID]knowledge{}}
}

// Next takes the least recently used idle key out of the window. It returns
// false where the pool has none.
func (w *Window) Next(ctx context.Context) (store.IdleKey, bool, error) {
	if w.stale() {
		if err := w.fill(ctx); err != nil {
			return store.IdleKey{}, false, err
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.idle) == 0 {
		return store.IdleKey{}, false, nil
	}
	k := w.idle[0]
	w.idle = w.idle[1:]
	return k, true, nil
}

// Return says that k is idle: this process gave it back, did not claim it after
// all, or read so consistently.
func (w *Window) Return(k store.IdleKey) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.learn(k, true)
	if k.Used <= w.bound {
		w.insert(k)
	}
}

// Taken says that k is held under k.Fence, by this process or another.
func (w *Window) Taken(k store.IdleKey) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.learn(k, false)
}

// Lost says that a claim of a key from this window lost its race.
func (w *Window) Lost() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.conflicts++
}

// Saw notes a stamp of this pool that was read somewhere.
func (w *Window) Saw(stamp uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.highest = max(w.highest, stamp)
}

// Stamp is what a claim writes now: more than every stamp seen.
func (w *Window) Stamp() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.highest + 1
}

func (w *Window) stale() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.idle) == 0 || w.conflicts >= maxConflicts {
		return true
	}
	return w.idle[0].Used > w.horizon && w.elapsed()-w.filled > w.refresh
}

// fill merges the heads of all shards. Where a shard has more than was asked
// for, no key beyond the last that it gave may be next.
func (w *Window) fill(ctx context.Context) error {
	var keys []store.IdleKey
	bound := uint64(math.MaxUint64)
	for shard := range store.IdleShards {
		page, err := w.index.Idle(ctx, w.pool, shard, perShard)
		if err != nil {
			return fmt.Errorf("query idle keys: %w", err)
		}
		keys = append(keys, page...)
		if len(page) == perShard {
			bound = min(bound, page[perShard-1].Used)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.merge(keys, bound)
	return nil
}

// merge puts what the index says together with what this process knows better.
func (w *Window) merge(keys []store.IdleKey, bound uint64) {
	now := w.elapsed()
	maps.DeleteFunc(w.own, func(_ record.KeyID, k knowledge) bool { return now-k.at > indexLag })
	w.idle, w.bound = nil, bound
	for _, k := range keys {
		w.highest = max(w.highest, k.Used)
		own, ok := w.own[k.KeyID]
		if ok && own.olderThan(k) {
			delete(w.own, k.KeyID)
			ok = false
		}
		if !ok && k.Used <= bound {
			w.idle = append(w.idle, k)
		}
	}
	slices.SortFunc(w.idle, order)
	for _, own := range w.own {
		if own.idle && own.key.Used <= bound {
			w.insert(own.key)
		}
	}
	w.horizon, w.filled, w.conflicts = w.highest, now, 0
}

// learn keeps what is newer than the index may be, and drops the key from the
// window.
func (w *Window) learn(k store.IdleKey, idle bool) {
	w.highest = max(w.highest, k.Used)
	w.own[k.KeyID] = knowledge{key: k, idle: idle, at: w.elapsed()}
	w.idle = slices.DeleteFunc(w.idle, func(o store.IdleKey) bool { return o.KeyID == k.KeyID })
}

func (w *Window) insert(k store.IdleKey) {
	if i, found := slices.BinarySearchFunc(w.idle, k, order); !found {
		w.idle = slices.Insert(w.idle, i, k)
	}
}

func order(a, b store.IdleKey) int {
	return cmp.Or(cmp.Compare(a.Used, b.Used), slices.Compare(a.KeyID[:], b.KeyID[:]))
}
