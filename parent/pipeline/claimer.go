package pipeline

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/lease"
	"github.com/keyhold/keyhold/parent/store"
)

const (
	pageSize  = 64   // batches read from the ready index at once
	maxParked = 4096 // batches remembered as waiting for a key; more are found again later
	firstIdle = 50 * time.Millisecond
	lastIdle  = 2 * time.Second // between looks at an index in which there was nothing to do
)

// claim is one batch in the hands of one slot.
type claim struct {
	store.Batch
	ticket wire.Ticket   // older than the claim
	at     time.Duration // when the ticket was taken, or somewhat later
	sent   bool          // the enclave may have seen it
	sentAt time.Duration // for the first time
	probe  int           // the record that was being tried when the connection was lost, or wire.NoProbe
}

// claimer finds batches and takes them, one at a time, so that keys are taken in
// one order. Only run and what it calls touch the fields above mu.
type claimer struct {
	p       *pipeline
	asks    chan *ask
	watch   *lease.Watch
	found   *candidate       // that the last ask came too early for
	queue   []record.BatchID // to be looked at next
	shard   int              // of the ready index, being read
	left    int              // shards of this round, this one included
	page    string
	useful  bool                      // this round found something
	idle    time.Duration             // pause after the next useless round
	rest    time.Duration             // no new round before
	dry     map[string]bool           // pools without an idle key until one comes back
	parked  map[record.BatchID]bool   // what waits in waiting
	waiting map[want][]record.BatchID // for a key

	mu      sync.Mutex
	flight  map[record.BatchID]*claim
	freed   []want
	windows map[string]*lease.Window
	wake    chan struct{}
}

// want is what a parked batch waits for: one key, or any of a pool.
type want struct {
	pool string
	key  record.KeyID
}

// ask is a slot that wants a batch for the enclave it is connected to.
type ask struct {
	session *session
	ticket  wire.Ticket
	at      time.Duration
	reply   chan *claim // buffered; nil: come again with a new ticket
}

// candidate is a batch with the key it can have.
type candidate struct {
	batch    store.Batch
	key      store.IdleKey
	takeOver bool
}

func newClaimer(p *pipeline) *claimer {
	return &claimer{
		p: p, asks: make(chan *ask), watch: lease.NewWatch(), idle: firstIdle,
		dry: map[string]bool{}, parked: map[record.BatchID]bool{}, waiting: map[want][]record.BatchID{},
		flight: map[record.BatchID]*claim{}, windows: map[string]*lease.Window{}, wake: make(chan struct{}, 1),
	}
}

// ask hands boot and ticket over and waits for a claim. Nil without an error:
// the ticket has grown old, or ctx has ended.
func (c *claimer) ask(ctx, work context.Context, s *session) (*claim, error) {
	// Not ctx: a request that is cut off ends the connection, with the other slot's batch on it.
	ticket, err := s.client.Ticket(work, c.p.Lease/20)
	if err != nil {
		return nil, err
	}
	a := &ask{session: s, ticket: ticket, at: c.p.Elapsed(), reply: make(chan *claim, 1)}
	select {
	case c.asks <- a:
		return <-a.reply, nil // run answers what it has taken
	case <-ctx.Done():
		return nil, nil
	}
}

// run serves one ask at a time until ctx ends. A claim that is being made then
// is finished: its slot gives it back.
func (c *claimer) run(ctx, work context.Context) {
	for {
		select {
		case a := <-c.asks:
			a.reply <- c.serve(ctx, work, a)
		case <-ctx.Done():
			return
		}
	}
}

func (c *claimer) serve(ctx, work context.Context, a *ask) *claim {
	for c.fresh(a) {
		cand := c.found
		if c.found = nil; cand == nil {
			cand = c.find(ctx, a)
		}
		if cand == nil {
			return nil
		}
		if !c.fresh(a) {
			c.found = cand // for the next; whatever happens until then, the claim's conditions notice
			return nil
		}
		if got := c.take(work, cand, a); got != nil {
			return got
		}
	}
	return nil
}

