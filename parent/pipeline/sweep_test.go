package pipeline_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/awslocal/dynoxide/dynoxidetest"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
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
	sweepRing      = "test#1" // of enclavetest.DefaultConfig
	sweepKeys      = 2
	sweepBatches   = 2
	sweepBatchSize = 2
	sweepRecords   = sweepBatches * sweepBatchSize
	rerunMost      = 6 // of a command that says that it failed: two faults, a restart, and some room
)

// authority vouches for the documents of all runs: all begin at the same moment.
var authority = sync.OnceValues(func() (*nsmtest.CA, error) { return nsmtest.NewCA(time.Now) })

// copied is an NSM that signs one document for all its boots.
type copied struct{ nsm.Session }

var oneDocument = sync.OnceValues(func() ([]byte, error) {
	ca, err := authority()
	if err != nil {
		return nil, err
	}
	soft, err := nsmtest.New(ca, nsmtest.Options{PCRs: nsmtest.Measurements("enclavetest")})
	if err != nil {
		return nil, err
	}
	return soft.Attest(nsm.AttestRequest{})
})

func (*copied) Attest(nsm.AttestRequest) ([]byte, error) { return oneDocument() }

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

// weight says whether a run has attestation documents, which cost most of its time.
type weight bool

const (
	light weight = false
	heavy weight = true
)

// play one phase under faults, the others without, and look at what is there.
func play(t *testing.T, of phase, how weight, faults ...fault) (p *plot) {
	t.Helper()
	p = &plot{faults: faults}
	defer func() {
		if t.Failed() {
			t.Logf("%s with %v: %v", of.name, faults, p.calls)
		}
	}()
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, p, how)
		for _, ph := range phases {
			switch {
			case ph.name == "sign" && of.name == ph.name:
				s.restart() // a boot that nobody has stored, with keys to load on demand
				s.open()
				s.under(ph)
			case ph.name == of.name:
				s.under(ph)
			case ph.name == "sign" && of.name == bringUp.name:
				s.restart() // an enclave that knows nothing
				s.under(bringUp)
			default:
				ph.run(s)
			}
		}
		if s.checkLight(); how == heavy {
			s.check()
		}
		if of.name == "sign" && p.oneStoreError() {
			s.checkAttempts()
		}
	})
	return p
}

func (s *stage) under(ph phase) {
	s.plot.begin()
	ph.run(s)
	s.plot.end()
}

