package enclavetest_test

import (
	"crypto/ed25519"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ethereum/go-ethereum/crypto"
	"go.uber.org/goleak"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/payload"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/keypolicy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func start(t *testing.T, o enclavetest.Options) *enclavetest.Server {
	t.Helper()
	s, err := enclavetest.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func dial(t *testing.T, s *enclavetest.Server) (net.Conn, *wire.HelloReply) {
	t.Helper()
	conn, err := s.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn, ask[wire.HelloReply](t, conn, wire.TypeHello, &wire.Hello{})
}

func ask[Reply any](t *testing.T, conn net.Conn, typ wire.Type, req any) *Reply {
	t.Helper()
	r, err := enclavetest.Ask[Reply](conn, typ, req)
	if err != nil {
		t.Fatalf("%s: %v", typ, err)
	}
	return r
}

func records(texts ...string) []record.Record {
	rs := make([]record.Record, len(texts))
	for i, s := range texts {
		rs[i].Payload = []byte(s)
	}
	return rs
}

func signRequest(key record.KeyID, ticket wire.Ticket, rs []record.Record) *wire.Sign {
	return &wire.Sign{
		Ticket: ticket, BatchID: "imp-b0000000", ImportID: "imp", BatchFence: 1, KeyID: key, KeyFence: 1,
		LeaseMS: 10_000, Kind: record.Message, Payload: record.EncodePayload(rs), Probe: wire.NoProbe,
	}
}

// bootKey verifies the boot document and statement of hello up to the root, and
// returns the receipt key that they vouch for.
func bootKey(t *testing.T, s *enclavetest.Server, h *wire.HelloReply) ed25519.PublicKey {
	t.Helper()
	pcr16 := config.PCR16(s.Config())
	recorded, err := attestation.VerifyRecorded(h.Document, attestation.RecordedPolicy{
		Root: attestation.TestRoot(s.CA().Root()), Images: []attestation.Image{{PCRs: map[int][]byte{0: s.PCR0(), 16: pcr16[:]}}},
	})
	if err != nil {
		t.Fatalf("boot document: %v", err)
	}
	doc, err := recorded.Document()
	if err != nil {
		t.Fatal(err)
	}
	st, err := receipt.CheckStatement(h.Statement, doc.PublicKey, doc.UserData)
	if err != nil {
		t.Fatalf("boot statement: %v", err)
	}
	if st.BootID != h.BootID || st.ConfigHash != config.Hash(s.Config()) || st.Mode != keypolicy.Managed || len(st.Pairs) != 1 {
		t.Errorf("boot statement is of another boot: %+v", st)
	}
	return doc.PublicKey
}

// The whole path as a parent walks it, against the production enclave.
func TestConfigureCreateAddKeysSignOverAPipe(t *testing.T) {
	s := start(t, enclavetest.Options{Bare: true})
	conn, h := dial(t, s)
	if h.State != wire.StateWaiting || len(h.ConfigHash) != 0 || len(h.Document) != 0 {
		t.Fatalf("hello of a new enclave: %+v", h)
	}
	configured := ask[wire.ConfigureReply](t, conn, wire.TypeConfigure, &wire.Configure{Config: s.Config()})
	if configured.Already || [48]byte(configured.PCR16) != config.PCR16(s.Config()) {
		t.Fatal("configure measured something else")
	}
	created := ask[wire.CreateKeyringReply](t, conn, wire.TypeCreateKeyring, &wire.CreateKeyring{})
	added := ask[wire.AddKeysReply](t, conn, wire.TypeAddKeys, &wire.AddKeys{Algorithm: record.Secp256k1, Policy: "default", Count: 3})

	_, h = dial(t, s)
	checkMade(t, bootKey(t, s, h), added)

	// Another boot opens what was sealed, and signs.
	if err := s.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	conn, _ = dial(t, s)
	ask[wire.ConfigureReply](t, conn, wire.TypeConfigure, &wire.Configure{Config: s.Config()})
	loaded := ask[wire.LoadReply](t, conn, wire.TypeLoad, &wire.Load{Header: created.Header, Keys: added.Keys})
	if loaded.Already || loaded.Loaded != 3 || loaded.Total != 3 || len(loaded.Refused) != 0 {
		t.Errorf("load: %+v", loaded)
	}
	_, h = dial(t, s)
	checkSigned(t, bootKey(t, s, h), conn, added.Keys[1], h.Ticket)
}

// checkMade verifies the receipt of new keys.
func checkMade(t *testing.T, receiptKey ed25519.PublicKey, added *wire.AddKeysReply) {
	t.Helper()
	made, err := receipt.OpenReceipt(receiptKey, added.Receipt)
	if err != nil {
		t.Fatal(err)
	}
	if made.Subject != receipt.SubjectKeys || made.Count != 3 || made.ResultRoot != receipt.KeysRoot(added.Keys) || made.Seq != 1 {
		t.Errorf("receipt of new keys: %+v", made)
	}
}

// checkSigned signs a batch with the key of a sealed entry and verifies every
// signature and the receipt.
func checkSigned(t *testing.T, receiptKey ed25519.PublicKey, conn net.Conn, entry []byte, ticket wire.Ticket) {
	t.Helper()
	public := mustPublic(t, entry)
	rs := records("one", "two", "")
	reply := ask[wire.SignReply](t, conn, wire.TypeSign, signRequest(public.KeyID, ticket, rs))
	_, out, err := record.DecodeResult(reply.Result)
	if err != nil {
		t.Fatal(err)
	}
	hasher, err := payload.NewHasher(record.Secp256k1, record.Message)
	if err != nil {
		t.Fatal(err)
	}
	for i, o := range out {
		digest, err := hasher.Sum(rs[i].Payload)
		if err != nil {
			t.Fatal(err)
		}
		if !crypto.VerifySignature(public.PublicKey, digest, o.Signature[:64]) {
			t.Errorf("signature %d does not verify", i)
		}
	}
	r, err := receipt.OpenReceipt(receiptKey, reply.Receipt)
	if err != nil {
		t.Fatal(err)
	}
	if r.PayloadRoot != receipt.PayloadRoot(record.Message, rs) || r.ResultRoot != receipt.ResultRoot(out) ||
		r.KeyID != public.KeyID || r.BatchID != "imp-b0000000" || r.Count != 3 || r.KeyFence != 1 {
		t.Errorf("receipt is of something else: %+v", r)
	}
}

func TestReadyServerKeepsItsKeysThroughRestart(t *testing.T) {
	s := start(t, enclavetest.Options{Keys: 2, Algorithm: record.Ed25519})
	before := s.BootID()
	_, h := dial(t, s)
	if h.State != wire.StateReady {
		t.Fatalf("state %s, want ready", h.State)
	}
	if err := s.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s.BootID() == before {
		t.Error("a restart kept the boot id")
	}
	conn, h := dial(t, s)
	reply := ask[wire.SignReply](t, conn, wire.TypeSign, signRequest(s.Keys()[1].KeyID, h.Ticket, records("x")))
	_, out, err := record.DecodeResult(reply.Result)
	if err != nil {
		t.Fatal(err)
	}
	if want := "\x19Keyhold Signed Message:\n1x"; !ed25519.Verify(s.Keys()[1].PublicKey, []byte(want), out[0].Signature) {
		t.Error("signature does not verify")
	}
}

func TestPoisonTakesEverythingDownUntilRestart(t *testing.T) {
	s := start(t, enclavetest.Options{Keys: 1, Poison: func(p []byte) bool { return string(p) == "poison" }})
	other, _ := dial(t, s)
	conn, h := dial(t, s)
	_, err := enclavetest.Ask[wire.SignReply](conn, wire.TypeSign, signRequest(s.Keys()[0].KeyID, h.Ticket, records("a", "poison")))
	if err == nil {
		t.Fatal("a poisoned batch was answered")
	}
	if _, err := other.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("another connection lives: %v", err)
	}
	if _, err := s.Dial(t.Context()); !errors.Is(err, enclavetest.ErrDown) {
		t.Errorf("dial: %v", err)
	}
	if err := s.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	conn, h = dial(t, s)
	req := signRequest(s.Keys()[0].KeyID, h.Ticket, records("a", "poison"))
	req.Refuse = []uint32{1}
	reply := ask[wire.SignReply](t, conn, wire.TypeSign, req)
	_, out, err := record.DecodeResult(reply.Result)
	if err != nil {
		t.Fatal(err)
	}
	if out[0].Refusal != "" || out[1].Refusal != string(refusal.EnclaveCrash) {
		t.Errorf("outcomes: %+v", out)
	}
}

func TestServerRunsInABubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, enclavetest.Options{Keys: 1})
		conn, h := dial(t, s)
		time.Sleep(9 * time.Second) //nolint:forbidigo // a bubble's clock
		_, err := enclavetest.Ask[wire.SignReply](conn, wire.TypeSign, signRequest(s.Keys()[0].KeyID, h.Ticket, records("x")))
		if !errors.Is(err, refusal.Deadline) {
			t.Errorf("got %v, want deadline", err)
		}
	})
}

func TestTwoServersOpenOneKeyring(t *testing.T) {
	first := start(t, enclavetest.Options{Keys: 3})
	sealedRing := first.Sealed()
	second := start(t, enclavetest.Options{Sealed: &sealedRing, KMS: first.KMS()})
	if got, want := second.Keys()[2].KeyID, first.Keys()[2].KeyID; got != want {
		t.Errorf("key %s, want %s", got, want)
	}
	if second.BootID() == first.BootID() {
		t.Error("two boots have one id")
	}
	// Without its KMS the keyring stays closed.
	if _, err := enclavetest.New(t.Context(), enclavetest.Options{Sealed: &sealedRing}); !errors.Is(err, refusal.KMSWrongKey) {
		t.Errorf("got %v, want %s", err, refusal.KMSWrongKey)
	}
}
