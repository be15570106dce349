package hostile_test

import (
	"context"
	"crypto/ed25519"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/audit"
	"github.com/keyhold/keyhold/parent/intake"
	"github.com/keyhold/keyhold/parent/pipeline"
	"github.com/keyhold/keyhold/parent/provision"
	"github.com/keyhold/keyhold/parent/signclient"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/memory"
)

const (
	boots          = 2
	batchesOfBoot  = 3
	recordsOfBatch = 3
)

// tables is an honest run of two boots, seen through an attacker's hands: what
// is read of the tables goes through the functions that are set.
type tables struct {
	*memory.Store
	opt       audit.Options
	batches   []store.Batch
	receipts  []store.Receipt
	bootItems []store.Boot
	keyItems  []store.Key
	challenge []byte                           // a document that the attacker asked for
	heads     map[record.BootID]*receipt.Heads // what a witness outside has kept

	batch  func(*store.Batch)
	result func(record.BatchID, []byte) []byte
	pay    func(record.BatchID, []byte) []byte
	boot   func([]store.Boot) []store.Boot
	key    func(*store.Key)
	lane   func([]store.Receipt) []store.Receipt // of all lanes
}

func (s *tables) Batch(ctx context.Context, id record.BatchID) (store.Batch, error) {
	b, err := s.Store.Batch(ctx, id)
	if s.batch != nil && err == nil {
		s.batch(&b)
	}
	return b, err
}

func (s *tables) Result(ctx context.Context, id record.BatchID) ([]byte, error) {
	b, err := s.Store.Result(ctx, id)
	if s.result != nil && err == nil {
		b = s.result(id, b)
	}
	return b, err
}

func (s *tables) Payload(ctx context.Context, id record.BatchID) ([]byte, error) {
	b, err := s.Store.Payload(ctx, id)
	if s.pay != nil && err == nil {
		b = s.pay(id, b)
	}
	return b, err
}

func (s *tables) Boots(context.Context) ([]store.Boot, error) {
	if s.boot != nil {
		return s.boot(append([]store.Boot{}, s.bootItems...)), nil
	}
	return s.bootItems, nil
}

func (s *tables) Key(ctx context.Context, id record.KeyID) (store.Key, error) {
	k, err := s.Store.Key(ctx, id)
	if s.key != nil && err == nil {
		s.key(&k)
	}
	return k, err
}

func (s *tables) Keys(ctx context.Context, ring string, f func([]store.Key) error) error {
	return s.Store.Keys(ctx, ring, func(page []store.Key) error {
		for i := range page {
			if s.key != nil {
				s.key(&page[i])
			}
		}
		return f(page)
	})
}

// written is what the attacker has made of the receipts.
func (s *tables) written() []store.Receipt {
	all := append([]store.Receipt{}, s.receipts...)
	if s.lane != nil {
		all = s.lane(all)
	}
	return all
}

func (s *tables) Receipt(_ context.Context, ref store.ReceiptRef) (store.Receipt, error) {
	for _, r := range s.written() {
		if r.Ref == ref {
			return r, nil
		}
	}
	return store.Receipt{}, store.ErrNotFound
}

func (s *tables) Receipts(_ context.Context, boot record.BootID, lane uint32, from uint64, f func(store.Receipt) error) error {
	for _, r := range s.written() {
		if r.Ref.BootID == boot && r.Ref.Lane == lane && r.Ref.Seq >= from {
			if err := f(r); err != nil {
				return err
			}
		}
	}
	return nil
}

// verify is keyhold receipt verify.
func (s *tables) verify(t *testing.T) outcome {
	t.Helper()
	r, err := audit.Run(t.Context(), s, s.opt)
	switch {
	case err == nil:
		return notSeen
	case refusal.Of(err) == refusal.ReceiptInvalid && r.Problems > 0:
		return found
	}
	t.Errorf("verify: %v", err)
	return code(refusal.Of(err))
}

// tries shows the verifier what is set, counts what it says, and sets it back.
func (s *tables) tries(t *testing.T, got *tally, what string, want outcome) {
	t.Helper()
	o := s.verify(t)
	got.got(o)
	if o != want {
		t.Errorf("%s: %s, want %s", what, o, want)
	}
	s.batch, s.result, s.pay, s.boot, s.key, s.lane = nil, nil, nil, nil, nil, nil
}

// run is shared: attacks change what is read of it, each in a copy.
var run = sync.OnceValues(func() (*tables, error) { return newRun(context.Background()) })

func tablesOf(t *testing.T) *tables {
	t.Helper()
	s, err := run()
	must(t, err)
	mine := *s
	if o := mine.verify(t); o != notSeen {
		t.Fatalf("an honest run: %s", o)
	}
	return &mine
}

