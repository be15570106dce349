package lease_test

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/lease"
	"github.com/keyhold/keyhold/parent/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// keys is a pool whose index may show the past.
type keys struct {
	idle    map[record.KeyID]store.IdleKey
	past    []map[record.KeyID]store.IdleKey // newest last
	lag     int                              // writes that the index has not seen
	queries int
	fails   error
}

func newKeys(n int) *keys {
	k := &keys{idle: map[record.KeyID]store.IdleKey{}}
	for i := range n {
		id := keyID(i)
		k.idle[id] = store.IdleKey{KeyID: id}
	}
	return k
}

// keyID spreads over the shards.
func keyID(i int) (id record.KeyID) {
	id[0] = byte(i)
	binary.BigEndian.PutUint32(id[1:], uint32(i))
	return id
}

func (k *keys) write(change func()) {
	if k.lag > 0 {
		snapshot := make(map[record.KeyID]store.IdleKey, len(k.idle))
		for id, key := range k.idle {
			snapshot[id] = key
		}
		k.past = append(k.past, snapshot)
		k.past = k.past[max(0, len(k.past)-k.lag):]
	}
	change()
}

func (k *keys) Idle(_ context.Context, _ string, shard, limit int) ([]store.IdleKey, error) {
	k.queries++
	if k.fails != nil {
		return nil, k.fails
	}
	seen := k.idle
	if k.lag > 0 && len(k.past) == k.lag {
		seen = k.past[0]
	}
	var page []store.IdleKey
	for id, key := range seen {
		if store.IdleShard(id) == shard {
			page = append(page, key)
		}
	}
	slices.SortFunc(page, func(a, b store.IdleKey) int {
		return cmp.Or(cmp.Compare(a.Used, b.Used), slices.Compare(a.KeyID[:], b.KeyID[:]))
	})
	return page[:min(limit, len(page))], nil
}

// claim takes the next key as a claimer does and reports how many idle keys were
// used longer ago than it. False: the pool is empty, or another was faster.
func (k *keys) claim(t *testing.T, w *lease.Window) (key store.IdleKey, overtaken int, ok bool) {
	t.Helper()
	key, ok, err := w.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !ok {
		return key, 0, false
	}
	if now, idle := k.idle[key.KeyID]; !idle || now.Fence != key.Fence {
		w.Lost() // read consistently: somebody has it, or had it
		if idle {
			w.Return(now)
		} else {
			w.Taken(store.IdleKey{KeyID: key.KeyID, Fence: key.Fence + 1, Used: key.Used})
		}
		return key, 0, false
	}
	for _, other := range k.idle {
		if other.Used < key.Used {
			overtaken++
		}
	}
	w.Saw(key.Used)
	held := store.IdleKey{KeyID: key.KeyID, Fence: key.Fence + 1, Used: w.Stamp()}
	k.write(func() { delete(k.idle, key.KeyID) })
	w.Taken(held)
	return held, overtaken, true
}

func (k *keys) giveBack(w *lease.Window, key store.IdleKey) {
	k.write(func() { k.idle[key.KeyID] = key })
	w.Return(key)
}

func TestOneClaimerTakesExactlyTheLeastRecentlyUsed(t *testing.T) {
	tests := []struct {
		keys, flight, lag int
	}{
		{1, 1, 0},
		{3, 2, 0},
		{16, 15, 0},
		{100, 8, 0},
		{100, 100, 0},
		{700, 16, 0},
		{1000, 300, 0},
		{3, 2, 5},
		{100, 8, 20},
		{700, 16, 40},
	}
	for _, c := range tests {
		t.Run(fmt.Sprintf("%d keys, %d in flight, index %d writes behind", c.keys, c.flight, c.lag), func(t *testing.T) {
			r := rand.New(rand.NewPCG(1, uint64(c.keys+c.flight)))
			k := newKeys(c.keys)
			k.lag = c.lag
			var now time.Duration
			w := lease.NewWindow(k, "main", func() time.Duration { return now }, time.Second)
			var flight []store.IdleKey
			taken := 0
			for step := range 6 * c.keys {
				now += time.Duration(r.IntN(20)) * time.Millisecond
				if len(flight) < c.flight && (len(flight) == 0 || r.IntN(2) == 0) {
					key, overtaken, ok := k.claim(t, w)
					if ok {
						flight = append(flight, key)
						taken++
					}
					if overtaken > 0 {
						t.Fatalf("step %d: %d idle keys were used longer ago", step, overtaken)
					}
					continue
				}
				i := r.IntN(len(flight))
				k.giveBack(w, flight[i])
				flight = slices.Delete(flight, i, i+1)
			}
			if taken < 2*c.keys {
				t.Errorf("only %d claims with %d keys", taken, c.keys)
			}
		})
	}
}

