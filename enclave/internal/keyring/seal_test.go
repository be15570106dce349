package keyring_test

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/x509"
	"errors"
	"math/big"
	"slices"
	"testing"

	ethcrypto "github.com/ethereum/go-ethereum/crypto"
	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/enclave/internal/keyring"
	"github.com/keyhold/keyhold/enclave/internal/secret"
	"github.com/keyhold/keyhold/internal/payload"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
)

func refuses(tb testing.TB, r *keyring.Ring, entry []byte, what string) {
	tb.Helper()
	before := r.Len()
	if err := r.Open(entry); !errors.Is(err, refusal.SealedInvalid) {
		tb.Errorf("%s: got %v, want sealed_invalid", what, err)
	}
	if r.Len() != before {
		tb.Errorf("%s: a key was added", what)
	}
}

func TestEveryChangedByteOfAnEntryIsRefused(t *testing.T) {
	t.Parallel()
	r := newRing(t, testConfig(), testHeader())
	for _, a := range record.Algorithms() {
		entry, _ := create(t, r, a, "all")
		other := newRing(t, testConfig(), testHeader())
		for i := range entry {
			for _, bit := range []byte{0x01, 0x20, 0x80} {
				bad := bytes.Clone(entry)
				bad[i] ^= bit
				refuses(t, other, bad, "a changed byte")
			}
		}
		refuses(t, other, entry[:len(entry)-1], "a cut entry")
		refuses(t, other, append(bytes.Clone(entry), 0), "a longer entry")
		refuses(t, other, nil, "an empty entry")
		if err := other.Open(entry); err != nil {
			t.Errorf("the unchanged %s entry: %v", a, err)
		}
	}
}

// Edits that keep the form whole: what they break is the seal.
func TestEveryEditedFieldIsRefused(t *testing.T) {
	t.Parallel()
	r := newRing(t, testConfig(), testHeader())
	entry, _ := create(t, r, record.Secp256k1, "all")
	second, _ := create(t, r, record.Secp256k1, "all")
	from, err := sealed.DecodeEntry(second)
	if err != nil {
		t.Fatalf("DecodeEntry: %v", err)
	}
	tests := map[string]func(*sealed.Entry){
		"wider policy":       func(e *sealed.Entry) { e.Public.Policy = "messages" },
		"other keyring":      func(e *sealed.Entry) { e.Public.Keyring = "other" },
		"other epoch":        func(e *sealed.Entry) { e.Public.Epoch = 1 },
		"other fingerprint":  func(e *sealed.Entry) { e.Public.Fingerprint[0] ^= 1 },
		"no address":         func(e *sealed.Entry) { e.Public.Address = "" },
		"address of another": func(e *sealed.Entry) { e.Public.Address = from.Public.Address },
		"public of another":  func(e *sealed.Entry) { e.Public = from.Public },
		"secret of another":  func(e *sealed.Entry) { e.Nonce, e.Ciphertext = from.Nonce, from.Ciphertext },
		"nonce of another":   func(e *sealed.Entry) { e.Nonce = from.Nonce },
		"key id of another":  func(e *sealed.Entry) { e.Public.KeyID = from.Public.KeyID },
		"other algorithm":    func(e *sealed.Entry) { e.Public.Algorithm = record.P256 },
		"other algorithm, id": func(e *sealed.Entry) {
			e.Public.Algorithm = record.P256
			e.Public.KeyID = sealed.KeyID(record.P256, e.Public.PublicKey)
		},
		"other version": func(e *sealed.Entry) { e.Public.Version = 2 },
		"tag cut off":   func(e *sealed.Entry) { e.Ciphertext = e.Ciphertext[:len(e.Ciphertext)-1] },
	}
	for name, edit := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, err := sealed.DecodeEntry(entry)
			if err != nil {
				t.Fatalf("DecodeEntry: %v", err)
			}
			edit(e)
			refuses(t, newRing(t, testConfig(), testHeader()), sealed.EncodeEntry(e), name)
		})
	}
}

func TestEntriesOfAnotherRingAreRefused(t *testing.T) {
	t.Parallel()
	entry, _ := create(t, newRing(t, testConfig(), testHeader()), record.Secp256k1, "all")

	epoch := testHeader()
	epoch.Epoch = 1
	refuses(t, newRing(t, testConfig(), epoch), entry, "another epoch")

	fingerprint := testHeader()
	fingerprint.WrappedDEK = []byte("another wrapping of the same data key")
	refuses(t, newRing(t, testConfig(), fingerprint), entry, "another fingerprint")

	name, cfg := testHeader(), testConfig()
	name.Keyring, cfg.Keyring = "other", "other"
	refuses(t, newRing(t, cfg, name), entry, "another keyring")

	dek, err := keyring.New(testConfig(), testHeader(), secret.New(make([]byte, 32)))
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	refuses(t, dek, entry, "another data key")
}

