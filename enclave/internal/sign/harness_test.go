package sign_test

import (
	"crypto/rand"
	"errors"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhold/keyhold/enclave/internal/keyring"
	"github.com/keyhold/keyhold/enclave/internal/secret"
	"github.com/keyhold/keyhold/enclave/internal/sign"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// startTime is the NSM's clock when a test's engine starts.
var startTime = time.Date(2031, 5, 6, 7, 8, 9, 0, time.UTC)

const (
	lease  = 10_000 // milliseconds
	margin = 1_000
)

// fixture is an engine with keys and a clock that stands still.
type fixture struct {
	engine *sign.Engine
	keys   []sealed.Public
	now    atomic.Int64 // nanoseconds
}

func (f *fixture) sleep(d time.Duration) { f.now.Add(int64(d)) }

func testConfig() *config.Config {
	return &config.Config{
		Version: 1, KMSKeyARN: "arn:aws:kms:eu-central-1:111122223333:key/00000000-0000-4000-8000-000000000001",
		Keyring: "test", Epochs: []uint32{1}, SealEpoch: 1,
		Create: []config.Create{
			{Algorithm: record.Ed25519, Policy: "open", Max: 10},
			{Algorithm: record.P256, Policy: "open", Max: 10},
			{Algorithm: record.RSA2048, Policy: "open", Max: 10},
			{Algorithm: record.Secp256k1, Policy: "messages", Max: 10},
			{Algorithm: record.Secp256k1, Policy: "open", Max: 10},
		},
		Policies: []config.Policy{
			{Name: "messages", Kinds: []record.Kind{record.Message}},
			{Name: "open", Kinds: record.Kinds()},
		},
		Lease:     config.LeaseLimit{MaxMS: lease, MarginMS: margin},
		KeyPolicy: config.DefaultKeyPolicy(),
	}
}

func newFixture(tb testing.TB, change func(*sign.Options)) *fixture {
	tb.Helper()
	f := &fixture{}
	mono := func() time.Duration { return time.Duration(f.now.Load()) }
	o := sign.Options{
		Clock:    sign.Clock{Mono: mono, Wall: func() time.Time { return startTime.Add(mono()) }},
		MaxLanes: 4, Logger: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&o)
	}
	e, err := sign.New(o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(e.Close)
	f.engine = e
	return f
}

// open gives the engine a ring with n keys of each of the pairs.
func (f *fixture) open(tb testing.TB, n int, pairs ...config.Create) {
	tb.Helper()
	cfg := testConfig()
	dek := make([]byte, 32)
	rand.Read(dek)
	h := &sealed.Header{Version: 1, Keyring: cfg.Keyring, Epoch: 1, KMSKeyARN: cfg.KMSKeyARN, WrappedDEK: []byte("wrapped")}
	ring, err := keyring.New(cfg, h, secret.New(dek))
	if err != nil {
		tb.Fatal(err)
	}
	for _, p := range pairs {
		entries, err := ring.Create(p.Algorithm, p.Policy, n)
		if err != nil {
			tb.Fatal(err)
		}
		for _, raw := range entries {
			e, err := sealed.DecodeEntry(raw)
			if err != nil {
				tb.Fatal(err)
			}
			f.keys = append(f.keys, e.Public)
		}
	}
	if err := f.engine.Open(cfg, ring); err != nil {
		tb.Fatal(err)
	}
}

// ready is a fixture with n secp256k1 keys that sign messages.
func ready(tb testing.TB, n int) *fixture {
	tb.Helper()
	f := newFixture(tb, nil)
	f.open(tb, n, config.Create{Algorithm: record.Secp256k1, Policy: "messages"})
	return f
}

func (f *fixture) lane(tb testing.TB) *sign.Lane {
	tb.Helper()
	l, err := f.engine.Connect()
	if err != nil {
		tb.Fatal(err)
	}
	return l
}

func records(texts ...string) []record.Record {
	rs := make([]record.Record, len(texts))
	for i, s := range texts {
		rs[i].Payload = []byte(s)
	}
	return rs
}

// request is one for batch 0 under fence 1 with a fresh ticket.
func (f *fixture) request(change ...func(*wire.Sign)) *wire.Sign {
	m := &wire.Sign{
		Ticket: f.engine.Ticket(), BatchID: "imp-b0000000", ImportID: "imp", BatchFence: 1,
		KeyID: f.keys[0].KeyID, KeyFence: 1, LeaseMS: lease, Kind: record.Message,
		Payload: record.EncodePayload(records("one", "two")), Probe: wire.NoProbe,
	}
	for _, c := range change {
		c(m)
	}
	return m
}

// stored signs and acknowledges the receipt at once, as if it were stored.
func (f *fixture) stored(tb testing.TB, l *sign.Lane, m *wire.Sign) (*wire.SignReply, error) {
	tb.Helper()
	reply, err := f.engine.Sign(tb.Context(), l, m)
	if err == nil && len(reply.Receipt) > 0 {
		f.ack(tb, l, f.receipt(tb, reply.Receipt).Seq)
	}
	return reply, err
}

func (f *fixture) ack(tb testing.TB, l *sign.Lane, seq uint64) {
	tb.Helper()
	if _, err := f.engine.Receipts(l, &wire.Receipts{Ack: []wire.LaneSeq{{Lane: l.Number(), Seq: seq}}}); err != nil {
		tb.Fatal(err)
	}
}

func (f *fixture) receipt(tb testing.TB, signed []byte) *receipt.Receipt {
	tb.Helper()
	r, err := receipt.OpenReceipt(f.engine.ReceiptKey(), signed)
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

func outcomes(tb testing.TB, reply *wire.SignReply) []record.Outcome {
	tb.Helper()
	_, out, err := record.DecodeResult(reply.Result)
	if err != nil {
		tb.Fatal(err)
	}
	return out
}

// want compares the code that err carries; empty means no error.
func want(tb testing.TB, err error, code refusal.Code) {
	tb.Helper()
	if code == "" && err != nil || code != "" && !errors.Is(err, code) {
		tb.Errorf("got %v, want %q", err, code)
	}
}

// hook sets Options.BeforeRecord.
func hook(f func([]byte)) func(*sign.Options) {
	return func(o *sign.Options) { o.BeforeRecord = f }
}