// fresh: with what signclient allows, no ticket is older than a tenth of the lease.
func (c *claimer) fresh(a *ask) bool {
	return a.session.alive() && c.p.Elapsed()-a.at <= c.p.Lease/20
}

// find waits until there is a batch that can be claimed with a known key.
func (c *claimer) find(ctx context.Context, a *ask) *candidate {
	for ctx.Err() == nil {
		c.unpark()
		id, ok := c.next(ctx)
		if !ok {
			c.sleep(ctx)
			continue
		}
		if cand := c.consider(ctx, id, a); cand != nil {
			c.useful = true
			return cand
		}
	}
	return nil
}

// next returns a batch worth reading, from a random first shard on. It returns
// false at the end of a round in which there was nothing, and until the next.
func (c *claimer) next(ctx context.Context) (record.BatchID, bool) {
	for len(c.queue) == 0 {
		if c.left == 0 && !c.newRound() {
			return "", false
		}
		page, err := c.p.Store.Ready(ctx, c.shard, c.p.Now().Add(store.ClaimSkew), pageSize, c.page)
		if err != nil {
			c.p.storeFailed(ctx, "query ready batches", err)
			c.left = 0
			return "", false
		}
		c.queue = slices.DeleteFunc(page.Batches, c.pass)
		c.shuffle()
		if c.page = page.Next; c.page == "" {
			c.shard = (c.shard + 1) % store.ReadyShards
			c.left--
		}
	}
	id := c.queue[0]
	c.queue = c.queue[1:]
	return id, true
}

func (c *claimer) newRound() bool {
	now := c.p.Elapsed()
	if !c.useful && now < c.rest {
		return false
	}
	if c.useful {
		c.idle = firstIdle
	} else {
		c.idle = min(2*c.idle, lastIdle)
	}
	c.useful, c.rest = false, now+c.p.dice.around(c.idle)
	c.shard, c.left, c.page = c.p.dice.below(store.ReadyShards), store.ReadyShards, ""
	return true
}

// pass reports whether a batch needs no look now: it is ours, waits for a key,
// or is watched.
func (c *claimer) pass(id record.BatchID) bool {
	c.mu.Lock()
	_, ours := c.flight[id]
	c.mu.Unlock()
	return ours || c.parked[id] || c.watch.Waits(id, c.p.Elapsed())
}

// shuffle keeps parents that read the same page out of each other's way.
func (c *claimer) shuffle() {
	for i := len(c.queue) - 1; i > 0; i-- {
		j := c.p.dice.below(i + 1)
		c.queue[i], c.queue[j] = c.queue[j], c.queue[i]
	}
}

// sleep until a key comes back, or it is time for another round. Other parents free keys too, so a round tries what is parked.
func (c *claimer) sleep(ctx context.Context) {
	d := max(c.rest-c.p.Elapsed(), firstPause)
	if wait(ctx, d, c.wake) != nil || c.p.Elapsed() < c.rest {
		return
	}
	clear(c.dry)
	wants := slices.SortedFunc(maps.Keys(c.waiting), func(a, b want) int {
		return cmp.Or(cmp.Compare(a.pool, b.pool), slices.Compare(a.key[:], b.key[:]))
	})
	for _, w := range wants {
		c.tryOne(w)
	}
}

// unpark tries what waited for the keys that came back.
func (c *claimer) unpark() {
	c.mu.Lock()
	freed := c.freed
	c.freed = nil
	c.mu.Unlock()
	for _, w := range freed {
		delete(c.dry, w.pool)
		c.tryOne(w)
		c.tryOne(want{pool: w.pool})
	}
}

func (c *claimer) park(id record.BatchID, w want) {
	if len(c.parked) < maxParked {
		c.parked[id] = true
		c.waiting[w] = append(c.waiting[w], id)
	}
}