// An entry with a good seal over a wrong public part is what a bug in sealing
// would make; opening derives everything again and does not trust the seal.
func TestAPublicPartThatDoesNotFollowFromTheKeyIsRefused(t *testing.T) {
	t.Parallel()
	r := newRing(t, testConfig(), testHeader())
	for _, a := range record.Algorithms() {
		entry, _ := create(t, r, a, "all")
		e, err := sealed.DecodeEntry(entry)
		if err != nil {
			t.Fatalf("DecodeEntry: %v", err)
		}
		seal := func(p sealed.Public, private []byte) []byte {
			b, err := keyring.TestingOnlySeal(r, p, private)
			if err != nil {
				t.Fatalf("seal: %v", err)
			}
			return b
		}
		other := newRing(t, testConfig(), testHeader())
		refuses(t, other, seal(e.Public, bytes.Repeat([]byte{9}, 32)), "another key of "+string(a))
		refuses(t, other, seal(e.Public, bytes.Repeat([]byte{9}, 31)), "a short key of "+string(a))
		refuses(t, other, seal(e.Public, nil), "no key of "+string(a))
		refuses(t, other, seal(e.Public, make([]byte, 32)), "a zero key of "+string(a))
	}
}

func TestAWrongAddressUnderAGoodSealIsRefused(t *testing.T) {
	t.Parallel()
	r := newRing(t, testConfig(), testHeader())
	scalar := bytes.Repeat([]byte{5}, 32)
	p := publicOf(t, scalar)
	good, err := keyring.TestingOnlySeal(r, p, scalar)
	if err != nil {
		t.Fatalf("seal: %v", err)
	}
	if err := r.Open(good); err != nil {
		t.Fatalf("Open: %v", err)
	}
	p.Address = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"
	bad, err := keyring.TestingOnlySeal(r, p, scalar)
	if err != nil {
		t.Fatalf("seal: %v", err)
	}
	refuses(t, newRing(t, testConfig(), testHeader()), bad, "another address")
	p = publicOf(t, scalar)
	p.Policy = "messages"
	second, err := keyring.TestingOnlySeal(r, p, scalar)
	if err != nil {
		t.Fatalf("seal: %v", err)
	}
	refuses(t, r, second, "an open key under another policy")
}

// publicOf derives the public part with another implementation than the ring's.
func publicOf(tb testing.TB, scalar []byte) sealed.Public {
	tb.Helper()
	key, err := ethcrypto.ToECDSA(scalar)
	if err != nil {
		tb.Fatalf("ToECDSA: %v", err)
	}
	public := ethcrypto.FromECDSAPub(&key.PublicKey)
	return sealed.Public{
		Version: 1, Keyring: "main", Fingerprint: testHeader().Fingerprint(), Epoch: 2,
		KeyID: sealed.KeyID(record.Secp256k1, public), Algorithm: record.Secp256k1, PublicKey: public,
		Address: ethcrypto.PubkeyToAddress(key.PublicKey).Hex(), Policy: "all",
	}
}

// RFC 6979 A.2.5, P-256 with SHA-256: the digest kind signs SHA-256("sample").
func TestP256IsDeterministicAsRFC6979Says(t *testing.T) {
	t.Parallel()
	scalar := hexBytes(t, "c9afa9d845ba75166b5c215767b1d6934e50c3db36e89b127b8a622b120f6721")
	public := hexBytes(t, "04"+
		"60fed4ba255a9d31c961eb74c6356d68c049b8923b61fa6ce669622e60f29fb6"+
		"7903fe1008b8bc99a41ae9e95628bc64f2f1b20c2d7e9f5177a3c294d4462299")
	want := hexBytes(t, "efd48b2aacb6a8fd1140dd9cd45e81d69d2c877b56aaf991c34d0ea84eaf3716"+
		"f7cb1c942d657c41d436c7a1b6e29f65f3e900dbb9aff4064dc4ab2f843acda8")
	k := openPlanted(t, record.P256, scalar, public)
	if diff := cmp.Diff(want, sign(t, k, record.Raw, []byte("sample"))); diff != "" {
		t.Errorf("another signature than RFC 6979's: %s", diff)
	}
}

