package receipt_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/keypolicy"
)

// The receipt key of all tests: RFC 8032's TEST 2 seed, which nobody uses.
func receiptKey() (ed25519.PrivateKey, ed25519.PublicKey) {
	key := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{0x4c}, ed25519.SeedSize))
	return key, key.Public().(ed25519.PublicKey)
}

func testReceipt(seq uint64, prev [32]byte) *receipt.Receipt {
	_, public := receiptKey()
	return &receipt.Receipt{
		Domain: receipt.ReceiptDomain, Version: 1, Subject: receipt.SubjectBatch, BootID: receipt.BootIDOf(public),
		Lane: 2, Seq: seq, Prev: prev, BatchID: "import-b0000001", ImportID: "import", KeyID: record.KeyID{1},
		Algorithm: record.Ed25519, PublicKey: make([]byte, 32), PolicyHash: [32]byte{2}, BatchFence: 3, KeyFence: 4,
		Count: 5, PayloadRoot: [32]byte{6}, ResultRoot: [32]byte{7}, TimeMS: 1_700_000_000_000,
	}
}

func testStatement() *receipt.Statement {
	_, public := receiptKey()
	return &receipt.Statement{
		Domain: receipt.StatementDomain, Version: 1, Kind: receipt.KindBoot, BootID: receipt.BootIDOf(public),
		ConfigHash: [32]byte{1}, Keyring: "main", Fingerprint: [32]byte{2}, Epoch: 3,
		KMSKeyARN: "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
		Pairs:     []receipt.Pair{{PCR0: [48]byte{4}, PCR16: [48]byte{5}}}, PolicyHash: [32]byte{6}, Mode: keypolicy.Managed,
	}
}

func testHeads() *receipt.Heads {
	_, public := receiptKey()
	return &receipt.Heads{
		Domain: receipt.HeadsDomain, BootID: receipt.BootIDOf(public), Nonce: []byte("nonce"), TimeMS: 1,
		Lanes: []receipt.Head{{Lane: 0, Seq: 9, Hash: [32]byte{1}}, {Lane: 1}},
	}
}

