package audit_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/audit"
	"github.com/keyhold/keyhold/parent/intake"
	"github.com/keyhold/keyhold/parent/pipeline"
	"github.com/keyhold/keyhold/parent/provision"
	"github.com/keyhold/keyhold/parent/signclient"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/memory"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type lane struct {
	boot   record.BootID
	number uint32
}

// tables is what an audit reads, as an attacker with write access has it.
type tables struct {
	imports  []store.Import
	batches  map[record.BatchID]store.Batch
	payloads map[record.BatchID][]byte
	results  map[record.BatchID][]byte
	keys     map[record.KeyID]store.Key
	boots    []store.Boot
	receipts map[lane][]store.Receipt
}

func (s *tables) Imports(context.Context) ([]store.Import, error) { return s.imports, nil }

func (s *tables) Import(_ context.Context, id record.ImportID) (store.Import, error) {
	for _, im := range s.imports {
		if im.ID == id {
			return im, nil
		}
	}
	return store.Import{}, store.ErrNotFound
}

func get[K comparable, V any](m map[K]V, k K) (V, error) {
	v, ok := m[k]
	if !ok {
		return v, store.ErrNotFound
	}
	return v, nil
}

func (s *tables) Batch(_ context.Context, id record.BatchID) (store.Batch, error) {
	return get(s.batches, id)
}

func (s *tables) Payload(_ context.Context, id record.BatchID) ([]byte, error) {
	return get(s.payloads, id)
}

func (s *tables) Result(_ context.Context, id record.BatchID) ([]byte, error) {
	return get(s.results, id)
}

func (s *tables) Key(_ context.Context, id record.KeyID) (store.Key, error) { return get(s.keys, id) }