// RFC 8032 7.1, TEST 2.
func TestEd25519SignsAsRFC8032Says(t *testing.T) {
	t.Parallel()
	seed := hexBytes(t, "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
	public := hexBytes(t, "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
	want := hexBytes(t, "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"+
		"085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00")
	k := openPlanted(t, record.Ed25519, seed, public)
	if diff := cmp.Diff(want, sign(t, k, record.Raw, []byte{0x72})); diff != "" {
		t.Errorf("another signature than RFC 8032's: %s", diff)
	}
}

// Deterministic signing leaves one right answer: go-ethereum signs the same
// digest to the same bytes, with v moved by 27.
func TestSecp256k1MessagesAreGoEthereumsWithVMoved(t *testing.T) {
	t.Parallel()
	scalar := bytes.Repeat([]byte{0x11}, 32)
	p := publicOf(t, scalar)
	k := openPlanted(t, record.Secp256k1, scalar, p.PublicKey)
	key, err := ethcrypto.ToECDSA(scalar)
	if err != nil {
		t.Fatalf("ToECDSA: %v", err)
	}
	for _, kind := range record.Kinds() {
		for i := range 50 {
			message := ethcrypto.Keccak256([]byte{byte(i)})
			digest, err := payload.Digest(record.Secp256k1, kind, message)
			if err != nil {
				t.Fatalf("Digest: %v", err)
			}
			want, err := ethcrypto.Sign(digest, key)
			if err != nil {
				t.Fatalf("reference: %v", err)
			}
			want[64] += 27
			got := sign(t, k, kind, message)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Fatalf("%s: %s", kind, diff)
			}
			half := new(big.Int).Rsh(ethcrypto.S256().Params().N, 1)
			if new(big.Int).SetBytes(got[32:64]).Cmp(half) > 0 {
				t.Fatal("s is the higher one")
			}
		}
	}
}

func TestRSAKeysHave2048BitsAndTheUsualExponent(t *testing.T) {
	t.Parallel()
	_, k := create(t, newRing(t, testConfig(), testHeader()), record.RSA2048, "all")
	if _, err := x509.ParsePKIXPublicKey(k.PublicKey()); err != nil {
		t.Fatalf("not PKIX: %v", err)
	}
	// PKIX DER of a 2048-bit key with exponent 65537 has 294 bytes and ends so.
	if n := len(k.PublicKey()); n != 294 || !bytes.HasSuffix(k.PublicKey(), []byte{2, 3, 1, 0, 1}) {
		t.Errorf("public key has %d bytes and ends in %x", n, k.PublicKey()[n-5:])
	}
}

// publicPart is what the test's ring writes of such a key.
func publicPart(a record.Algorithm, public []byte) sealed.Public {
	p := sealed.Public{
		Version: 1, Keyring: "main", Fingerprint: testHeader().Fingerprint(), Epoch: 2,
		KeyID: sealed.KeyID(a, public), Algorithm: a, PublicKey: public, Policy: "all",
	}
	if a == record.Secp256k1 {
		p.Address = payload.Address(public)
	}
	return p
}

// openPlanted opens a key whose private bytes the test knows.
func openPlanted(tb testing.TB, a record.Algorithm, private, public []byte) *keyring.Key {
	tb.Helper()
	return plant(tb, newRing(tb, testConfig(), testHeader()), publicPart(a, public), private)
}

// The fuzzer edits entries instead of making them: each of its processes has
// keys of its own, so it could not hand over whole ones.
func FuzzOpenAcceptsOnlyWhatWasSealed(f *testing.F) {
	maker := newRing(f, testConfig(), testHeader())
	var known [][]byte
	for i, a := range record.Algorithms() {
		entry, _ := create(f, maker, a, "all")
		known = append(known, entry)
		f.Add(uint8(i), uint16(0), uint16(0), []byte{})
		f.Add(uint8(i), uint16(len(entry)-1), uint16(1), []byte{0})
	}
	f.Fuzz(func(t *testing.T, which uint8, at, cut uint16, insert []byte) {
		entry := known[int(which)%len(known)]
		from := min(int(at), len(entry))
		to := min(from+int(cut), len(entry))
		edited := bytes.Join([][]byte{entry[:from], insert, entry[to:]}, nil)
		err := newRing(t, testConfig(), testHeader()).Open(edited)
		if slices.Equal(edited, entry) {
			if err != nil {
				t.Errorf("the unchanged entry: %v", err)
			}
			return
		}
		if !errors.Is(err, refusal.SealedInvalid) {
			t.Errorf("an edited entry: got %v, want sealed_invalid", err)
		}
	})
}

// publicFor derives the public part of any 32-byte private key outside of the ring.
func publicFor(tb testing.TB, a record.Algorithm, private []byte) sealed.Public {
	tb.Helper()
	var public []byte
	switch a {
	case record.Secp256k1:
		return publicOf(tb, private)
	case record.Ed25519:
		public = ed25519.NewKeyFromSeed(private)[32:]
	case record.P256:
		key, err := ecdh.P256().NewPrivateKey(private)
		if err != nil {
			tb.Fatalf("NewPrivateKey: %v", err)
		}
		public = key.PublicKey().Bytes()
	case record.RSA2048:
		tb.Fatalf("no 32-byte keys of %s", a)
	}
	return publicPart(a, public)
}
