package sim_test

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/store"
)

// judge watches the effects on the tables and what enclaves release, on the one
// true clock, and holds both against the promises. It trusts no word of a parent
// and shares no code with the pipeline.
type judge struct {
	w *world

	mu       sync.Mutex
	verdicts []string
	claims   map[record.KeyID]holding
	claimed  map[record.BatchID]record.Fence // newest fence of each batch
	commits  map[record.KeyID]record.Fence   // newest that was committed
	known    map[record.KeyID]time.Time      // when the newest freeing of a key was answered
	results  map[record.BatchID][]byte       // the first of each
	tickets  map[string]time.Time            // when each was issued
	acked    map[place]revocation            // by boot and key
	boots    map[string]int                  // of each enclave
	down     map[string]bool                 // enclaves that died and are not up again
	steps    map[string]string               // sign or probe, by enclave and payload
	slow     map[string]bool                 // takes long to sign, likewise
	probes   []*probe
	released map[*conn][]store.ReceiptRef // on each connection
	over     map[*conn]bool               // the enclave has seen the end of it
	overtook int                          // most idle keys that one claim passed over
}

// holding is a claim as the tables have it.
type holding struct {
	fence, batchFence record.Fence
	batch             record.BatchID
}

type place struct {
	boot string
	key  record.KeyID
}

// revocation: nothing under that fence or an older one, from then on.
type revocation struct {
	key   record.KeyID
	fence record.Fence
	at    time.Time
}

// probe is a record that was tried alone.
type probe struct {
	request *request
	enclave string
	boot    int
	batch   record.BatchID
	index   int
	over    bool // its answer arrived
}

func newJudge(w *world) *judge {
	return &judge{
		w: w, claims: map[record.KeyID]holding{}, claimed: map[record.BatchID]record.Fence{},
		commits: map[record.KeyID]record.Fence{}, results: map[record.BatchID][]byte{},
		known: map[record.KeyID]time.Time{}, tickets: map[string]time.Time{}, acked: map[place]revocation{}, boots: map[string]int{}, down: map[string]bool{},
		steps: map[string]string{}, slow: map[string]bool{}, released: map[*conn][]store.ReceiptRef{}, over: map[*conn]bool{},
	}
}

// fail notes that a promise was broken. The first word says which.
func (j *judge) fail(promise, format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.failLocked(promise, format, args...)
}

func (j *judge) failLocked(promise, format string, args ...any) {
	at := time.Since(j.w.start)
	j.verdicts = append(j.verdicts, fmt.Sprintf("%s: at %.6fs: %s", promise, at.Seconds(), fmt.Sprintf(format, args...)))
}