func newRun(ctx context.Context) (*tables, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	e, err := enclavetest.New(ctx, enclavetest.Options{Bare: true, Config: testConfig()})
	if err != nil {
		return nil, err
	}
	defer e.Close()
	cfg, err := config.Parse(e.Config())
	if err != nil {
		return nil, err
	}
	pcr16 := config.PCR16(e.Config())
	s := &tables{Store: memory.New(), heads: map[record.BootID]*receipt.Heads{}, opt: audit.Options{
		Receipts: true, Root: attestation.TestRoot(e.CA().Root()), Configs: []*config.Config{cfg},
		Images: []attestation.Image{{PCRs: map[int][]byte{0: e.PCR0(), 16: pcr16[:]}}},
	}}
	for n := range boots {
		if n > 0 {
			if err := e.Restart(ctx); err != nil {
				return nil, err
			}
		}
		if err := s.signBoot(ctx, e, cfg, n); err != nil {
			return nil, err
		}
	}
	return s, s.collect(ctx)
}

// signBoot boots, signs an import and asks for the heads.
func (s *tables) signBoot(ctx context.Context, e *enclavetest.Server, cfg *config.Config, n int) error {
	connect := func(ctx context.Context) (*signclient.Client, error) {
		return signclient.Connect(ctx, e.Dial, signclient.Options{})
	}
	c, err := connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Configure(ctx, &wire.Configure{Config: e.Config()}); err != nil {
		return err
	}
	o := provision.Options{Algorithm: record.Secp256k1, Policy: "narrow", Pool: "pool", Count: 3}
	if _, err := provision.Run(ctx, c, s.Store, cfg, o); err != nil {
		return err
	}
	var lines strings.Builder
	for i := range batchesOfBoot * recordsOfBatch {
		fmt.Fprintf(&lines, `{"text":"boot %d record %d"}`+"\n", n, i)
	}
	_, err = intake.Run(ctx, s.Store, strings.NewReader(lines.String()), intake.Options{
		ImportID: record.ImportID(fmt.Sprintf("import-%d", n)), Pool: "pool", Kind: record.Message, BatchSize: recordsOfBatch, SigLen: 65, Now: time.Now,
	})
	if err != nil {
		return err
	}
	if err := s.sign(ctx, connect, n); err != nil {
		return err
	}
	conn, err := e.Dial(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // likewise
	hello, err := enclavetest.Ask[wire.HelloReply](conn, wire.TypeHello, &wire.Hello{})
	if err != nil {
		return err
	}
	nonce := []byte("a witness's nonce")
	r, err := enclavetest.Ask[wire.AttestReply](conn, wire.TypeAttest, &wire.Attest{Nonce: nonce})
	if err != nil {
		return err
	}
	d, err := attestation.Parse(hello.Document)
	if err != nil {
		return err
	}
	s.challenge = r.Document
	s.heads[hello.BootID], err = receipt.OpenHeads(ed25519.PublicKey(d.PublicKey), nonce, r.Heads)
	return err
}

func (s *tables) sign(ctx context.Context, connect func(context.Context) (*signclient.Client, error), n int) error {
	ctx, cancel := context.WithCancel(ctx)
	var mu sync.Mutex
	left := batchesOfBoot
	return pipeline.Run(ctx, pipeline.Config{
		Store: s.Store, Workers: 1, Owner: "parent", Rand: rand.New(rand.NewPCG(1, uint64(n))), Logger: slog.New(slog.DiscardHandler),
		Enclaves: []pipeline.Enclave{{Name: "0", Connect: connect}},
		Observer: pipeline.Observer{Committed: func(*store.Batch, int, time.Duration) {
			mu.Lock()
			defer mu.Unlock()
			if left--; left == 0 {
				cancel()
			}
		}},
	})
}

// collect lists what is in the tables.
func (s *tables) collect(ctx context.Context) (err error) {
	if s.bootItems, err = s.Store.Boots(ctx); err != nil {
		return err
	}
	for n := range boots {
		for i := range batchesOfBoot {
			b, err := s.Store.Batch(ctx, record.MakeBatchID(record.ImportID(fmt.Sprintf("import-%d", n)), i))
			if err != nil {
				return err
			}
			s.batches = append(s.batches, b)
		}
	}
	for _, b := range s.bootItems {
		for lane := range uint32(16) {
			err := s.Store.Receipts(ctx, b.ID, lane, 1, func(r store.Receipt) error { s.receipts = append(s.receipts, r); return nil })
			if err != nil {
				return err
			}
		}
	}
	return s.Store.Keys(ctx, "test#1", func(page []store.Key) error { s.keyItems = append(s.keyItems, page...); return nil })
}