func newStage(t *testing.T, p *plot, how weight) *stage {
	t.Helper()
	ca, err := authority()
	must(t, err)
	o := enclavetest.Options{Bare: true, CA: ca}
	if how == light {
		o.Device = func() (nsm.Session, error) {
			soft, err := nsmtest.New(ca, nsmtest.Options{PCRs: nsmtest.Measurements("enclavetest")})
			return &copied{Session: soft}, err
		}
	}
	e, err := enclavetest.New(t.Context(), o)
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

// open hands the enclave its config and the keyring, without keys.
func (s *stage) open() {
	s.t.Helper()
	c, err := signclient.Connect(s.t.Context(), s.enclave.Dial, signclient.Options{})
	must(s.t, err)
	defer c.Close()
	_, err = c.Configure(s.t.Context(), &wire.Configure{Config: s.enclave.Config()})
	must(s.t, err)
	header, err := s.tables.Keyring(s.t.Context(), sweepRing)
	must(s.t, err)
	_, err = c.Load(s.t.Context(), &wire.Load{Header: header})
	must(s.t, err)
}

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
	var input strings.Builder
	for i := range sweepRecords { // as world.records has them; every second one has an id
		id := ""
		if i%2 == 0 {
			id = fmt.Sprintf(`"id":"r%d",`, i)
		}
		fmt.Fprintf(&input, `{%s"text":"payload %d of batch %d"}`+"\n", id, i%sweepBatchSize, i/sweepBatchSize)
	}
	s.again("import", func() error {
		_, err := intake.Run(s.t.Context(), s.store, strings.NewReader(input.String()), intake.Options{
			ImportID: importID, Pool: pool, Kind: record.Message, BatchSize: sweepBatchSize, SigLen: 64, SpoolDir: s.t.TempDir(), Now: time.Now,
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

// check: every record is signed once, and every receipt verifies up to the root.
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
	if keys := s.keys(); len(keys) != sweepKeys {
		s.t.Errorf("%d keys, want %d", len(keys), sweepKeys)
	}
}

func (s *stage) keys() (all []store.Key) {
	s.t.Helper()
	must(s.t, s.tables.Keys(s.t.Context(), sweepRing, func(page []store.Key) error {
		all = append(all, page...)
		return nil
	}))
	return all
}

// checkLight is check without documents: results, fences, roots, lanes, boots
// and keys.
func (s *stage) checkLight() {
	s.t.Helper()
	w := &world{t: s.t, store: s.tables, plan: plan{batches: sweepBatches, records: sweepBatchSize, kind: record.Message}}
	w.public = map[record.KeyID]sealed.Public{}
	for _, k := range s.keys() {
		entry, err := sealed.DecodeEntry(k.Sealed)
		must(s.t, err)
		w.public[k.ID] = entry.Public
	}
	if refused := w.check(); len(refused) != 0 {
		s.t.Errorf("refused: %v", refused)
	}
	for _, b := range w.batches() {
		if _, err := s.tables.Boot(s.t.Context(), b.Receipt.BootID); err != nil {
			s.t.Errorf("%s: what vouches for its receipt: %v", b.ID, err)
		}
	}
}

// checkAttempts: a store call that failed, whether it was applied or not, costs
// nothing but another look. Who guesses what became of it pays with an attempt.
func (s *stage) checkAttempts() {
	s.t.Helper()
	for n := range sweepBatches {
		b, err := s.tables.Batch(s.t.Context(), record.MakeBatchID(importID, n))
		must(s.t, err)
		if b.Attempts != 1 {
			s.t.Errorf("%s took %d attempts: %v", b.ID, b.Attempts, b.History)
		}
	}
}

// telling are the calls, from 1, that are not the third or later of a row of the
// same name: one look into an empty shard is like another.
func telling(calls []string) (ns []int) {
	for i, name := range calls {
		if i < 2 || name != calls[i-1] || name != calls[i-2] {
			ns = append(ns, i+1)
		}
	}
	return ns
}

// callsOf a phase that nothing disturbs. What comes after bringing up is the phase
// sign.
func callsOf(t *testing.T, ph phase) []string {
	t.Helper()
	calls := play(t, ph, lightest(ph)).calls
	if ph.name == bringUp.name {
		calls = calls[:slices.Index(calls, "store.ready")]
	}
	return calls
}

// fullSweep leaves no pair out.
func fullSweep() bool { return os.Getenv("KEYHOLD_SWEEP") == "full" }

// Every remote call of a small run goes wrong once, in each way.
func TestEveryRemoteCallMayGoWrongInEveryWay(t *testing.T) {
	for _, ph := range append(slices.Clone(phases), bringUp) {
		t.Run(ph.name, func(t *testing.T) {
			t.Parallel()
			calls := callsOf(t, ph)
			hit, runs, step := map[string]bool{}, 0, 1
			if testing.Short() {
				step = 7
			}
			for i, nth := range telling(calls) {
				for _, w := range ways {
					if runs++; (i+int(w))%step != 0 {
						continue
					}
					weight := lightest(ph)
					if w == notApplied || w == applied {
						weight = heavy
					}
					p := play(t, ph, weight, fault{nth, w})
					if p.hit > 0 {
						hit[fmt.Sprint(p.calls[nth-1], w)] = true
					}
				}
			}
			t.Logf("%d calls, %d runs with a fault, %d pairs of name and way", len(calls), runs/step, len(hit))
			if len(hit)*step < len(ways) {
				t.Errorf("only %v went wrong", hit)
			}
		})
	}
}

// Pairs of faults: the second one meets the recovery from the first.
const (
	recovery    = 6  // calls after a fault that are always tried too, whatever they are
	pairsInTurn = 61 // of so many pairs one is played, but in a full sweep
	auditInTurn = 50 // of so many played pairs one has documents and an audit
)

type pair [2]fault

// lightest a phase can be played: bringing up looks at documents.
func lightest(ph phase) weight { return weight(ph.name == bringUp.name) }

func pairsOf(calls []string) (all []pair) {
	ns := telling(calls)
	for _, i := range ns {
		js := slices.Clone(ns)
		for d := range recovery {
			js = append(js, i+1+d)
		}
		slices.Sort(js)
		for _, j := range slices.Compact(js) {
			for _, a := range ways {
				for _, b := range ways {
					if j > i {
						all = append(all, pair{{i, a}, {j, b}})
					}
				}
			}
		}
	}
	return all
}

func TestEveryTwoRemoteCallsMayGoWrong(t *testing.T) {
	for _, ph := range append(slices.Clone(phases), bringUp) {
		t.Run(ph.name, func(t *testing.T) {
			t.Parallel()
			calls := callsOf(t, ph)
			pairs := pairsOf(calls)
			turn := pairsInTurn
			switch {
			case fullSweep():
				turn = 1
			case testing.Short():
				turn = 20 * pairsInTurn
			case os.Getenv(dynoxidetest.RequireEnv) == "": // a plain go test; make test plays more
				turn = 5 * pairsInTurn
			}
			played, both := 0, 0
			for i := 0; i < len(pairs); i += turn {
				weight := lightest(ph)
				if played++; played%auditInTurn == 0 {
					weight = heavy
				}
				p := play(t, ph, weight, pairs[i][:]...)
				if p.hit == 2 {
					both++
				}
			}
			t.Logf("%d calls, %d of %d pairs played, in %d both faults came to pass", len(calls), played, len(pairs), both)
			if both == 0 {
				t.Error("no run had two faults")
			}
		})
	}
}