func TestManyClaimersOvertakeAtMostAsManyKeysAsAreInFlight(t *testing.T) {
	const parents, each = 4, 3
	r := rand.New(rand.NewPCG(2, 2))
	k := newKeys(300)
	var now time.Duration
	var windows [parents]*lease.Window
	var flight [parents][]store.IdleKey
	for i := range windows {
		windows[i] = lease.NewWindow(k, "main", func() time.Duration { return now }, time.Second)
	}
	worst, taken := 0, 0
	for range 8_000 {
		now += time.Duration(r.IntN(4)) * time.Millisecond
		p := r.IntN(parents)
		if len(flight[p]) < each && r.IntN(2) == 0 {
			key, overtaken, ok := k.claim(t, windows[p])
			worst = max(worst, overtaken)
			if ok {
				taken++
				flight[p] = append(flight[p], key)
			}
		} else if n := len(flight[p]); n > 0 {
			i := r.IntN(n)
			k.giveBack(windows[p], flight[p][i])
			flight[p] = slices.Delete(flight[p], i, i+1)
		}
	}
	t.Logf("%d claims, at most %d older idle keys overtaken", taken, worst)
	if worst > parents*each || taken < 1200 {
		t.Errorf("%d overtaken in %d claims; %d were in flight at most", worst, taken, parents*each)
	}
}

// heads is a pool of any size of which only the heads are ever made.
type heads struct {
	size    int
	next    [store.IdleShards]int
	queries int
}

func (h *heads) Idle(_ context.Context, _ string, shard, limit int) ([]store.IdleKey, error) {
	h.queries++
	page := make([]store.IdleKey, 0, limit)
	for i := h.next[shard]; len(page) < limit && i < h.size/store.IdleShards; i++ {
		n := i*store.IdleShards + shard
		page = append(page, store.IdleKey{KeyID: keyID(n), Used: uint64(n)})
	}
	return page, nil
}

func TestPickingAKeyAsksNoMoreOfALargePool(t *testing.T) {
	for _, size := range []int{1024, 1_000_000} {
		h := &heads{size: size}
		w := lease.NewWindow(h, "main", func() time.Duration { return 0 }, time.Second)
		const picks = 1000
		for i := range picks {
			k, ok, err := w.Next(t.Context())
			if err != nil || !ok || k.Used != uint64(i) {
				t.Fatalf("pick %d of %d: %v, %t, %v", i, size, k.Used, ok, err)
			}
			h.next[store.IdleShard(k.KeyID)]++
			k.Fence, k.Used = 1, w.Stamp()
			w.Taken(k)
		}
		if h.queries > picks/10 {
			t.Errorf("pool of %d: %d queries for %d picks", size, h.queries, picks)
		}
	}
}

// BenchmarkPick picks 200 keys a second, as a busy parent does, and gives each back.
func BenchmarkPick(b *testing.B) {
	for _, size := range []int{100, 10_000, 1_000_000} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			h := &heads{size: size}
			var now time.Duration
			w := lease.NewWindow(h, "main", func() time.Duration { return now }, time.Second)
			w.Saw(uint64(size))
			for b.Loop() {
				now += 5 * time.Millisecond
				k, ok, err := w.Next(b.Context())
				if err != nil || !ok {
					b.Fatal(ok, err)
				}
				held := store.IdleKey{KeyID: k.KeyID, Fence: k.Fence + 1, Used: w.Stamp()}
				w.Taken(held)
				w.Return(held)
				if s := store.IdleShard(k.KeyID); size > 100 {
					h.next[s] = (h.next[s] + 1) % (size/store.IdleShards - 20)
				}
			}
		})
	}
}