func (s *tables) Keys(_ context.Context, ring string, f func([]store.Key) error) error {
	for _, k := range s.keys {
		if k.Keyring == ring {
			if err := f([]store.Key{k}); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *tables) Boots(context.Context) ([]store.Boot, error) { return s.boots, nil }

func (s *tables) Receipt(_ context.Context, ref store.ReceiptRef) (store.Receipt, error) {
	for _, r := range s.receipts[lane{ref.BootID, ref.Lane}] {
		if r.Ref == ref {
			return r, nil
		}
	}
	return store.Receipt{}, store.ErrNotFound
}

func (s *tables) Receipts(_ context.Context, boot record.BootID, n uint32, from uint64, f func(store.Receipt) error) error {
	for _, r := range s.receipts[lane{boot, n}] {
		if r.Ref.Seq >= from {
			if err := f(r); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *tables) clone() *tables {
	c := &tables{
		imports: slices.Clone(s.imports), batches: maps.Clone(s.batches), payloads: maps.Clone(s.payloads),
		results: maps.Clone(s.results), keys: maps.Clone(s.keys), boots: slices.Clone(s.boots), receipts: maps.Clone(s.receipts),
	}
	for at := range c.receipts {
		c.receipts[at] = slices.Clone(c.receipts[at])
	}
	return c
}

// edit changes one batch's control item.
func (s *tables) edit(id record.BatchID, change func(*store.Batch)) {
	b := s.batches[id]
	change(&b)
	s.batches[id] = b
}

// replace changes the bytes of one receipt.
func (s *tables) replace(ref store.ReceiptRef, signed []byte) {
	in := s.receipts[lane{ref.BootID, ref.Lane}]
	in[slices.IndexFunc(in, func(r store.Receipt) bool { return r.Ref == ref })].Signed = signed
}

func (s *tables) add(r store.Receipt) {
	at := lane{r.Ref.BootID, r.Ref.Lane}
	s.receipts[at] = append(s.receipts[at], r)
}

func flipped(b []byte, i int) []byte {
	c := bytes.Clone(b)
	c[i] ^= 1 << (i % 8)
	return c
}

// world is an undisturbed run and what verifies it.
type world struct {
	tables *tables
	opt    audit.Options
	raw    []byte // the config

	// What an attacker can have the enclave of the last boot sign beside it.
	twice store.Receipt // a batch of the run, with another key
	ghost store.Receipt // a batch that is in no table
}

// run is how big a world is.
type run struct {
	boots int // each signs imports of its own
	idle  int // connections that hold the first lanes and never sign
}

// Imports of the nth boot, by what comes of them.
func signedImport(n int) record.ImportID { return record.ImportID(fmt.Sprintf("signed-%d", n)) }
func mixedImport(n int) record.ImportID  { return record.ImportID(fmt.Sprintf("mixed-%d", n)) }
func deniedImport(n int) record.ImportID { return record.ImportID(fmt.Sprintf("denied-%d", n)) }

const batchesOfBoot = 4 // two of signed, one each of the others

var (
	oneBoot  = sync.OnceValues(func() (*world, error) { return newWorld(run{boots: 1}) })
	twoBoots = sync.OnceValues(func() (*world, error) { return newWorld(run{boots: 2}) })
	crowded  = sync.OnceValues(func() (*world, error) { return newWorld(run{boots: 1, idle: 40}) })
)

// of returns a copy to spoil.
func of(t *testing.T, made func() (*world, error)) *world {
	t.Helper()
	w, err := made()
	must(t, err)
	c := *w
	c.tables = w.tables.clone()
	return &c
}

func newWorld(r run) (w *world, err error) {
	ctx, cancel := context.WithCancel(context.Background()) // the worlds are shared by tests
	defer cancel()
	e, err := enclavetest.New(ctx, enclavetest.Options{Bare: true})
	if err != nil {
		return nil, err
	}
	defer e.Close()
	cfg, err := config.Parse(e.Config())
	if err != nil {
		return nil, err
	}
	pcr16 := config.PCR16(e.Config())
	w = &world{raw: e.Config(), opt: audit.Options{
		Receipts: true, Root: attestation.TestRoot(e.CA().Root()), Configs: []*config.Config{cfg},
		Images: []attestation.Image{{PCRs: map[int][]byte{0: e.PCR0(), 16: pcr16[:]}}},
	}}
	s := memory.New()
	for n := range r.boots {
		if n > 0 {
			if err := e.Restart(ctx); err != nil {
				return nil, err
			}
		}
		if err := boot(ctx, e, s, cfg, r.idle); err != nil {
			return nil, err
		}
		if err := signAll(ctx, e, s, n); err != nil {
			return nil, err
		}
	}
	if w.tables, err = dump(ctx, s); err == nil && r.boots == 1 { // which has all keys open
		err = w.attack(ctx, e)
	}
	return w, err
}

func connect(ctx context.Context, e *enclavetest.Server) (*signclient.Client, error) {
	return signclient.Connect(ctx, e.Dial, signclient.Options{})
}

// boot configures the enclave and makes what is missing of keys: two in each
// pool.
func boot(ctx context.Context, e *enclavetest.Server, s *memory.Store, cfg *config.Config, idle int) error {
	for range idle {
		if _, err := connect(ctx, e); err != nil { // until the enclave closes
			return err
		}
	}
	c, err := connect(ctx, e)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Configure(ctx, &wire.Configure{Config: e.Config()}); err != nil {
		return err
	}
	for _, policy := range []string{"default", "open"} {
		_, err := provision.Run(ctx, c, s, cfg, provision.Options{Algorithm: record.Secp256k1, Policy: policy, Pool: policy, Count: 2})
		if err != nil {
			return err
		}
	}
	return nil
}

// signAll imports what the nth boot signs and lets a parent sign it.
func signAll(ctx context.Context, e *enclavetest.Server, s *memory.Store, n int) error {
	var signed strings.Builder
	for i := range 5 {
		id := ""
		if i > 1 {
			id = fmt.Sprintf(`"id":"r-%d-%d",`, n, i)
		}
		fmt.Fprintf(&signed, `{%s"text":"payload %d"}`+"\n", id, i)
	}
	for _, in := range []struct {
		id   record.ImportID
		kind record.Kind
		text string
	}{
		{signedImport(n), record.Message, signed.String()},
		{deniedImport(n), record.Raw, `{"text":"raw"}` + "\n"},
	} {
		_, err := intake.Run(ctx, s, strings.NewReader(in.text), intake.Options{
			ImportID: in.id, Pool: "default", Kind: in.kind, BatchSize: 3, SigLen: 65, Now: time.Now,
		})
		if err != nil {
			return err
		}
	}
	if err := importMixed(ctx, s, mixedImport(n)); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	var mu sync.Mutex
	left := batchesOfBoot
	return pipeline.Run(ctx, pipeline.Config{
		Store: s, Workers: 1, Owner: "parent", Rand: rand.New(rand.NewPCG(1, uint64(n))), Logger: slog.New(slog.DiscardHandler),
		Enclaves: []pipeline.Enclave{{Name: "0", Connect: func(ctx context.Context) (*signclient.Client, error) { return connect(ctx, e) }}},
		Observer: pipeline.Observer{Committed: func(*store.Batch, int, time.Duration) {
			mu.Lock()
			defer mu.Unlock()
			if left--; left == 0 {
				cancel()
			}
		}},
	})
}

// importMixed imports a digest and what is none, which an import would refuse.
func importMixed(ctx context.Context, s *memory.Store, id record.ImportID) error {
	rs := []record.Record{{Payload: make([]byte, 32)}, {Payload: make([]byte, 31)}}
	im := store.Import{ID: id, BatchSize: 3, Pool: "open", Kind: record.Digest, Records: 2, CreatedAt: time.Now()}
	b := store.Batch{
		ID: record.MakeBatchID(id, 0), ImportID: id, State: record.Ready, Pool: "open", Kind: record.Digest,
		Count: 2, PayloadRoot: receipt.PayloadRoot(record.Digest, rs), VisibleAt: time.Now(),
	}
	_, err := s.OpenImport(ctx, im)
	_, errPayload := s.PutPayload(ctx, b.ID, record.EncodePayload(rs))
	if err := errors.Join(err, errPayload, s.PutBatch(ctx, b)); err != nil {
		return err
	}
	im.Batches, im.DoneAt = 1, time.Now()
	return s.FinishImport(ctx, im)
}

func dump(ctx context.Context, s *memory.Store) (*tables, error) {
	d := &tables{
		batches: map[record.BatchID]store.Batch{}, payloads: map[record.BatchID][]byte{}, results: map[record.BatchID][]byte{},
		keys: map[record.KeyID]store.Key{}, receipts: map[lane][]store.Receipt{},
	}
	var errs [7]error
	d.imports, errs[0] = s.Imports(ctx)
	for _, im := range d.imports {
		for n := range im.Batches {
			id := record.MakeBatchID(im.ID, n)
			d.batches[id], errs[1] = s.Batch(ctx, id)
			d.payloads[id], errs[2] = s.Payload(ctx, id)
			d.results[id], errs[3] = s.Result(ctx, id)
			if err := errors.Join(errs[:]...); err != nil {
				return nil, err
			}
		}
	}
	errs[4] = s.Keys(ctx, "test#1", func(page []store.Key) error {
		for _, k := range page {
			d.keys[k.ID] = k
		}
		return nil
	})
	d.boots, errs[5] = s.Boots(ctx)
	for _, b := range d.boots {
		for n := range uint32(128) {
			err := s.Receipts(ctx, b.ID, n, 1, func(r store.Receipt) error { d.add(r); return nil })
			errs[6] = errors.Join(errs[6], err)
		}
	}
	return d, errors.Join(errs[:]...)
}

// attack has the enclave sign what root on the parent may ask it for.
func (w *world) attack(ctx context.Context, e *enclavetest.Server) (err error) {
	id := record.MakeBatchID(signedImport(0), 0)
	b := w.tables.batches[id]
	var other record.KeyID
	for k, v := range w.tables.keys {
		if k != b.KeyID && v.Pool == "default" {
			other = k
		}
	}
	if w.twice, err = w.sign(ctx, e, b, other); err != nil {
		return err
	}
	b.ID, b.ImportID = "ghost-b0000000", "ghost"
	w.ghost, err = w.sign(ctx, e, b, b.KeyID)
	return err
}

// sign asks over a connection of its own. It stays open and unacknowledged, so
// that no receipt of another attack is in its lane.
func (w *world) sign(ctx context.Context, e *enclavetest.Server, b store.Batch, key record.KeyID) (store.Receipt, error) {
	c, err := connect(ctx, e)
	if err != nil {
		return store.Receipt{}, err
	}
	ticket, err := c.Ticket(ctx, 0)
	if err != nil {
		return store.Receipt{}, err
	}
	reply, err := c.Sign(ctx, &wire.Sign{
		Ticket: ticket, BatchID: b.ID, ImportID: b.ImportID, BatchFence: 99, KeyID: key, KeyFence: 99, LeaseMS: 10_000,
		Kind: record.Message, Payload: w.tables.payloads[record.MakeBatchID(signedImport(0), 0)], Refuse: []uint32{}, Probe: wire.NoProbe,
	})
	if err != nil {
		return store.Receipt{}, err
	}
	signed, err := receipt.Decode[receipt.Signed](reply.Receipt)
	if err != nil {
		return store.Receipt{}, err
	}
	r, err := receipt.Decode[receipt.Receipt](signed.Body)
	if err != nil {
		return store.Receipt{}, err
	}
	return store.Receipt{Ref: store.ReceiptRef{BootID: r.BootID, Lane: r.Lane, Seq: r.Seq}, Signed: reply.Receipt}, nil
}

// failing is a store of which one method fails.
type failing struct {
	*tables
	call string
	err  error
}

func (f *failing) fail(name string) error {
	if f.call == name {
		return f.err
	}
	return nil
}

func (f *failing) Imports(ctx context.Context) ([]store.Import, error) {
	all, err := f.tables.Imports(ctx)
	return all, errors.Join(err, f.fail("Imports"))
}

func (f *failing) Batch(ctx context.Context, id record.BatchID) (store.Batch, error) {
	v, err := f.tables.Batch(ctx, id)
	return v, errors.Join(err, f.fail("Batch"))
}

func (f *failing) Payload(ctx context.Context, id record.BatchID) ([]byte, error) {
	v, err := f.tables.Payload(ctx, id)
	return v, errors.Join(err, f.fail("Payload"))
}

func (f *failing) Result(ctx context.Context, id record.BatchID) ([]byte, error) {
	v, err := f.tables.Result(ctx, id)
	return v, errors.Join(err, f.fail("Result"))
}

func (f *failing) Key(ctx context.Context, id record.KeyID) (store.Key, error) {
	v, err := f.tables.Key(ctx, id)
	return v, errors.Join(err, f.fail("Key"))
}

func (f *failing) Keys(ctx context.Context, ring string, each func([]store.Key) error) error {
	return errors.Join(f.tables.Keys(ctx, ring, each), f.fail("Keys"))
}

func (f *failing) Boots(ctx context.Context) ([]store.Boot, error) {
	v, err := f.tables.Boots(ctx)
	return v, errors.Join(err, f.fail("Boots"))
}

func (f *failing) Receipt(ctx context.Context, ref store.ReceiptRef) (store.Receipt, error) {
	v, err := f.tables.Receipt(ctx, ref)
	return v, errors.Join(err, f.fail("Receipt"))
}

func (f *failing) Receipts(ctx context.Context, boot record.BootID, n uint32, from uint64, each func(store.Receipt) error) error {
	return errors.Join(f.tables.Receipts(ctx, boot, n, from, each), f.fail("Receipts"))
}