func (c *claimer) tryOne(w want) {
	ids := c.waiting[w]
	if len(ids) == 0 {
		return
	}
	delete(c.parked, ids[0])
	c.queue = append(c.queue, ids[0])
	if c.waiting[w] = ids[1:]; len(ids) == 1 {
		delete(c.waiting, w)
	}
}

// consider reads a batch consistently and finds the key for it, or says no.
func (c *claimer) consider(ctx context.Context, id record.BatchID, a *ask) *candidate {
	if c.pass(id) {
		return nil
	}
	asked := c.p.Elapsed()
	b, err := c.p.Store.Batch(ctx, id)
	var cand *candidate
	switch {
	case err != nil:
	case b.State == record.Ready:
		c.watch.Forget(id)
		cand, err = c.withKey(ctx, b)
	case b.State == record.Claimed:
		cand, err = c.overdue(ctx, b, a, asked)
	default: // parked too long, or an index entry that is older than its item
		c.watch.Forget(id)
		c.tryOne(want{b.Pool, b.KeyID})
		if !c.dry[b.Pool] {
			c.tryOne(want{pool: b.Pool})
		}
	}
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		c.p.storeFailed(ctx, "look at batch", err)
		_ = c.p.pause(ctx, 1) // find looks at ctx
	}
	return cand
}

// withKey finds the key for a READY batch: its own, or the least recently used.
func (c *claimer) withKey(ctx context.Context, b store.Batch) (*candidate, error) {
	w := want{b.Pool, b.KeyID}
	if !b.KeyID.IsZero() {
		l, err := c.p.Store.Lease(ctx, b.KeyID)
		if err != nil {
			return nil, err
		}
		if !l.Idle() {
			c.park(b.ID, w)
			return nil, nil
		}
		return &candidate{batch: b, key: store.IdleKey{KeyID: l.KeyID, Fence: l.Fence, Used: l.Used}}, nil
	}
	if c.dry[b.Pool] {
		c.park(b.ID, w)
		return nil, nil
	}
	k, ok, err := c.window(b.Pool).Next(ctx)
	if err != nil {
		return nil, err
	}
	if !ok {
		c.dry[b.Pool] = true
		c.park(b.ID, w)
		return nil, nil
	}
	return &candidate{batch: b, key: k}, nil
}

// overdue looks at a batch that somebody holds. Its key can be had with it once
// the lease has run out under our eyes, or at once where the enclave that it was
// claimed for is ours too and fences it off. That is safe at any time, but a
// parent that is alive should not be robbed: so only where the wall clock says
// that the lease is over and, since that clock may be wrong, nothing has moved for
// a quarter of it either.
func (c *claimer) overdue(ctx context.Context, b store.Batch, a *ask, asked time.Duration) (*candidate, error) {
	l, err := c.p.Store.Lease(ctx, b.KeyID)
	if err != nil {
		return nil, err
	}
	c.window(b.Pool).Saw(l.Used)
	over := c.watch.Saw(&b, &l, asked, c.p.Elapsed())
	overdue := b.HoldsKey(&l) && c.p.Now().After(b.VisibleAt) && c.watch.Watched(b.ID, asked) >= b.Lease/4
	if !over && overdue && b.BootID == a.session.boot {
		_, err := a.session.client.Fence(ctx, &wire.Fence{KeyID: b.KeyID, Fence: b.KeyFence + 1})
		over = err == nil
	}
	if !over {
		return nil, nil
	}
	if spent(&b) {
		return nil, c.quarantine(ctx, &b)
	}
	return &candidate{batch: b, key: store.IdleKey{KeyID: l.KeyID, Fence: l.Fence, Used: l.Used}, takeOver: true}, nil
}

// quarantine a batch whose last holder will release nothing any more.
func (c *claimer) quarantine(ctx context.Context, b *store.Batch) error {
	err := c.p.Store.Release(ctx, *b, store.End{
		State: record.Quarantined, Reason: store.EndLost, Attempt: true, KeepKey: true, Now: c.p.Now(),
	})
	if err == nil {
		c.watch.Forget(b.ID)
		c.p.gaveBack(ctx, b, record.Quarantined, store.EndLost)
		c.keyIsBack(b)
	}
	return err
}