// The model found it: who lost a race for a key knows that it is held, and used
// to believe so for as long as the index may lag, although its holder gave it
// back under the same fence and the index said so.
func TestAKeyThatItsHolderGaveBackIsNotBelievedToBeHeld(t *testing.T) {
	k := newKeys(3)
	w := lease.NewWindow(k, "main", func() time.Duration { return 0 }, time.Second)
	stolen, _, err := w.Next(t.Context())
	if err != nil || stolen.KeyID != keyID(0) {
		t.Fatal(stolen, err)
	}
	stolen.Fence, stolen.Used = 1, 1
	w.Lost()
	w.Taken(stolen) // a consistent read: another parent holds it
	delete(k.idle, stolen.KeyID)
	for n := range 2 {
		if key, _, ok := k.claim(t, w); !ok || key.KeyID != keyID(n+1) {
			t.Fatalf("claim %d took %s, %t", n, key.KeyID, ok)
		}
	}
	if key, ok, err := w.Next(t.Context()); ok || err != nil {
		t.Fatalf("a held key is offered: %s, %v", key.KeyID, err)
	}
	k.idle[stolen.KeyID] = stolen // given back
	if key, ok, err := w.Next(t.Context()); !ok || key != stolen {
		t.Errorf("the only idle key is not offered: %v, %t, %v", key, ok, err)
	}
}

func TestWindowIsFilledAnewAfterLostRaces(t *testing.T) {
	k := newKeys(64)
	w := lease.NewWindow(k, "main", func() time.Duration { return 0 }, time.Second)
	for range 6 {
		if _, _, ok := k.claim(t, w); !ok {
			t.Fatal("no key")
		}
	}
	before := k.queries
	for i := range 64 { // somebody else takes everything
		delete(k.idle, keyID(i))
	}
	lost := 0
	for range 10 {
		if key, _, ok := k.claim(t, w); ok {
			t.Fatalf("claimed %s", key.KeyID)
		} else if key.KeyID.IsZero() == (k.queries == before) {
			lost++
		}
	}
	if k.queries == before {
		t.Error("the window was never filled anew")
	}
	if lost > 5 {
		t.Errorf("%d stale keys were tried", lost)
	}
}

func TestFailingIndexIsReported(t *testing.T) {
	k := newKeys(1)
	k.fails = store.ErrThrottled
	w := lease.NewWindow(k, "main", func() time.Duration { return 0 }, time.Second)
	if _, _, err := w.Next(t.Context()); !errors.Is(err, store.ErrThrottled) {
		t.Errorf("got %v", err)
	}
}

func held(fence record.Fence, d time.Duration) (store.Batch, store.Lease) {
	id := keyID(1)
	b := store.Batch{ID: "imp-b0000000", State: record.Claimed, KeyID: id, Fence: fence, KeyFence: fence + 10, Owner: "x", Lease: d}
	return b, b.Taken()
}

