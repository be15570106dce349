package hostile_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/internal/wire"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// maxKeys is how many keys of each pair an enclave of these tests may make.
const maxKeys = 40

// testConfig permits messages under "narrow" and everything under "wide".
func testConfig() *config.Config {
	return &config.Config{
		Version: 1, KMSKeyARN: "arn:aws:kms:eu-central-1:111122223333:key/00000000-0000-4000-8000-000000000001",
		Keyring: "test", Epochs: []uint32{1}, SealEpoch: 1,
		Create: []config.Create{
			{Algorithm: record.Ed25519, Policy: "narrow", Max: maxKeys},
			{Algorithm: record.Secp256k1, Policy: "narrow", Max: maxKeys},
			{Algorithm: record.Secp256k1, Policy: "wide", Max: maxKeys},
		},
		Policies: []config.Policy{
			{Name: "narrow", Kinds: []record.Kind{record.Message}},
			{Name: "wide", Kinds: record.Kinds()},
		},
		Lease:     config.LeaseLimit{MaxMS: config.DefaultLeaseMaxMS, MarginMS: config.DefaultLeaseMarginMS},
		KeyPolicy: config.DefaultKeyPolicy(),
	}
}

// victim is the production enclave, booted as a parent does it: over the wire,
// which the judge listens to.
type victim struct {
	*judge
	s    *enclavetest.Server
	addr string

	mono    atomic.Int64           // nanoseconds on its clock
	during  atomic.Pointer[func()] // called before each record is signed
	header  []byte
	entries [][]byte        // sealed; the first is the honest parent's
	keys    []sealed.Public // of entries
	fence   record.Fence    // of the honest parent's last batch
}

// log is where an enclave writes, for the judge to read.
type log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// bare starts an enclave that waits for its config.
func bare(t *testing.T, change func(*enclavetest.Options)) *victim {
	t.Helper()
	cfg, logged := testConfig(), &log{}
	v := &victim{}
	o := enclavetest.Options{
		Bare: true, Config: cfg, KMS: &enclavetest.KMS{}, Mono: func() time.Duration { return time.Duration(v.mono.Load()) },
		Logger: slog.New(slog.NewJSONHandler(logged, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Panic: func([]byte) bool {
			if f := v.during.Load(); f != nil {
				(*f)()
			}
			return false
		},
	}
	if change != nil {
		change(&o)
	}
	v.judge = newJudge(o.Config)
	s, err := enclavetest.New(t.Context(), o)
	must(t, err)
	v.s = s
	v.addr = filepath.Join(t.TempDir(), "e")
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", v.addr)
	must(t, err)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
		s.Close()
		if len(v.entries) == 0 {
			return // it never had a secret
		}
		v.hear(nil, logged.b.Bytes())
		v.knows(t, v.dek(t), v.judge.entries)
		t.Logf("the judge read %d streams and verified %d signatures", len(v.out), v.verdict(t))
	})
	return v
}

// start starts an enclave with a keyring of six keys.
func start(t *testing.T, change func(*enclavetest.Options)) *victim {
	t.Helper()
	v := bare(t, change)
	v.configure(t)
	c := v.dial(t)
	v.header = ask[wire.CreateKeyringReply](t, c, wire.TypeCreateKeyring, &wire.CreateKeyring{}).Header
	for i, p := range v.cfg.Create {
		made := ask[wire.AddKeysReply](t, c, wire.TypeAddKeys, &wire.AddKeys{Algorithm: p.Algorithm, Policy: p.Policy, Count: 2, Ack: uint64(i)})
		v.entries = append(v.entries, made.Keys...)
	}
	lane := ask[wire.HelloReply](t, c, wire.TypeHello, &wire.Hello{}).Lane
	ask[wire.ReceiptsReply](t, c, wire.TypeReceipts, &wire.Receipts{Ack: []wire.LaneSeq{{Lane: lane, Seq: uint64(len(v.cfg.Create))}}})
	must(t, c.Close())
	for _, entry := range v.entries {
		v.keys = append(v.keys, public(t, entry))
	}
	return v
}