// claim makes a claim and looks at what it did. The world's lock is held.
func (j *judge) claim(p *parent, c store.Claim, chosen time.Time, do func() (store.Batch, error)) (store.Batch, error) {
	ctx := j.w.ctx
	before, _ := j.w.tables.Batch(ctx, c.Batch.ID)
	lease, _ := j.w.tables.Lease(ctx, c.KeyID)
	passed := j.passedOver(&before, &lease, c, chosen)
	b, err := do()
	if err != nil || before.ClaimID == c.ClaimID {
		return b, err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if b.KeyFence <= j.claims[b.KeyID].fence || b.Fence <= j.claimed[b.ID] {
		j.failLocked("G2", "%s claims %s under fences %d and %d, which were there before", p.name, b.ID, b.Fence, b.KeyFence)
	}
	j.claims[b.KeyID] = holding{fence: b.KeyFence, batchFence: b.Fence, batch: b.ID}
	j.claimed[b.ID] = b.Fence
	j.overtook = max(j.overtook, passed)
	if limit := j.w.mayOvertake(); passed > limit {
		j.failLocked("G4", "%s claims a key over %d idle ones that were used longer ago, %d may be", p.name, passed, limit)
	}
	return b, err
}

// freeing notes that a parent frees a key from now on. What it returns notes the
// answer; after an error nobody knows for some time whether the key is free.
func (j *judge) freeing(id record.KeyID) func(err *error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.known[id] = time.Now().Add(never)
	return func(err *error) {
		j.mu.Lock()
		defer j.mu.Unlock()
		j.known[id] = time.Now()
		if *err != nil {
			j.known[id] = time.Now().Add(unknownFor)
		}
	}
}

const (
	never      = 1000 * time.Hour
	unknownFor = 10 * time.Second // a parent has read again by then
)

// passedOver counts the idle keys that were used longer ago than the one that is
// claimed, and could be known to be idle when that one was chosen. A batch that
// has its key already has no choice.
func (j *judge) passedOver(before *store.Batch, lease *store.Lease, c store.Claim, chosen time.Time) (n int) {
	if !before.KeyID.IsZero() || c.TakeOver {
		return 0
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	for i := range j.w.plan.keys {
		l, err := j.w.tables.Lease(j.w.ctx, j.w.keys.public[i].KeyID)
		if err == nil && l.Idle() && l.KeyID != c.KeyID && l.Used < lease.Used && !j.known[l.KeyID].After(chosen) {
			n++
		}
	}
	return n
}

// mayOvertake: none where one parent is the only one and sees the present, else
// as many as claims can be in flight.
func (w *world) mayOvertake() int {
	if w.plan.parents == 1 && w.plan.lag == 0 {
		return 0
	}
	return w.plan.parents * w.plan.enclaves * wire.MaxInFlight
}

// commit makes a commit and looks at what it did. The world's lock is held.
func (j *judge) commit(c store.Commit, do func() error) error {
	ctx, id := j.w.ctx, c.Batch.ID
	_, noReceipt := j.w.tables.Receipt(ctx, c.Receipt)
	err := do()
	if err != nil {
		return err
	}
	stored, _ := j.w.tables.Result(ctx, id)
	j.mu.Lock()
	defer j.mu.Unlock()
	if first, again := j.results[id]; again {
		if !bytes.Equal(first, stored) { //nolint:forbidigo // results are public
			j.failLocked("G1", "the result of %s was replaced", id)
		}
		if j.commits[c.Batch.KeyID] < c.Batch.KeyFence {
			j.failLocked("G1", "%s was committed under two fences", id)
		}
		return nil
	}
	j.results[id] = bytes.Clone(stored)
	h := j.claims[c.Batch.KeyID]
	if h.batch != id || h.fence != c.Batch.KeyFence || h.batchFence != c.Batch.Fence || j.claimed[id] != c.Batch.Fence {
		j.failLocked("G2", "%s committed under fence %d of its key, which is claimed under %d for %s", id, c.Batch.KeyFence, h.fence, h.batch)
	}
	if c.Batch.KeyFence <= j.commits[c.Batch.KeyID] {
		j.failLocked("G2", "%s committed under fence %d of its key after %d", id, c.Batch.KeyFence, j.commits[c.Batch.KeyID])
	}
	j.commits[c.Batch.KeyID] = c.Batch.KeyFence
	if c.Receipt != (store.ReceiptRef{}) && noReceipt != nil {
		j.failLocked("receipt", "%s was committed before its receipt was stored", id)
	}
	return nil
}

// booted: the enclave is up, as another boot than before.
func (j *judge) booted(e *enclave) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.boots[e.name]++
	j.down[e.name] = false
}

func (j *judge) died(e *enclave) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.down[e.name] = true
}

// gone reports whether the boot that c talks to is no more.
func (j *judge) gone(c *conn) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.down[c.e.name] || j.boots[c.e.name] != c.boot
}

func (j *judge) boot(e *enclave) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.boots[e.name]
}

// step says what a request is, for coverage.
func (j *judge) step(q *wire.Message) string {
	var m wire.Sign
	if q.Type == wire.TypeSign && wire.DecodeBody(q, &m) == nil && m.Probe != wire.NoProbe {
		return "probe"
	}
	return string(q.Type)
}

// sent: a parent is about to send that request.
func (j *judge) sent(c *conn, r *request, q *wire.Message) {
	var m wire.Sign
	if q.Type != wire.TypeSign || wire.DecodeBody(q, &m) != nil || m.Probe == wire.NoProbe {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.probes = append(j.probes, &probe{request: r, enclave: c.e.name, boot: c.boot, batch: m.BatchID, index: m.Probe})
}

// delivered: its answer arrived.
func (j *judge) delivered(r *request) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, p := range j.probes {
		p.over = p.over || p.request == r
	}
}

// asked: the enclave has that request now.
func (j *judge) asked(c *conn, r *request, q *wire.Message) {
	about := ""
	switch q.Type { //nolint:exhaustive // the others are not looked at
	case wire.TypeSign:
		var m wire.Sign
		if wire.DecodeBody(q, &m) == nil {
			r.sign = &m
			about = fmt.Sprintf("%s %s fence %d", m.BatchID, m.KeyID, m.KeyFence)
			j.willSign(c, r, &m)
			j.leftBehind(c)
		}
	case wire.TypeCancel:
		var m wire.Cancel
		if wire.DecodeBody(q, &m) == nil {
			r.revoke = &revocation{key: m.KeyID, fence: m.KeyFence}
		}
	case wire.TypeFence:
		var m wire.Fence
		if wire.DecodeBody(q, &m) == nil {
			r.revoke = &revocation{key: m.KeyID, fence: m.Fence - 1}
		}
	}
	if r.revoke != nil {
		about = fmt.Sprintf("%s fence %d", r.revoke.key, r.revoke.fence)
	}
	j.w.trace.add(j.w.start, c.name, r.step, about, "asked")
}

func (j *judge) willSign(c *conn, r *request, m *wire.Sign) {
	rs, err := record.DecodePayload(m.Payload)
	if err != nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, one := range rs {
		j.steps[c.e.name+string(one.Payload)] = r.step
	}
	if r.fault == cutMidway && len(rs) > 0 { // or it would be over before
		j.slow[c.e.name+string(rs[len(rs)-1].Payload)] = true
	}
}

