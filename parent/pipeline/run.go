package pipeline

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

const (
	firstPause = 10 * time.Millisecond // of a back-off, doubled each time
	lastPause  = 2 * time.Second
	inFlight   = 2 // batches of one worker: one is claimed and read while the other is signed
)

// pipeline is what claimer and workers share.
type pipeline struct {
	Config
	dice  dice
	claim *claimer

	mu    sync.Mutex
	boots map[record.BootID]bool // stored
}

// Run signs what is in the queue until ctx ends. Then it gives back claims of
// which nothing was sent, lets the others finish within a lease, and returns nil.
// A database or an enclave that is away for a while ends nothing.
func Run(ctx context.Context, cfg Config) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	p := &pipeline{Config: cfg.withDefaults(), boots: map[record.BootID]bool{}}
	p.dice.r = cfg.Rand
	p.claim = newClaimer(p)

	work, stop := context.WithCancel(context.WithoutCancel(ctx)) // goes on for a lease after ctx
	defer stop()
	var workers, others sync.WaitGroup
	for _, e := range p.Enclaves {
		gate := semaphore.NewWeighted(int64(p.Workers * inFlight))
		for range p.Workers {
			w := &worker{p: p, enclave: e, gate: gate, connecting: make(chan struct{}, 1)}
			workers.Go(func() { w.run(ctx, work) })
		}
	}
	others.Go(func() { p.claim.run(ctx, work) })
	others.Go(func() { p.stopLate(ctx, work, stop) })
	workers.Wait()
	stop()
	others.Wait()
	return nil
}

// stopLate stops the work a lease after ctx has ended, if it has not ended by
// itself.
func (p *pipeline) stopLate(ctx, work context.Context, stop context.CancelFunc) {
	<-ctx.Done() // workers never end before it
	_ = wait(work, p.Lease, nil)
	stop()
}

// run is one worker: two batches at a time over one connection.
func (w *worker) run(ctx, work context.Context) {
	var slots sync.WaitGroup
	for range inFlight {
		slots.Go(func() { w.slot(ctx, work) })
	}
	slots.Wait()
	w.hangUp(work)
}

// slot carries one batch after the other.
func (w *worker) slot(ctx, work context.Context) {
	for failures := 0; ctx.Err() == nil; {
		s, err := w.session(ctx)
		if err != nil {
			return // ctx has ended
		}
		c, err := w.p.claim.ask(ctx, work, s)
		switch {
		case err != nil:
			w.p.Logger.DebugContext(ctx, "no ticket", slog.String("enclave", w.enclave.Name), slog.Any("error", err))
			failures++
		case c == nil:
			continue // the ticket grew old meanwhile, or ctx has ended
		case w.carry(ctx, work, s, c):
			failures = 0
			continue
		default:
			failures++
		}
		_ = w.p.pause(ctx, failures) // it ends early with ctx, which the loop looks at
	}
}

// pause waits longer with each failure in a row, with jitter.
func (p *pipeline) pause(ctx context.Context, failures int) error {
	d := min(firstPause<<min(max(failures-1, 0), 16), lastPause)
	return wait(ctx, p.dice.around(d), nil)
}

// wait for d, for wake, or for the end of ctx.
func wait(ctx context.Context, d time.Duration, wake <-chan struct{}) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-wake:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

// insist calls f until it returns nil, a sentinel that says more tries will not
// help, or ctx ends. f must be safe to repeat.
func (p *pipeline) insist(ctx context.Context, op string, f func(context.Context) error) error {
	for failures := 1; ; failures++ {
		err := f(ctx)
		if err == nil || isFinal(err) {
			return err
		}
		if ctx.Err() != nil {
			return err
		}
		p.storeFailed(ctx, op, err)
		if p.pause(ctx, failures) != nil {
			return err
		}
	}
}

// isFinal reports whether the store answered, and will answer so again.
func isFinal(err error) bool {
	return errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrFenced) ||
		errors.Is(err, store.ErrTaken) || errors.Is(err, store.ErrDiffers)
}

func (p *pipeline) storeFailed(ctx context.Context, op string, err error) {
	p.Observer.StoreFailed(op)
	p.Logger.WarnContext(ctx, "store call failed", slog.String("operation", op), slog.Any("error", err))
}

// batch reads a control item consistently, however long that takes.
func (p *pipeline) batch(ctx context.Context, id record.BatchID) (b store.Batch, err error) {
	err = p.insist(ctx, "read batch", func(ctx context.Context) error {
		b, err = p.Store.Batch(ctx, id)
		return err
	})
	return b, err
}