func (v *victim) configure(t *testing.T) {
	t.Helper()
	c := v.dial(t)
	ask[wire.ConfigureReply](t, c, wire.TypeConfigure, &wire.Configure{Config: v.s.Config()})
	must(t, c.Close())
}

// reboot crashes the enclave and configures the next boot.
func (v *victim) reboot(t *testing.T) {
	t.Helper()
	must(t, v.s.Restart(t.Context()))
	v.configure(t)
}

func public(t *testing.T, entry []byte) sealed.Public {
	t.Helper()
	e, err := sealed.DecodeEntry(entry)
	must(t, err)
	return e.Public
}

// dek is the data key, which KMS gives to whoever runs these tests.
func (v *victim) dek(t *testing.T) (dek []byte) {
	t.Helper()
	h, err := sealed.DecodeHeader(v.header)
	must(t, err)
	s, err := v.s.KMS().Decrypt(context.WithoutCancel(t.Context()), h.WrappedDEK, sealed.EncryptionContext(h.Keyring, h.Epoch))
	must(t, err)
	defer s.Destroy()
	must(t, s.Use(func(b []byte) error { dek = bytes.Clone(b); return nil }))
	return dek
}

// open dials without a word.
func (v *victim) open(t *testing.T) *tapped {
	t.Helper()
	conn, err := new(net.Dialer).DialContext(t.Context(), "unix", v.addr)
	must(t, err)
	c := &tapped{Conn: conn, judge: v.judge}
	t.Cleanup(func() { _ = c.Close() }) // closed by either side
	return c
}

// dial returns a connection that has said hello.
func (v *victim) dial(t *testing.T) *tapped {
	t.Helper()
	c := v.open(t)
	ask[wire.HelloReply](t, c, wire.TypeHello, &wire.Hello{})
	return c
}

func ask[Reply any](t *testing.T, conn net.Conn, typ wire.Type, req any) *Reply {
	t.Helper()
	r, err := enclavetest.Ask[Reply](conn, typ, req)
	if err != nil {
		t.Fatalf("%s: %v", typ, err)
	}
	return r
}

// try asks on a connection of its own.
func try[Reply any](t *testing.T, v *victim, typ wire.Type, req any) (*Reply, error) {
	t.Helper()
	c := v.dial(t)
	defer func() { must(t, c.Close()) }()
	return enclavetest.Ask[Reply](c, typ, req)
}

func (v *victim) ticket(t *testing.T) wire.Ticket {
	t.Helper()
	r, err := try[wire.TicketReply](t, v, wire.TypeTicket, &wire.GetTicket{})
	must(t, err)
	return r.Ticket
}

func frame(t *testing.T, typ wire.Type, body any) []byte {
	t.Helper()
	b, err := wire.Encode(1, typ, body)
	must(t, err)
	var out bytes.Buffer
	must(t, wire.WriteFrame(&out, b))
	return out.Bytes()
}

// say sends hello and then the bytes, ends its side, and returns what the
// enclave answered to the bytes.
func (v *victim) say(t *testing.T, raw []byte) []*wire.Message {
	t.Helper()
	c := v.open(t)
	defer func() { must(t, c.Close()) }()
	all := v.exchange(t, c, append(frame(t, wire.TypeHello, &wire.Hello{}), raw...))
	if len(all) == 0 {
		t.Fatal("hello was not answered")
	}
	return all[1:]
}

// exchange writes, ends its side and reads all that comes.
func (*victim) exchange(t *testing.T, c *tapped, raw []byte) []*wire.Message {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() {
		_, err := c.Write(raw) // fails where the enclave has hung up
		if u, ok := c.Conn.(*net.UnixConn); ok && err == nil {
			_ = u.CloseWrite() // likewise
		}
	})
	out, err := io.ReadAll(c)
	wg.Wait()
	if err != nil && !errors.Is(err, net.ErrClosed) {
		t.Logf("read: %v", err) // reset: it hung up on what was still unread
	}
	return messages(out)
}