// signing says whether a payload is being signed or tried, and whether that shall
// take long.
func (j *judge) signing(e *enclave, payload string) (step string, slow bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	at := e.name + payload
	slow = j.slow[at]
	delete(j.slow, at)
	return j.steps[at], slow
}

// answers: the enclave lets that out, now.
func (j *judge) answers(c *conn, r *request, q *wire.Message) {
	now := time.Now()
	ended := "ok"
	var t wire.Ticket
	switch q.Type { //nolint:exhaustive // the others hold no ticket
	case wire.TypeError:
		var m wire.Error
		_ = wire.DecodeBody(q, &m)
		t, ended = m.Ticket, m.Code
	case wire.TypeHello:
		t = decode[wire.HelloReply](q).Ticket
		j.greeted(c)
	case wire.TypeTicket:
		t = decode[wire.TicketReply](q).Ticket
	case wire.TypeSign:
		m := decode[wire.SignReply](q)
		t = m.Ticket
		if r.sign.Probe == wire.NoProbe {
			j.releases(c, r.sign, m.Receipt, now)
		}
	case wire.TypeCancel, wire.TypeFence:
		t = decode[wire.FenceReply](q).Ticket
		j.revoked(c, r.revoke, now)
	case wire.TypeReceipts:
		t = decode[wire.ReceiptsReply](q).Ticket
	}
	j.w.trace.add(j.w.start, c.name, r.step, "", ended)
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, known := j.tickets[string(t)]; !known {
		j.tickets[string(t)] = now
	}
}

func decode[M any](q *wire.Message) (m M) {
	_ = wire.DecodeBody(q, &m)
	return m
}

// ended: the enclave has seen the end of a connection, so that its lane waits for
// whoever connects next.
func (j *judge) ended(c *conn) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.over[c] = true
}

// greeted: whatever was released on connections of that boot that are over has
// to be stored before anything is signed on this one.
func (j *judge) greeted(c *conn) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for old, refs := range j.released {
		if j.over[old] && old.bootName() == c.bootName() {
			c.owes = append(c.owes, refs...)
		}
	}
}

// leftBehind looks for receipts that wait in the enclave although more is signed.
func (j *judge) leftBehind(c *conn) {
	j.mu.Lock()
	owes := c.owes
	c.owes = nil
	j.mu.Unlock()
	for _, ref := range owes {
		if _, err := j.w.tables.Receipt(j.w.ctx, ref); errors.Is(err, store.ErrNotFound) {
			j.fail("receipt", "%s signs while receipt %d of lane %d is nowhere but in the enclave", c.name, ref.Seq, ref.Lane)
			return
		}
	}
}

// releases holds one release against G3: not after the lease that began with the
// ticket, and only while the claim is the newest that the tables have of the key.
func (j *judge) releases(c *conn, m *wire.Sign, signed []byte, now time.Time) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if r, err := openReceipt(signed); err != nil {
		j.failLocked("receipt", "%s released without one: %v", m.BatchID, err)
	} else {
		j.released[c] = append(j.released[c], store.ReceiptRef{BootID: r.BootID, Lane: r.Lane, Seq: r.Seq})
	}
	issued, known := j.tickets[string(m.Ticket)]
	lease := time.Duration(m.LeaseMS) * time.Millisecond
	if !known || now.Sub(issued) >= lease {
		j.failLocked("G3", "%s released for %s after its ticket, with a lease of %s", m.BatchID, now.Sub(issued), lease)
	}
	h := j.claims[m.KeyID]
	if h.batch != m.BatchID || h.fence != m.KeyFence || h.batchFence != m.BatchFence {
		j.failLocked("G3", "%s released under fence %d of its key, which is claimed under %d for %s", m.BatchID, m.KeyFence, h.fence, h.batch)
	}
	r := j.acked[place{c.bootName(), m.KeyID}]
	if m.KeyFence <= r.fence && now.After(r.at) {
		j.failLocked("G3", "%s released under fence %d of its key after %d was acknowledged as revoked", m.BatchID, m.KeyFence, r.fence)
	}
}

func openReceipt(raw []byte) (*receipt.Receipt, error) {
	signed, err := receipt.Decode[receipt.Signed](raw)
	if err != nil {
		return nil, err
	}
	return receipt.Decode[receipt.Receipt](signed.Body)
}

func (j *judge) revoked(c *conn, r *revocation, now time.Time) {
	j.mu.Lock()
	defer j.mu.Unlock()
	at := place{c.bootName(), r.key}
	if r.fence > j.acked[at].fence {
		j.acked[at] = revocation{key: r.key, fence: r.fence, at: now}
	}
}

func (c *conn) bootName() string { return fmt.Sprintf("%s boot %d", c.e.name, c.boot) }
