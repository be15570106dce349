package sim_test

import (
	"context"
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/intake"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/memory"
)

const (
	pool         = "main"
	freeImport   = "free"
	pinnedImport = "pinned"
	enough       = 20 * time.Minute // for everything to end once nothing fails any more
)

// world is one schedule: tables, enclaves, parents, and who watches them.
type world struct {
	plan   plan
	keys   *keys
	dice   *dice
	tables *memory.Store
	judge  *judge
	cover  coverage
	start  time.Time
	trace  trace
	lasted time.Duration

	ctx     context.Context //nolint:containedctx // the life time of the schedule
	end     context.CancelFunc
	running sync.WaitGroup

	enclaves []*enclave

	mu      sync.Mutex     // of everything below, and around each effect of a store call
	calm    bool           // faults have stopped
	parents map[string]int // started so far, by name
	alive   map[*parent]bool
	done    map[string]bool // imports
}

// newWorld is for the inside of a bubble.
func newWorld(t *testing.T, p plan, k *keys) *world {
	t.Helper()
	w := &world{
		plan: p, keys: k, dice: newDice(p.seed), tables: memory.New(), start: time.Now(),
		alive: map[*parent]bool{}, parents: map[string]int{}, done: map[string]bool{},
	}
	w.judge = newJudge(w)
	w.ctx, w.end = context.WithCancel(t.Context())
	must(t, w.tables.PutKeyring(w.ctx, k.header, k.ring.Header))
	for i := range p.keys {
		id := k.public[i].KeyID
		w.trace.name(id.String(), fmt.Sprintf("key-%d", i))
		must(t, w.tables.PutKeys(w.ctx, []store.Key{{ID: id, Keyring: k.header, Pool: pool, Sealed: k.ring.Entries[i]}}))
	}
	w.tables.SetIndexLag(p.lag)
	for i := range p.enclaves {
		w.enclaves = append(w.enclaves, newEnclave(t, w, i))
	}
	return w
}

// run lets faults happen for a while and then waits until nothing is left to do.
func (w *world) run() {
	r := w.dice.of("driver")
	for i := range w.plan.parents {
		w.running.Go(func() { w.keepParent(i) })
	}
	w.running.Go(func() { w.importAll(freeImport, w.plan.batches*w.plan.batchSize, record.KeyID{}) })
	if w.plan.pinned > 0 {
		w.running.Go(func() { w.importAll(pinnedImport, w.plan.pinned*w.plan.batchSize, w.keys.public[0].KeyID) })
	}
	for time.Since(w.start) < w.plan.faults && !w.finished() {
		sleep(w.ctx, time.Second+upTo(r, time.Second))
		w.disturb(r)
	}
	w.mu.Lock()
	w.calm = true
	w.mu.Unlock()
	w.tables.SetIndexLag(0)
	for end := time.Now().Add(enough); time.Now().Before(end) && !w.finished(); {
		sleep(w.ctx, time.Second)
		w.requeue()
	}
	w.lasted = time.Since(w.start)
	w.trace.stop()
	w.judge.atTheEnd()
	w.stop()
}

// disturb does what belongs to no call.
func (w *world) disturb(r *rand.Rand) {
	what := r.IntN(12)
	if w.plan.calm {
		return
	}
	switch what {
	case 0:
		w.enclaves[r.IntN(len(w.enclaves))].crash("driver")
	case 1:
		w.requeue()
	case 2:
		if w.plan.lag > 0 {
			w.tables.SetIndexLag(r.IntN(7))
		}
	}
}

// requeue is the operator: what is in quarantine is tried again.
func (w *world) requeue() {
	for _, b := range w.batches() {
		if b.State == record.Quarantined {
			w.effect("operator", "requeue", string(b.ID), func() error { return w.tables.Requeue(w.ctx, b.ID, time.Now()) })
		}
	}
}

func (w *world) effect(who, op, what string, f func() error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.trace.add(w.start, who, op, what, outcome(f()))
}

// batches reads those that were imported, as far as that got.
func (w *world) batches() (all []store.Batch) {
	for _, imp := range []struct {
		id record.ImportID
		n  int
	}{{freeImport, w.plan.batches}, {pinnedImport, w.plan.pinned}} {
		for n := range imp.n {
			b, err := w.tables.Batch(w.ctx, record.MakeBatchID(imp.id, n))
			if err == nil {
				all = append(all, b)
			}
		}
	}
	return all
}

// finished: everything is imported and final.
func (w *world) finished() bool {
	w.mu.Lock()
	imports := len(w.done)
	w.mu.Unlock()
	if imports < 1+w.plan.pinned {
		return false
	}
	for _, b := range w.batches() {
		if b.State != record.Signed {
			return false
		}
	}
	return true
}

