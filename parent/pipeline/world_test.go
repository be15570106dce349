package pipeline_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/payload"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/parent/pipeline"
	"github.com/keyhold/keyhold/parent/signclient"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/memory"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	pool     = "main"
	importID = record.ImportID("imp")
	lease    = 10 * time.Second
)

// plan says how big a world is.
type plan struct {
	keys, batches, records int // records of one batch
	enclaves               int // 0: 1
	seed                   uint64
	poison                 func(payload []byte) bool
	pinned                 int         // batches that name the first key
	kind                   record.Kind // empty: message
	bare                   bool        // the enclave has the keyring open and no key loaded
}

// world is a store with an import in it, and enclaves that share a keyring.
type world struct {
	t        *testing.T
	plan     plan
	store    *memory.Store
	enclaves []*enclavetest.Server
	public   map[record.KeyID]sealed.Public
	running  sync.WaitGroup
	parents  int
}

func newWorld(t *testing.T, p plan) *world {
	t.Helper()
	w := &world{t: t, plan: p, store: memory.New(), public: map[record.KeyID]sealed.Public{}}
	if w.plan.kind == "" {
		w.plan.kind = record.Message
	}
	first := w.boot(enclavetest.Options{Keys: p.keys, Algorithm: record.Ed25519, Poison: p.poison})
	ring := first.Sealed()
	if p.bare {
		first.Crash()
		w.enclaves = nil
		w.boot(enclavetest.Options{Sealed: &enclavetest.Sealed{Header: ring.Header}, KMS: first.KMS(), CA: first.CA()})
	}
	for range max(p.enclaves-1, 0) {
		w.boot(enclavetest.Options{Sealed: &ring, KMS: first.KMS(), CA: first.CA(), Poison: p.poison})
	}
	h, err := sealed.DecodeHeader(ring.Header)
	must(t, err)
	must(t, w.store.PutKeyring(t.Context(), h.ID(), ring.Header))
	for i, k := range first.Keys() {
		w.public[k.KeyID] = k
		must(t, w.store.PutKeys(t.Context(), []store.Key{{ID: k.KeyID, Keyring: h.ID(), Pool: pool, Sealed: ring.Entries[i]}}))
	}
	w.fill(first.Keys()[0].KeyID)
	t.Cleanup(w.running.Wait)
	return w
}

func (w *world) boot(o enclavetest.Options) *enclavetest.Server {
	w.t.Helper()
	s, err := enclavetest.New(w.t.Context(), o)
	must(w.t, err)
	w.t.Cleanup(s.Close)
	w.enclaves = append(w.enclaves, s)
	return s
}

func (w *world) fill(pinned record.KeyID) {
	w.t.Helper()
	ctx := w.t.Context()
	imp := store.Import{ID: importID, BatchSize: w.plan.records, Pool: pool, Kind: w.plan.kind, CreatedAt: time.Now()}
	_, err := w.store.OpenImport(ctx, imp)
	must(w.t, err)
	for n := range w.plan.batches {
		rs := w.records(n)
		b := store.Batch{
			ID: record.MakeBatchID(importID, n), ImportID: importID, State: record.Ready, Pool: pool, Kind: w.plan.kind,
			Count: len(rs), PayloadRoot: receipt.PayloadRoot(w.plan.kind, rs), VisibleAt: time.Now(),
		}
		if n < w.plan.pinned {
			b.KeyID, b.Pinned = pinned, true
		}
		_, err := w.store.PutPayload(ctx, b.ID, record.EncodePayload(rs))
		must(w.t, err)
		must(w.t, w.store.PutBatch(ctx, b))
	}
	imp.Records, imp.Batches, imp.DoneAt = w.plan.batches*w.plan.records, w.plan.batches, time.Now()
	must(w.t, w.store.FinishImport(ctx, imp))
}

func (w *world) records(batch int) []record.Record {
	rs := make([]record.Record, w.plan.records)
	for i := range rs {
		rs[i].Payload = fmt.Appendf(nil, "payload %d of batch %d", i, batch)
	}
	return rs
}

// config of another parent of this world.
func (w *world) config() pipeline.Config {
	w.parents++
	cfg := pipeline.Config{
		Store: w.store, Workers: 2, Lease: lease, Owner: fmt.Sprintf("parent-%d", w.parents),
		Rand: rand.New(rand.NewPCG(w.plan.seed, uint64(w.parents))), Logger: slog.New(slog.DiscardHandler),
	}
	for i, e := range w.enclaves {
		cfg.Enclaves = append(cfg.Enclaves, pipeline.Enclave{Name: fmt.Sprint(i), Connect: connect(e.Dial)})
	}
	return cfg
}

func connect(dial signclient.Dialer) func(context.Context) (*signclient.Client, error) {
	return func(ctx context.Context) (*signclient.Client, error) {
		return signclient.Connect(ctx, dial, signclient.Options{})
	}
}

