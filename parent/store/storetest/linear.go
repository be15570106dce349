package storetest

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

// checkWithin bounds the search through the orders of one history.
const checkWithin = 30 * time.Second

// Linear says which histories are made.
type Linear struct {
	// Open returns two views of one empty store: of what fills it, and of the
	// clients, whose calls may fail before and after they were applied.
	Open    func(t *testing.T, seed uint64) (clean, clients store.Store)
	Rounds  int // of each workload, each with a store of its own
	Clients int
	Steps   int // of each client
}

// Verdict counts what was checked.
type Verdict struct {
	Histories, Calls, Unknown int
	Rejected                  int // histories that no order of their calls explains
	Undecided                 int // the search took too long
}

func (v Verdict) String() string {
	return fmt.Sprintf("%d histories of %d calls, %d of unknown outcome: %d rejected, %d undecided",
		v.Histories, v.Calls, v.Unknown, v.Rejected, v.Undecided)
}

// Add another verdict.
func (v *Verdict) Add(o Verdict) {
	v.Histories += o.Histories
	v.Calls += o.Calls
	v.Unknown += o.Unknown
	v.Rejected += o.Rejected
	v.Undecided += o.Undecided
}

// Run has clients use stores side by side and checks that each history can be
// explained by the calls being made one after the other, as package store says.
// Histories that cannot are drawn in the test's artifact directory.
func (l Linear) Run(t *testing.T) (v Verdict) {
	t.Helper()
	for _, w := range []workload{queueWorkload(), importWorkload(), reserveWorkload(), onceWorkload()} {
		for round := range l.Rounds {
			seed := uint64(round)
			clean, clients := l.Open(t, seed)
			w.fill(&fixture{T: t, Store: clean})
			h := &History{}
			l.drive(t.Context(), &w, h, clients, seed)
			v.Add(h.check(t, w.name, w.part, w.model))
		}
	}
	return v
}

// drive runs the clients until each has taken its steps.
func (l Linear) drive(ctx context.Context, w *workload, h *History, s store.Store, seed uint64) {
	var start, done sync.WaitGroup
	start.Add(1)
	for n := range l.Clients {
		a := &actor{
			Store: &yielding{h.Client(n, s)}, name: fmt.Sprintf("p%d", n),
			r: rand.New(rand.NewPCG(seed, uint64(n))), //nolint:gosec // repeatable by intention
		}
		done.Go(func() {
			start.Wait()
			for a.step = range l.Steps {
				w.act(ctx, a)
			}
		})
	}
	start.Done()
	done.Wait()
}

// check each part of the history by itself. What part calls "" is left out.
func (h *History) check(t *testing.T, name string, part func(call any) string, model func(part string) porcupine.Model) (v Verdict) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	parts := map[string][]porcupine.Operation{}
	for _, c := range h.calls {
		of := part(c.Input)
		if of == "" {
			continue
		}
		parts[of] = append(parts[of], c)
		v.Calls++
		if out, ok := c.Output.(answer); ok && out.unknown {
			v.Unknown++
		}
	}
	for of, calls := range parts {
		v.Histories++
		m := model(of)
		result, info := porcupine.CheckOperationsVerbose(m, calls, checkWithin)
		switch result {
		case porcupine.Ok:
		case porcupine.Unknown:
			v.Undecided++
		case porcupine.Illegal:
			v.Rejected++
			draw(t, name+"-"+of, m, info)
			tellOf(t, calls)
		}
	}
	return v
}

// draw writes the history for a browser. Run with -artifacts to keep it.
func draw(t *testing.T, name string, m porcupine.Model, info porcupine.LinearizationInfo) {
	t.Helper()
	f, err := os.CreateTemp(t.ArtifactDir(), filepath.Base(name)+"-*.html")
	if err == nil {
		err = errors.Join(porcupine.Visualize(m, info, f), f.Close())
	}
	if err != nil {
		t.Errorf("draw a history: %v", err)
		return
	}
	t.Logf("no order explains %s: %s", name, f.Name())
}

// tellOf prints the calls of a history, since nobody keeps the folder that draw writes to in CI.
func tellOf(t *testing.T, calls []porcupine.Operation) {
	t.Helper()
	for _, c := range calls {
		ended := fmt.Sprint(c.Return)
		if c.Return == math.MaxInt64 {
			ended = "never"
		}
		t.Logf("client %d, %d to %s: %s", c.ClientId, c.Call, ended, describe(c.Input, c.Output))
	}
}

// yielding gives other clients a turn between two calls, so that a store that is
// faster than the scheduler meets interleavings too.
type yielding struct{ store.Store }

func (y *yielding) Batch(ctx context.Context, id record.BatchID) (store.Batch, error) {
	runtime.Gosched()
	return y.Store.Batch(ctx, id)
}

func (y *yielding) Lease(ctx context.Context, id record.KeyID) (store.Lease, error) {
	runtime.Gosched()
	return y.Store.Lease(ctx, id)
}