// stop ends everything, and waits for it.
func (w *world) stop() {
	w.mu.Lock()
	alive := w.alive
	w.alive = map[*parent]bool{}
	w.mu.Unlock()
	for p := range alive {
		p.stop()
	}
	w.end()
	for _, e := range w.enclaves {
		e.server.Close()
	}
	w.running.Wait()
}

// importAll imports as often as it takes: whoever does it dies now and then, and
// starts again with the same input.
func (w *world) importAll(name string, n int, key record.KeyID) {
	var in strings.Builder
	for i := range n {
		p := base64.StdEncoding.EncodeToString([]byte(w.plan.payload(name, i)))
		fmt.Fprintf(&in, "{\"id\":\"%s-%d\",\"payload\":%q}\n", name, i, p)
	}
	for w.ctx.Err() == nil {
		p := w.newParent("import "+name, 0)
		_, err := intake.Run(p.ctx, &view{Store: w.tables, p: p}, strings.NewReader(in.String()), intake.Options{
			ImportID: record.ImportID(name), Pool: pool, Kind: record.Message, KeyID: key,
			BatchSize: w.plan.batchSize, SigLen: record.Ed25519.SignatureLen(), Now: p.now,
		})
		p.leave()
		if err == nil {
			break
		}
		sleep(w.ctx, upTo(w.dice.of("rest of "+name), time.Second))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.done[name] = true
}

// isCalm reports whether faults have stopped.
func (w *world) isCalm() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.calm
}

// enclave is a server that somebody starts again when it died.
type enclave struct {
	w      *world
	name   string
	server *enclavetest.Server
	died   chan struct{}
}

func newEnclave(t *testing.T, w *world, i int) *enclave {
	t.Helper()
	e := &enclave{w: w, name: fmt.Sprintf("enclave-%d", i), died: make(chan struct{}, 1)}
	rate := clockRate(w.dice.of(e.name + " clock"))
	s, err := enclavetest.New(w.ctx, enclavetest.Options{
		Sealed: w.keys.sealed(w.plan.keys, w.plan.cold), KMS: w.keys.kms,
		Device: func() (nsm.Session, error) { return newDevice(w.keys.document), nil },
		Mono:   func() time.Duration { return time.Duration(float64(time.Since(w.start)) * rate) },
		Poison: e.beforeRecord,
	})
	must(t, err)
	e.server = s
	w.judge.booted(e)
	w.running.Go(e.keep)
	return e
}

// beforeRecord takes the time of one signature, and says whether it kills.
func (e *enclave) beforeRecord(payload []byte) bool {
	boot := e.w.judge.boot(e)
	dead := func() bool { return e.w.judge.gone(&conn{e: e, boot: boot}) }
	if dead() {
		return false // a batch that nobody waits for any more
	}
	r := e.w.dice.of(e.name + " signs " + string(payload))
	d := upTo(r, 20*time.Millisecond)
	step, slow := e.w.judge.signing(e, string(payload))
	switch calm := e.w.isCalm(); {
	case slow && !calm:
		d += upTo(r, shortLease)
		e.w.cover.add(slowSign, step, 1)
	case !calm && r.Float64() < e.w.plan.slow:
		d += upTo(r, 12*time.Second)
		e.w.cover.add(slowSign, step, 1)
	}
	sleep(e.w.ctx, d)
	if dead() || !isPoison(string(payload)) {
		return false
	}
	e.w.cover.add(poisoned, step, 1)
	e.tellDead("poison")
	return true
}

func (e *enclave) crash(why string) {
	e.tellDead(why)
	e.server.Crash()
}

func (e *enclave) tellDead(why string) {
	e.w.trace.add(e.w.start, e.name, "crash", why, "")
	e.w.judge.died(e)
	select {
	case e.died <- struct{}{}:
	default:
	}
}

// keep boots it again some time after each death.
func (e *enclave) keep() {
	r := e.w.dice.of(e.name + " restarts")
	for {
		select {
		case <-e.died:
		case <-e.w.ctx.Done():
			return
		}
		sleep(e.w.ctx, 100*time.Millisecond+upTo(r, 5*time.Second))
		if e.w.ctx.Err() != nil || e.server.Restart(e.w.ctx) != nil {
			return
		}
		e.w.judge.booted(e)
		e.w.trace.add(e.w.start, e.name, "boot", "", "")
	}
}

func clockRate(r *rand.Rand) float64 { return 1 + rateSpread*(2*r.Float64()-1) }

// sleep for d or until ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
