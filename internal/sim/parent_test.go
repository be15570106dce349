package sim_test

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/pipeline"
	"github.com/keyhold/keyhold/parent/signclient"
)

// parent is one process on a host of its own, from start to death.
type parent struct {
	w     *world
	name  string
	lease time.Duration
	skew  time.Duration // of its wall clock
	rate  float64       // of its other one

	ctx  context.Context //nolint:containedctx // ends when it is told to stop, or dies
	stop context.CancelFunc
	dead chan struct{} // closed when it died: nothing that it does has any effect any more

	mu      sync.Mutex
	resumes time.Time // it stands still until then
	dials   map[string]int
	conns   []*nearConn
}

func (w *world) newParent(name string, slot int) *parent {
	w.mu.Lock()
	w.parents[name]++
	name = fmt.Sprintf("%s/%d", name, w.parents[name])
	w.mu.Unlock()
	r := w.dice.of("clock of " + name)
	p := &parent{
		w: w, name: name, lease: w.plan.leases[slot%len(w.plan.leases)], rate: clockRate(r),
		skew: time.Duration((2*r.Float64() - 1) * float64(wallSkew)),
		dead: make(chan struct{}), dials: map[string]int{},
	}
	p.ctx, p.stop = context.WithCancel(w.ctx)
	w.mu.Lock()
	w.alive[p] = true
	w.mu.Unlock()
	return p
}

func (p *parent) leave() {
	p.stop()
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	delete(p.w.alive, p)
}

func (p *parent) now() time.Time { return time.Now().Add(p.skew) }

func (p *parent) elapsed() time.Duration {
	return time.Duration(float64(time.Since(p.w.start)) * p.rate)
}

// keepParent runs one parent after the other: some are told to stop and end
// well, others die.
func (w *world) keepParent(slot int) {
	r := w.dice.of(fmt.Sprintf("life of parent %d", slot))
	if first := upTo(r, 2*time.Second); !w.plan.duel {
		sleep(w.ctx, first)
	}
	for w.ctx.Err() == nil {
		p := w.newParent(fmt.Sprintf("parent-%d", slot), slot)
		ended := make(chan struct{})
		w.running.Go(func() {
			defer close(ended)
			p.run()
		})
		shutdown := time.NewTimer(p.lifeTime(r))
		select {
		case <-shutdown.C:
			if w.isCalm() {
				<-p.ctx.Done()
				break
			}
			p.stop()
			<-ended
		case <-p.ctx.Done():
		}
		shutdown.Stop()
		p.leave()
		sleep(w.ctx, upTo(r, 3*time.Second))
	}
}

// lifeTime until it is told to stop.
func (p *parent) lifeTime(r *rand.Rand) time.Duration {
	if p.w.plan.calm || r.IntN(3) > 0 {
		return time.Hour
	}
	return upTo(r, 30*time.Second)
}

func (p *parent) run() {
	r := p.w.dice.of("owner of " + p.name)
	cfg := pipeline.Config{
		Store: &view{Store: p.w.tables, p: p}, Workers: 1, Lease: p.lease,
		Owner: fmt.Sprintf("%s-%x", p.name, r.Uint64()), Rand: rand.New(&source{d: p.w.dice, name: p.name}),
		Now: p.now, Elapsed: p.elapsed, Logger: slog.New(slog.DiscardHandler),
	}
	for _, e := range p.w.enclaves {
		cfg.Enclaves = append(cfg.Enclaves, pipeline.Enclave{Name: e.name, Connect: p.connector(e)})
	}
	if err := pipeline.Run(p.ctx, cfg); err != nil {
		p.w.judge.fail("run", "%s: %v", p.name, err)
	}
}

func (p *parent) connector(e *enclave) func(context.Context) (*signclient.Client, error) {
	return func(ctx context.Context) (*signclient.Client, error) {
		if err := p.travel(ctx, upTo(p.w.dice.of(p.name+" to "+e.name), 5*time.Millisecond)); err != nil {
			return nil, err
		}
		dial, name := p.dialer(e)
		h := &hurdles{p: p, name: name}
		return signclient.Connect(ctx, dial, signclient.Options{Now: h.now, Trace: h.trace})
	}
}

// hurdles keep the two slots of a connection apart, for what ends a wait of one
// often ends that of the other: each takes a time of its own before it asks for
// anything and after every answer. While a connection is made only one of them
// works on it, and it does not matter which.
type hurdles struct {
	p    *parent
	name string

	mu     sync.Mutex
	asking int // goroutines between trace and now, which is one moment
}

func (h *hurdles) trace(t wire.Type) func(error) {
	name := h.name + " " + string(t)
	draw := h.p.w.dice.of
	if t != wire.TypeHello && t != wire.TypeReceipts {
		id := goroutine()
		draw = func(name string) *rand.Rand { return h.p.w.dice.mine(id, name) }
	}
	h.p.rest(upTo(draw(name), time.Millisecond))
	h.mu.Lock()
	h.asking++
	h.mu.Unlock()
	return func(error) { h.p.rest(upTo(draw(name), time.Millisecond)) }
}

// now is asked for the age of a ticket, and once more when a request is sent.
func (h *hurdles) now() time.Time {
	h.mu.Lock()
	asking := h.asking > 0
	if asking {
		h.asking--
	}
	h.mu.Unlock()
	if !asking {
		h.p.rest(upTo(h.p.w.dice.mine(goroutine(), h.name), time.Millisecond))
	}
	return time.Now()
}

// travel takes the time of one way, and longer while the parent stands still.
// What a dead parent waits for never comes.
func (p *parent) travel(ctx context.Context, d time.Duration) error {
	sleep(ctx, d)
	for ctx.Err() == nil && !p.isDead() {
		p.mu.Lock()
		still := time.Until(p.resumes)
		p.mu.Unlock()
		if still <= 0 {
			return nil
		}
		sleep(ctx, still+d)
	}
	if ctx.Err() == nil {
		<-ctx.Done()
	}
	return fmt.Errorf("travel: %w", ctx.Err())
}

// rest is travel for who has no context. It ends with the parent.
func (p *parent) rest(d time.Duration) {
	for until := time.Now().Add(d); ; {
		t := time.NewTimer(time.Until(until))
		select {
		case <-t.C:
		case <-p.dead:
		case <-p.w.ctx.Done():
		}
		t.Stop()
		p.mu.Lock()
		still := time.Until(p.resumes)
		p.mu.Unlock()
		if still <= 0 || p.isDead() || p.w.ctx.Err() != nil {
			return
		}
		until = time.Now().Add(still + d)
	}
}

func (p *parent) isDead() bool {
	select {
	case <-p.dead:
		return true
	default:
		return false
	}
}

// standStill for up to three leases: every call and every connection waits. Of
// two calls that have this happen at one moment the longer counts, whichever of
// their goroutines came first.
func (p *parent) standStill(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if until := time.Now().Add(d); until.After(p.resumes) {
		p.resumes = until
	}
}

// die at once: nothing has any effect any more, connections end a moment later.
func (p *parent) die() {
	p.mu.Lock()
	if p.isDead() {
		p.mu.Unlock()
		return
	}
	close(p.dead)
	conns := p.conns
	p.conns = nil
	p.mu.Unlock()
	p.w.trace.add(p.w.start, p.name, "dies", "", "")
	p.stop()
	p.w.running.Go(func() {
		for _, c := range conns { // a nanosecond apart, so that the enclave sees them in one order
			c.cut()
			sleep(p.w.ctx, 1)
		}
	})
}