func TestLeaseIsOverOnlyWhenItRanOutUnderOurEyes(t *testing.T) {
	const s = time.Second
	type look struct {
		asked, answered time.Duration
		fence           record.Fence
		lease           time.Duration
		over            bool
	}
	tests := []struct {
		name  string
		looks []look
	}{
		{"seen once, however old it is", []look{{1000 * s, 1000 * s, 1, s, false}}},
		{"unchanged for a lease", []look{{0, 0, 1, 10 * s, false}, {10 * s, 11 * s, 1, 10 * s, true}}},
		{"asked a little early", []look{{0, 0, 1, 10 * s, false}, {10*s - 1, 20 * s, 1, 10 * s, false}}},
		{"first answer was slow", []look{{0, 5 * s, 1, 10 * s, false}, {14 * s, 14 * s, 1, 10 * s, false}, {15 * s, 15 * s, 1, 10 * s, true}}},
		{"another claim since", []look{{0, 0, 1, 10 * s, false}, {11 * s, 11 * s, 2, 10 * s, false}, {20 * s, 20 * s, 2, 10 * s, false}, {21 * s, 21 * s, 2, 10 * s, true}}},
		{"the lease of the item counts", []look{{0, 0, 1, 60 * s, false}, {59 * s, 59 * s, 1, 60 * s, false}, {60 * s, 60 * s, 1, 60 * s, true}}},
	}
	for _, c := range tests {
		t.Run(c.name, func(t *testing.T) {
			w := lease.NewWatch()
			for i, l := range c.looks {
				b, key := held(l.fence, l.lease)
				if over := w.Saw(&b, &key, l.asked, l.answered); over != l.over {
					t.Errorf("look %d: over is %t", i, over)
				}
			}
		})
	}
}

func TestKeyIsTakenOnlyWithTheBatchNamedInItsLease(t *testing.T) {
	spoil := map[string]func(*store.Batch, *store.Lease){
		"another batch":    func(_ *store.Batch, l *store.Lease) { l.BatchID = "imp-b0000001" },
		"another key":      func(_ *store.Batch, l *store.Lease) { l.KeyID = keyID(2) },
		"another fence":    func(_ *store.Batch, l *store.Lease) { l.Fence++ },
		"an idle key":      func(_ *store.Batch, l *store.Lease) { *l = l.Idled() },
		"a READY batch":    func(b *store.Batch, _ *store.Lease) { b.State = record.Ready },
		"a finished batch": func(b *store.Batch, _ *store.Lease) { b.State = record.Signed },
	}
	for name, f := range spoil {
		t.Run(name, func(t *testing.T) {
			w := lease.NewWatch()
			for _, at := range []time.Duration{0, time.Minute, time.Hour} {
				b, l := held(1, time.Second)
				f(&b, &l)
				if w.Saw(&b, &l, at, at) {
					t.Errorf("over at %s", at)
				}
			}
		})
	}
}

func TestWatchTellsWhenToLookAgain(t *testing.T) {
	w := lease.NewWatch()
	b, l := held(1, 10*time.Second)
	if w.Waits(b.ID, 0) {
		t.Error("an unknown batch is to wait")
	}
	w.Saw(&b, &l, 0, 0)
	for at, waits := range map[time.Duration]bool{0: true, time.Second - 1: true, time.Second: false, 10 * time.Second: false} {
		if w.Waits(b.ID, at) != waits {
			t.Errorf("at %s: waits is %t", at, !waits)
		}
	}
	if d := w.Watched(b.ID, 7*time.Second); d != 7*time.Second {
		t.Errorf("watched for %s", d)
	}
	w.Forget(b.ID)
	if d := w.Watched(b.ID, 7*time.Second); d != 0 {
		t.Errorf("a forgotten batch was watched for %s", d)
	}
	if w.Saw(&b, &l, time.Hour, time.Hour) {
		t.Error("a forgotten batch is over at first sight")
	}
}

func TestWatchHoldsNoMoreThanItMay(t *testing.T) {
	w := lease.NewWatch()
	look := func(n int, at time.Duration) bool {
		b, l := held(1, 10*time.Second)
		b.ID = record.MakeBatchID("imp", n)
		l.BatchID = b.ID
		return w.Saw(&b, &l, at, at)
	}
	for n := range lease.MaxWatched {
		look(n, 0)
	}
	look(lease.MaxWatched, time.Second)
	if look(lease.MaxWatched, 15*time.Second) {
		t.Error("a batch without room was watched")
	}
	look(lease.MaxWatched, 30*time.Second) // what is long overdue makes room
	if !look(lease.MaxWatched, 40*time.Second) {
		t.Error("no room was made")
	}
}