// start runs a parent until stop, which waits for it.
func (w *world) start(cfg pipeline.Config) (stop func()) {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.t.Context())
	ended := make(chan struct{})
	w.running.Go(func() {
		defer close(ended)
		if err := pipeline.Run(ctx, cfg); err != nil {
			w.t.Errorf("run: %v", err)
		}
	})
	return func() { cancel(); <-ended }
}

// batches reads every control item.
func (w *world) batches() []store.Batch {
	w.t.Helper()
	out := make([]store.Batch, w.plan.batches)
	for n := range out {
		b, err := w.store.Batch(context.WithoutCancel(w.t.Context()), record.MakeBatchID(importID, n))
		must(w.t, err)
		out[n] = b
	}
	return out
}

// await polls until every batch is in one of those states.
func (w *world) await(within time.Duration, states ...record.State) {
	w.t.Helper()
	w.until(within, func() bool {
		return !slices.ContainsFunc(w.batches(), func(b store.Batch) bool { return !slices.Contains(states, b.State) })
	})
}

// until polls a condition on the bubble's clock.
func (w *world) until(within time.Duration, done func() bool) {
	w.t.Helper()
	end := time.Now().Add(within)
	for !done() {
		if time.Now().After(end) {
			for _, b := range w.batches() {
				if b.State != record.Signed {
					w.t.Logf("%s: %s, attempts %d, owner %s, %v", b.ID, b.State, b.Attempts, b.Owner, b.History)
				}
			}
			w.t.Fatalf("not there after %s", within)
		}
		pass(max(20*time.Millisecond, within/3000))
	}
}

// pass lets time go by in a bubble.
func pass(d time.Duration) { <-time.After(d) }

// check reads what is stored: one result a batch, whose signatures verify and
// whose receipt vouches for it; receipts without gaps; every key idle.
func (w *world) check() (refused map[string]int) {
	w.t.Helper()
	refused = map[string]int{}
	for n, b := range w.batches() {
		if b.State != record.Signed {
			w.t.Errorf("%s is %s", b.ID, b.State)
			continue
		}
		w.checkBatch(n, &b, refused)
	}
	ctx := context.WithoutCancel(w.t.Context())
	for id := range w.public {
		l, err := w.store.Lease(ctx, id)
		must(w.t, err)
		if !l.Idle() {
			w.t.Errorf("key %s is held for %s", id, l.BatchID)
		}
	}
	boots, err := w.store.Boots(ctx)
	must(w.t, err)
	for _, boot := range boots {
		for lane := range uint32(200) {
			next := uint64(0)
			must(w.t, w.store.Receipts(ctx, boot.ID, lane, 1, func(r store.Receipt) error {
				if next != 0 && next != r.Ref.Seq { // the kit has acknowledged the receipts of new keys itself
					return fmt.Errorf("lane %d: receipt %d where %d is next", lane, r.Ref.Seq, next)
				}
				next = r.Ref.Seq + 1
				return nil
			}))
		}
	}
	return refused
}

func (w *world) checkBatch(n int, b *store.Batch, refused map[string]int) {
	w.t.Helper()
	ctx := context.WithoutCancel(w.t.Context())
	raw, err := w.store.Result(ctx, b.ID)
	must(w.t, err)
	_, out, err := record.DecodeResult(raw)
	must(w.t, err)
	rs := w.records(n)
	public, ok := w.public[b.KeyID]
	if !ok || len(out) != len(rs) {
		w.t.Fatalf("%s: key %s, %d outcomes", b.ID, b.KeyID, len(out))
	}
	count := 0
	for i, o := range out {
		if o.Refusal != "" {
			refused[o.Refusal]++
			count++
		} else if err := payload.Verify(public.Algorithm, public.PublicKey, w.plan.kind, rs[i].Payload, o.Signature); err != nil {
			w.t.Errorf("%s record %d: %v", b.ID, i, err)
		}
	}
	if count != b.Refused {
		w.t.Errorf("%s: %d refused, item says %d", b.ID, count, b.Refused)
	}
	if b.Receipt == (store.ReceiptRef{}) {
		if count != len(out) {
			w.t.Errorf("%s has signatures and no receipt", b.ID)
		}
		return
	}
	item, err := w.store.Receipt(ctx, b.Receipt)
	must(w.t, err)
	signed, err := receipt.Decode[receipt.Signed](item.Signed)
	must(w.t, err)
	r, err := receipt.Decode[receipt.Receipt](signed.Body)
	must(w.t, err)
	if r.BatchID != b.ID || r.KeyFence != b.KeyFence || r.BatchFence != b.Fence || r.ResultRoot != receipt.ResultRoot(out) {
		w.t.Errorf("%s: its receipt is of another batch, fence or result", b.ID)
	}
}

// attempts of all batches together.
func (w *world) attempts() (n int) {
	for _, b := range w.batches() {
		n += b.Attempts
	}
	return n
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var errUnknown = errors.New("no answer")