// tell counts what the enclave answers to raw.
func (v *victim) tell(t *testing.T, got *tally, raw []byte) {
	t.Helper()
	all := v.say(t, raw)
	if len(all) == 0 {
		got.got(closed)
		return
	}
	got.got(outcomeOf(t, all[0]))
	v.store(t, all)
}

// store acknowledges receipts, so that the attacker's lanes are never full.
func (v *victim) store(t *testing.T, all []*wire.Message) {
	t.Helper()
	if !slices.ContainsFunc(all, func(m *wire.Message) bool { return m.Type == wire.TypeSign || m.Type == wire.TypeAddKeys }) {
		return
	}
	c := v.dial(t)
	defer func() { must(t, c.Close()) }()
	v.drain(t, c)
}

// drain acknowledges all receipts that wait.
func (*victim) drain(t *testing.T, c net.Conn) {
	t.Helper()
	waiting := ask[wire.ReceiptsReply](t, c, wire.TypeReceipts, &wire.Receipts{Ack: []wire.LaneSeq{}})
	var acks []wire.LaneSeq
	for _, raw := range waiting.Receipts {
		r := read(t, raw)
		acks = append(acks, wire.LaneSeq{Lane: r.Lane, Seq: r.Seq})
	}
	if len(acks) > 0 {
		ask[wire.ReceiptsReply](t, c, wire.TypeReceipts, &wire.Receipts{Ack: acks})
	}
}

func outcomeOf(t *testing.T, m *wire.Message) outcome {
	t.Helper()
	if m.Type == wire.TypeLoad {
		var r wire.LoadReply
		must(t, wire.DecodeBody(m, &r))
		if len(r.Refused) > 0 {
			return refusedAlone
		}
	}
	if m.Type != wire.TypeError {
		return answered
	}
	var e wire.Error
	must(t, wire.DecodeBody(m, &e))
	entry, ok := refusal.Lookup(refusal.Code(e.Code))
	if !ok || e.Text != entry.Text {
		t.Errorf("an error says %q: %q", e.Code, e.Text)
	}
	return e.Code
}

func records(texts ...string) []byte {
	rs := make([]record.Record, len(texts))
	for i, s := range texts {
		rs[i].Payload = []byte(s)
	}
	return record.EncodePayload(rs)
}

// signing is a request that is in order. Each test changes what it wants to.
func (v *victim) signing(ticket wire.Ticket, key int, fence record.Fence) *wire.Sign {
	return &wire.Sign{
		Ticket: ticket, BatchID: "imp-b0000000", ImportID: "imp", BatchFence: 1, KeyID: v.keys[key].KeyID, KeyFence: fence,
		LeaseMS: 10_000, Kind: record.Message, Payload: records("one", "two"), Refuse: []uint32{}, Probe: wire.NoProbe,
	}
}

// honest signs as an honest parent beside the attacker does, with the first key.
func (v *victim) honest(t *testing.T) {
	t.Helper()
	c := v.dial(t)
	defer func() { must(t, c.Close()) }()
	v.fence++
	v.drain(t, c)
	ticket := ask[wire.TicketReply](t, c, wire.TypeTicket, &wire.GetTicket{}).Ticket
	reply, err := enclavetest.Ask[wire.SignReply](c, wire.TypeSign, v.signing(ticket, 0, v.fence))
	if err != nil {
		t.Errorf("an honest parent is refused: %v", err)
		return
	}
	if len(reply.Result) == 0 {
		t.Error("an honest parent gets nothing")
	}
	v.drain(t, c)
	st := ask[wire.StatusReply](t, c, wire.TypeStatus, &wire.GetStatus{})
	if st.Panics != 0 {
		t.Errorf("%d requests ended in a panic", st.Panics)
	}
}

// image is the measured image of all victims.
func image() []byte { return nsmtest.Measurements("enclavetest")[0] }

func hash(b []byte) [32]byte { return sha256.Sum256(b) }
