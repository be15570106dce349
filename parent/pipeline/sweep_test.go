package pipeline_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent"
	"github.com/keyhold/keyhold/parent/audit"
	"github.com/keyhold/keyhold/parent/intake"
	"github.com/keyhold/keyhold/parent/pipeline"
	"github.com/keyhold/keyhold/parent/provision"
	"github.com/keyhold/keyhold/parent/signclient"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/memory"
)

// How big the run is whose calls are spoiled.
const (
	sweepKeys    = 2
	sweepBatches = 2
	sweepRecords = 3 // of both batches together
	rerunMost    = 6 // of a command that says that it failed: two faults, a restart, and some room
)

// stage is a whole life of an import. The phase under test meets the faults; the
// others go well.
type stage struct {
	t       *testing.T
	plot    *plot
	tables  *memory.Store
	store   store.Store // with faults
	enclave *enclavetest.Server
	tap     *wiretap
	cfg     *config.Config
}

// phase of the life of an import.
type phase struct {
	name string
	run  func(*stage)
}

var phases = []phase{
	{"provision", (*stage).provision},
	{"import", (*stage).bringIn},
	{"sign", (*stage).sign},
}

// bringUp takes the place of sign: a whole parent, which brings its enclave up.
var bringUp = phase{"bring-up", (*stage).bringUp}

// play one phase under faults, the others without, and audit what is there.
func play(t *testing.T, of phase, faults ...fault) (p *plot) {
	t.Helper()
	p = &plot{faults: faults}
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, p)
		for _, ph := range phases {
			switch {
			case ph.name == of.name:
				s.under(ph)
			case ph.name == "sign" && of.name == bringUp.name:
				s.restart() // an enclave that knows nothing
				s.under(bringUp)
			default:
				ph.run(s)
			}
		}
		s.check()
	})
	return p
}

func (s *stage) under(ph phase) {
	s.plot.begin()
	ph.run(s)
	s.plot.end()
}

func newStage(t *testing.T, p *plot) *stage {
	t.Helper()
	ca, err := nsmtest.NewCA(time.Now)
	must(t, err)
	e, err := enclavetest.New(t.Context(), enclavetest.Options{Bare: true, CA: ca})
	must(t, err)
	t.Cleanup(e.Close)
	cfg, err := config.Parse(e.Config())
	must(t, err)
	s := &stage{t: t, plot: p, tables: memory.New(), enclave: e, cfg: cfg, tap: &wiretap{p: p, enclave: e}}
	s.store = &plotted{&faulty{Store: s.tables, t: t}, p}
	t.Cleanup(s.tap.running.Wait)
	return s
}

// restart the enclave, as an operator does.
func (s *stage) restart() { must(s.t, s.enclave.Restart(s.t.Context())) }

// again runs a command until it says that it is done.
func (s *stage) again(what string, command func() error) {
	s.t.Helper()
	for n := 1; ; n++ {
		err := command()
		switch {
		case err == nil:
			return
		case n == rerunMost:
			s.t.Fatalf("%s: still after %d runs: %v", what, n, err)
		case errors.Is(err, refusal.KeyringConflict):
			s.restart() // as its text says
		}
	}
}

func (s *stage) provision() {
	s.again("provision", func() error {
		c, err := signclient.Connect(s.t.Context(), s.tap.dial, signclient.Options{})
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Configure(s.t.Context(), &wire.Configure{Config: s.enclave.Config()}); err != nil {
			return err
		}
		_, err = provision.Run(s.t.Context(), c, s.store, s.cfg, provision.Options{
			Algorithm: record.Ed25519, Policy: "default", Pool: pool, Count: sweepKeys,
		})
		return err
	})
}

func (s *stage) bringIn() {
	input := `{"id":"a","text":"one"}` + "\n" + `{"id":"b","text":"two"}` + "\n" + `{"text":"three"}` + "\n"
	s.again("import", func() error {
		_, err := intake.Run(s.t.Context(), s.store, strings.NewReader(input), intake.Options{
			ImportID: importID, Pool: pool, Kind: record.Message, BatchSize: 2, SigLen: 64, SpoolDir: s.t.TempDir(), Now: time.Now,
		})
		return err
	})
}