// take makes the claim.
func (c *claimer) take(ctx context.Context, cand *candidate, a *ask) *claim {
	win := c.window(cand.batch.Pool)
	win.Saw(cand.key.Used)
	now := c.p.Now()
	req := store.Claim{
		Batch: cand.batch, KeyID: cand.key.KeyID, KeySeen: cand.key.Fence, TakeOver: cand.takeOver,
		Owner: c.p.Owner, ClaimID: c.p.dice.id(), BootID: a.session.boot,
		Lease: c.p.Lease, Used: win.Stamp(), Now: now, Next: now.Add(c.p.Lease),
	}
	b, err := c.p.Store.Claim(ctx, req)
	if err != nil && !errors.Is(err, store.ErrTaken) {
		c.p.storeFailed(ctx, "claim", err)
		b, err = c.whatBecameOf(ctx, &req)
	}
	if err != nil {
		c.lostRace(ctx, cand)
		return nil
	}
	c.watch.Forget(b.ID)
	win.Taken(store.IdleKey{KeyID: b.KeyID, Fence: b.KeyFence, Used: b.Used})
	got := &claim{Batch: b, ticket: a.ticket, at: a.at, probe: wire.NoProbe}
	c.mu.Lock()
	c.flight[b.ID] = got
	c.mu.Unlock()
	if !c.dry[b.Pool] {
		c.tryOne(want{pool: b.Pool})
	}
	c.p.Observer.Claimed(&b)
	return got
}

// whatBecameOf reads a claim of which nobody knows whether it was made.
func (c *claimer) whatBecameOf(ctx context.Context, req *store.Claim) (store.Batch, error) {
	b, err := c.p.batch(ctx, req.Batch.ID)
	if err == nil && !req.Made(&b) {
		err = store.ErrTaken
	}
	return b, err
}

// lostRace puts the key back where only the batch was gone.
func (c *claimer) lostRace(ctx context.Context, cand *candidate) {
	win := c.window(cand.batch.Pool)
	win.Lost()
	if !cand.takeOver {
		l, err := c.p.Store.Lease(ctx, cand.key.KeyID)
		switch k := (store.IdleKey{KeyID: l.KeyID, Fence: l.Fence, Used: l.Used}); {
		case err != nil:
			c.p.storeFailed(ctx, "read lease", err)
			win.Return(cand.key) // as it was seen: it is still the next, and the next claim finds out
		case l.Idle():
			win.Return(k)
		default:
			win.Taken(k)
		}
		c.queue = append(c.queue, cand.batch.ID)
	}
	_ = c.p.pause(ctx, 1) // callers look at ctx
}

func (c *claimer) window(pool string) *lease.Window {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := c.windows[pool]
	if w == nil {
		w = lease.NewWindow(c.p.Store, pool, c.p.Elapsed, c.p.Lease/10)
		c.windows[pool] = w
	}
	return w
}

// leave says that a claim is in no slot's hands any more.
func (c *claimer) leave(cl *claim) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.flight[cl.ID] == cl {
		delete(c.flight, cl.ID)
	}
}

// keyIsBack says that b's key is idle again.
func (c *claimer) keyIsBack(b *store.Batch) {
	c.window(b.Pool).Return(store.IdleKey{KeyID: b.KeyID, Fence: b.KeyFence, Used: b.Used})
	c.mu.Lock()
	c.freed = append(c.freed, want{b.Pool, b.KeyID})
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (p *pipeline) gaveBack(ctx context.Context, b *store.Batch, to record.State, why string) {
	p.Observer.GaveBack(b, why)
	p.Logger.InfoContext(ctx, "claim given back", slog.String("batch_id", string(b.ID)),
		slog.String("state", string(to)), slog.String("reason", why), slog.Int("attempts", b.Attempts))
}