func TestASignedReceiptOpensAsWhatWasSigned(t *testing.T) {
	t.Parallel()
	key, public := receiptKey()
	want := testReceipt(1, [32]byte{})
	got, err := receipt.OpenReceipt(public, receipt.Sign(key, receipt.Encode(want)))
	if err != nil {
		t.Fatalf("OpenReceipt: %v", err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestEveryChangedByteOfASignedReceiptIsRefused(t *testing.T) {
	t.Parallel()
	key, public := receiptKey()
	signed := receipt.Sign(key, receipt.Encode(testReceipt(1, [32]byte{})))
	refused := func(b []byte) {
		t.Helper()
		_, err := receipt.OpenReceipt(public, b)
		if !errors.Is(err, receipt.ErrMalformed) && !errors.Is(err, receipt.ErrSignature) {
			t.Errorf("got %v, want ErrMalformed or ErrSignature", err)
		}
	}
	for i := range signed {
		for bit := range 8 {
			bad := bytes.Clone(signed)
			bad[i] ^= 1 << bit
			refused(bad)
		}
	}
	for n := range signed {
		refused(signed[:n])
	}
	refused(append(bytes.Clone(signed), 0))
	refused(make([]byte, receipt.MaxLen+1))
}

func TestReceiptsOfAnotherFormOrBootAreRefused(t *testing.T) {
	t.Parallel()
	key, public := receiptKey()
	for name, edit := range map[string]func(*receipt.Receipt){
		"heads domain":  func(r *receipt.Receipt) { r.Domain = receipt.HeadsDomain },
		"no domain":     func(r *receipt.Receipt) { r.Domain = "" },
		"version 0":     func(r *receipt.Receipt) { r.Version = 0 },
		"version 2":     func(r *receipt.Receipt) { r.Version = 2 },
		"another boot":  func(r *receipt.Receipt) { r.BootID[0] ^= 1 },
		"sequence zero": func(r *receipt.Receipt) { r.Seq = 0 },
	} {
		r := testReceipt(1, [32]byte{})
		edit(r)
		if _, err := receipt.OpenReceipt(public, receipt.Sign(key, receipt.Encode(r))); !errors.Is(err, receipt.ErrMalformed) {
			t.Errorf("%s: got %v, want ErrMalformed", name, err)
		}
	}
	if _, err := receipt.OpenReceipt(public, receipt.Sign(key, receipt.Encode(testHeads()))); !errors.Is(err, receipt.ErrMalformed) {
		t.Errorf("heads as a receipt: got %v", err)
	}
	if _, err := receipt.OpenHeads(public, nil, receipt.Sign(key, receipt.Encode(testReceipt(1, [32]byte{})))); !errors.Is(err, receipt.ErrMalformed) {
		t.Errorf("a receipt as heads: got %v", err)
	}
	good := receipt.Sign(key, receipt.Encode(testReceipt(1, [32]byte{})))
	other := ed25519.NewKeyFromSeed(make([]byte, 32)).Public().(ed25519.PublicKey)
	for name, p := range map[string]ed25519.PublicKey{"another key": other, "no key": nil, "a short key": public[:31]} {
		if _, err := receipt.OpenReceipt(p, good); !errors.Is(err, receipt.ErrSignature) {
			t.Errorf("%s: got %v, want ErrSignature", name, err)
		}
	}
}

func TestHeadsAnswerOneNonce(t *testing.T) {
	t.Parallel()
	key, public := receiptKey()
	want := testHeads()
	signed := receipt.Sign(key, receipt.Encode(want))
	got, err := receipt.OpenHeads(public, []byte("nonce"), signed)
	if err != nil {
		t.Fatalf("OpenHeads: %v", err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for _, nonce := range [][]byte{nil, []byte("nonc"), []byte("nonce2"), []byte("Nonce")} {
		if _, err := receipt.OpenHeads(public, nonce, signed); !errors.Is(err, receipt.ErrMalformed) {
			t.Errorf("nonce %q: got %v, want ErrMalformed", nonce, err)
		}
	}
	for i := range signed {
		bad := bytes.Clone(signed)
		bad[i] ^= 1
		if _, err := receipt.OpenHeads(public, []byte("nonce"), bad); err == nil {
			t.Errorf("byte %d may be changed", i)
		}
	}
	foreign := testHeads()
	foreign.BootID[0] ^= 1
	if _, err := receipt.OpenHeads(public, []byte("nonce"), receipt.Sign(key, receipt.Encode(foreign))); !errors.Is(err, receipt.ErrMalformed) {
		t.Errorf("heads of another boot: got %v", err)
	}
}

func TestAStatementIsVouchedForByItsDocument(t *testing.T) {
	t.Parallel()
	_, public := receiptKey()
	want := testStatement()
	b := receipt.Encode(want)
	data := receipt.UserData(receipt.KindBoot, b)
	got, err := receipt.CheckStatement(b, public, data)
	if err != nil {
		t.Fatalf("CheckStatement: %v", err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	other := ed25519.NewKeyFromSeed(make([]byte, 32)).Public().(ed25519.PublicKey)
	edited := func(edit func(*receipt.Statement)) []byte { s := testStatement(); edit(s); return receipt.Encode(s) }
	challenge := edited(func(s *receipt.Statement) { s.Kind = receipt.KindChallenge })
	second := edited(func(s *receipt.Statement) { s.Version = 2 })
	domain := edited(func(s *receipt.Statement) { s.Domain = receipt.ReceiptDomain })
	type evidence struct{ statement, public, data []byte }
	unproven := func(edit func(*receipt.Statement)) evidence {
		b := edited(edit)
		return evidence{b, public, receipt.UserData(receipt.KindBoot, b)}
	}
	for name, tt := range map[string]evidence{
		"another receipt key":    {b, other, data},
		"no receipt key":         {b, nil, data},
		"no user data":           {b, public, nil},
		"user data of a kms one": {b, public, receipt.UserData(receipt.KindKMS, b)},
		"no pair":                unproven(func(s *receipt.Statement) { s.Pairs = []receipt.Pair{} }),
		"three pairs":            unproven(func(s *receipt.Statement) { s.Pairs = append(s.Pairs, s.Pairs[0], s.Pairs[0]) }),
		"no hash of the policy":  unproven(func(s *receipt.Statement) { s.PolicyHash = [32]byte{} }),
		"no mode":                unproven(func(s *receipt.Statement) { s.Mode = "" }),
		"a mode of its own":      unproven(func(s *receipt.Statement) { s.Mode = "unproven" }),
		"another statement":      {edited(func(s *receipt.Statement) { s.Epoch++ }), public, data},
		"another kind":           {challenge, public, receipt.UserData(receipt.KindBoot, challenge)},
		"another version":        {second, public, receipt.UserData(receipt.KindBoot, second)},
		"another domain":         {domain, public, receipt.UserData(receipt.KindBoot, domain)},
		"a trailing byte":        {append(bytes.Clone(b), 0), public, receipt.UserData(receipt.KindBoot, append(bytes.Clone(b), 0))},
	} {
		if _, err := receipt.CheckStatement(tt.statement, tt.public, tt.data); !errors.Is(err, receipt.ErrMalformed) {
			t.Errorf("%s: got %v, want ErrMalformed", name, err)
		}
	}
	for i := range b {
		bad := bytes.Clone(b)
		bad[i] ^= 1
		if _, err := receipt.CheckStatement(bad, public, data); err == nil {
			t.Errorf("byte %d may be changed", i)
		}
	}
}

// These go into AWS documents and stored receipts: they must never change.
func TestHashesAreOverTheseBytes(t *testing.T) {
	t.Parallel()
	_, public := receiptKey()
	body := sha512.Sum384([]byte("body"))
	if diff := cmp.Diff("keyhold-attestation-v1:boot\x00"+string(body[:]), string(receipt.UserData("boot", []byte("body")))); diff != "" {
		t.Errorf("user data: %s", diff)
	}
	if receipt.BootIDOf(public) != sha256.Sum256(append([]byte("keyhold-boot-id-v1\x00"), public...)) {
		t.Error("boot id")
	}
	if receipt.ChainHash([]byte("signed")) != sha256.Sum256([]byte("keyhold-receipt-chain-v1\x00signed")) {
		t.Error("chain hash")
	}
}

// Computed with another CBOR encoder, written in Python for RFC 8949 4.2.1.
func TestAReceiptHasTheseBytes(t *testing.T) {
	t.Parallel()
	r := testReceipt(1, [32]byte{9})
	r.BootID = record.BootID{8}
	h := sha256.Sum256(receipt.Encode(r))
	if diff := cmp.Diff("99c9f30cc414496d9bd5b1512624d9c21658c376a01e5c364bda4ca498f4bf49", hex.EncodeToString(h[:])); diff != "" {
		t.Errorf("the encoding of receipts has changed: %s", diff)
	}
}

func TestAChainLeadsFromOneReceiptToTheNext(t *testing.T) {
	t.Parallel()
	key, public := receiptKey()
	var prev [32]byte
	for seq := uint64(1); seq <= 5; seq++ {
		signed := receipt.Sign(key, receipt.Encode(testReceipt(seq, prev)))
		r, err := receipt.OpenReceipt(public, signed)
		if err != nil {
			t.Fatalf("OpenReceipt: %v", err)
		}
		if r.Seq != seq || r.Prev != prev {
			t.Errorf("receipt %d has sequence %d", seq, r.Seq)
		}
		next := receipt.ChainHash(signed)
		if next == prev {
			t.Error("two receipts have one hash")
		}
		prev = next
	}
}

func FuzzDecodeTakesOnlyWhatEncodeGives(f *testing.F) {
	key, _ := receiptKey()
	f.Add(receipt.Encode(testReceipt(1, [32]byte{})))
	f.Add(receipt.Encode(testStatement()))
	f.Add(receipt.Encode(testHeads()))
	f.Add(receipt.Sign(key, []byte("body")))
	f.Fuzz(func(t *testing.T, b []byte) {
		roundTrip[receipt.Receipt](t, b)
		roundTrip[receipt.Statement](t, b)
		roundTrip[receipt.Heads](t, b)
		roundTrip[receipt.Signed](t, b)
	})
}

func roundTrip[T receipt.Statement | receipt.Receipt | receipt.Heads | receipt.Signed](t *testing.T, b []byte) {
	t.Helper()
	v, err := receipt.Decode[T](b)
	if err != nil {
		if !errors.Is(err, receipt.ErrMalformed) {
			t.Errorf("%T: got %v, want ErrMalformed", v, err)
		}
		return
	}
	if !slices.Equal(receipt.Encode(v), b) {
		t.Errorf("%T encodes to other bytes", v)
	}
	again, err := receipt.Decode[T](receipt.Encode(v))
	if err != nil {
		t.Fatalf("%T: %v", v, err)
	}
	if diff := cmp.Diff(v, again, cmpopts.EquateEmpty()); diff != "" {
		t.Error(diff)
	}
}

func FuzzOpenReceiptTakesOnlyTheSigned(f *testing.F) {
	key, public := receiptKey()
	good := receipt.Sign(key, receipt.Encode(testReceipt(1, [32]byte{})))
	f.Add(good)
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := receipt.OpenReceipt(public, b); err == nil && !slices.Equal(b, good) {
			t.Error("accepted what was not signed")
		}
	})
}

func FuzzCheckStatementTakesOnlyTheVouchedFor(f *testing.F) {
	_, public := receiptKey()
	good := receipt.Encode(testStatement())
	vouched := receipt.UserData(receipt.KindBoot, good)
	f.Add(good, vouched)
	f.Add(good, receipt.UserData(receipt.KindChallenge, nil))
	f.Fuzz(func(t *testing.T, b, userData []byte) {
		st, err := receipt.CheckStatement(b, public, userData)
		if err == nil && (!slices.Equal(receipt.Encode(st), b) || !slices.Equal(userData, receipt.UserData(receipt.KindBoot, b))) {
			t.Error("accepted what the document does not vouch for")
		}
	})
}

func FuzzOpenHeadsTakesOnlyTheSigned(f *testing.F) {
	key, public := receiptKey()
	heads := testHeads()
	good := receipt.Sign(key, receipt.Encode(heads))
	f.Add(good)
	f.Add(receipt.Sign(key, receipt.Encode(testReceipt(1, [32]byte{}))))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := receipt.OpenHeads(public, heads.Nonce, b); err == nil && !slices.Equal(b, good) {
			t.Error("accepted what was not signed")
		}
	})
}