// untilSigned runs a parent until every batch is signed.
func (s *stage) untilSigned(run func(context.Context) error) {
	s.t.Helper()
	ctx, cancel := context.WithCancel(s.t.Context())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx) }()
	for end := time.Now().Add(30 * time.Minute); !s.signed(); pass(50 * time.Millisecond) {
		if time.Now().After(end) {
			s.t.Error("not signed after half an hour")
			break
		}
	}
	cancel()
	must(s.t, <-ended)
}

func (s *stage) signed() bool {
	for n := range sweepBatches {
		b, err := s.tables.Batch(s.t.Context(), record.MakeBatchID(importID, n))
		must(s.t, err)
		if b.State != record.Signed {
			return false
		}
	}
	return true
}

func (s *stage) sign() {
	s.untilSigned(func(ctx context.Context) error {
		return pipeline.Run(ctx, pipeline.Config{
			Store: s.store, Workers: 1, Lease: lease, Owner: "parent", Rand: rand.New(rand.NewPCG(1, 1)),
			Logger:   slog.New(slog.DiscardHandler),
			Enclaves: []pipeline.Enclave{{Name: "one", Connect: connect(s.tap.dial)}},
		})
	})
}

func (s *stage) bringUp() {
	s.untilSigned(func(ctx context.Context) error {
		return parent.Run(ctx, parent.Config{
			Store: s.store, Enclaves: []parent.Enclave{{Name: "one", Dial: s.tap.dial}}, EnclaveConfig: s.enclave.Config(),
			Root: attestation.TestRoot(s.enclave.CA().Root()), Images: []attestation.Image{{PCRs: map[int][]byte{0: s.enclave.PCR0()}}},
			Workers: 1,
		})
	})
}

// check: every record is signed once, no key is held, every receipt verifies up
// to the root, and what is signed twice or without a receipt would be a problem.
func (s *stage) check() {
	s.t.Helper()
	pcr16 := config.PCR16(s.enclave.Config())
	r, err := audit.Run(s.t.Context(), s.tables, audit.Options{
		Receipts: true, Root: attestation.TestRoot(s.enclave.CA().Root()), Configs: []*config.Config{s.cfg},
		Images: []attestation.Image{{PCRs: map[int][]byte{0: s.enclave.PCR0(), 16: pcr16[:]}}},
	})
	if err != nil || r.Signed != sweepRecords || r.Proved != sweepRecords || r.Records != sweepRecords || r.Problems != 0 {
		s.t.Errorf("audit: %v, %+v", err, r)
	}
	keys := 0
	must(s.t, s.tables.Keys(s.t.Context(), "test#1", func(page []store.Key) error {
		for _, k := range page {
			keys++
			if l, err := s.tables.Lease(s.t.Context(), k.ID); err != nil || !l.Idle() {
				s.t.Errorf("key %s is held: %v", k.ID, err)
			}
		}
		return nil
	}))
	if keys != sweepKeys {
		s.t.Errorf("%d keys, want %d", keys, sweepKeys)
	}
}

// Every remote call of a small run goes wrong once, in each way.
func TestEveryRemoteCallMayGoWrongInEveryWay(t *testing.T) {
	for _, ph := range append(phases[:len(phases):len(phases)], bringUp) {
		t.Run(ph.name, func(t *testing.T) {
			calls := play(t, ph).calls
			hit := map[string]bool{}
			for nth := range calls {
				for _, w := range ways {
					p := play(t, ph, fault{nth + 1, w})
					if t.Failed() {
						t.Fatalf("call %d of %d, %s, %s", nth+1, len(calls), p.calls[min(nth, len(p.calls)-1)], w)
					}
					if p.hit > 0 {
						hit[fmt.Sprint(p.calls[nth], w)] = true
					}
				}
			}
			t.Logf("%d calls, %d runs, %d pairs of call and way: %v", len(calls), len(calls)*len(ways), len(hit), calls)
		})
	}
}

var _ = os.Getenv
