package keyring_test

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/enclave/internal/keyring"
	"github.com/keyhold/keyhold/enclave/internal/secret"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/payload"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
)

const testARN = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"

// testConfig permits two keys of each algorithm, and of some more.
func testConfig() *config.Config {
	c := &config.Config{
		Version: 1, KMSKeyARN: testARN, Keyring: "main", Epochs: []uint32{1, 2}, SealEpoch: 2,
		Policies: []config.Policy{
			{Name: "all", Kinds: record.Kinds()},
			{Name: "messages", Kinds: []record.Kind{record.Message}},
		},
		Lease:     config.LeaseLimit{MaxMS: config.DefaultLeaseMaxMS, MarginMS: config.DefaultLeaseMarginMS},
		KeyPolicy: config.DefaultKeyPolicy(),
	}
	for _, a := range record.Algorithms() {
		c.Create = append(c.Create, config.Create{Algorithm: a, Policy: "all", Max: 2})
	}
	c.Create = append(c.Create, config.Create{Algorithm: record.Secp256k1, Policy: "messages", Max: 100_000})
	return c
}

func testHeader() *sealed.Header {
	return &sealed.Header{Version: 1, Keyring: "main", Epoch: 2, KMSKeyARN: testARN, WrappedDEK: []byte("wrapped data key")}
}

func testDEK() *secret.Bytes { return secret.New(bytes.Repeat([]byte{0x42}, 32)) }

func newRing(tb testing.TB, cfg *config.Config, h *sealed.Header) *keyring.Ring {
	tb.Helper()
	r, err := keyring.New(cfg, h, testDEK())
	if err != nil {
		tb.Fatalf("New: %v", err)
	}
	tb.Cleanup(r.Destroy)
	return r
}

func create(tb testing.TB, r *keyring.Ring, a record.Algorithm, policy string) (entry []byte, k *keyring.Key) {
	tb.Helper()
	entries, err := r.Create(a, policy, 1)
	if err != nil {
		tb.Fatalf("Create: %v", err)
	}
	e, err := sealed.DecodeEntry(entries[0])
	if err != nil {
		tb.Fatalf("Create gave no entry: %v", err)
	}
	k, err = r.Key(e.Public.KeyID)
	if err != nil {
		tb.Fatalf("Key: %v", err)
	}
	return entries[0], k
}

func sign(tb testing.TB, k *keyring.Key, kind record.Kind, p []byte) []byte {
	tb.Helper()
	s, err := k.NewSigner(kind)
	if err != nil {
		tb.Fatalf("NewSigner: %v", err)
	}
	sig, err := s.Sign(p)
	if err != nil {
		tb.Fatalf("Sign: %v", err)
	}
	if !s.Verify(sig) {
		tb.Fatal("Signer.Verify refuses its own signature")
	}
	return sig
}

func TestCreatedKeysSignAndOpenElsewhereAsTheSameKeys(t *testing.T) {
	t.Parallel()
	digest := bytes.Repeat([]byte{7}, 32)
	for _, a := range record.Algorithms() {
		t.Run(string(a), func(t *testing.T) {
			t.Parallel()
			entry, k := create(t, newRing(t, testConfig(), testHeader()), a, "all")
			other := newRing(t, testConfig(), testHeader())
			if err := other.Open(entry); err != nil {
				t.Fatalf("Open: %v", err)
			}
			again, err := other.Key(k.ID())
			if err != nil {
				t.Fatalf("Key: %v", err)
			}
			if diff := cmp.Diff(k.PublicKey(), again.PublicKey()); diff != "" {
				t.Errorf("public key differs after opening: %s", diff)
			}
			if again.Algorithm() != a || again.Policy().Name != "all" || again.PolicyHash() != again.Policy().Hash() {
				t.Errorf("opened as %s under policy %s", again.Algorithm(), again.Policy().Name)
			}
			for _, kind := range record.Kinds() {
				if a == record.Ed25519 && kind == record.Digest {
					continue
				}
				sig := sign(t, k, kind, digest)
				if err := payload.Verify(a, k.PublicKey(), kind, digest, sig); err != nil {
					t.Errorf("%s does not verify independently: %v", kind, err)
				}
				if diff := cmp.Diff(sig, sign(t, again, kind, digest)); diff != "" {
					t.Errorf("%s: the opened key signs other bytes: %s", kind, diff)
				}
			}
		})
	}
}

func TestVerifyRefusesEveryChangedByteOfASignature(t *testing.T) {
	t.Parallel()
	for _, a := range record.Algorithms() {
		t.Run(string(a), func(t *testing.T) {
			t.Parallel()
			_, k := create(t, newRing(t, testConfig(), testHeader()), a, "all")
			s, err := k.NewSigner(record.Message)
			if err != nil {
				t.Fatalf("NewSigner: %v", err)
			}
			if s.Verify(make([]byte, a.SignatureLen())) {
				t.Error("verified before anything was signed")
			}
			sig, err := s.Sign([]byte("payload"))
			if err != nil {
				t.Fatalf("Sign: %v", err)
			}
			for i := range sig {
				bad := bytes.Clone(sig)
				bad[i] ^= 0x10
				if s.Verify(bad) {
					t.Errorf("byte %d may be changed", i)
				}
			}
			if s.Verify(sig[:len(sig)-1]) || s.Verify(append(bytes.Clone(sig), 0)) || s.Verify(nil) {
				t.Error("a signature of another length was accepted")
			}
			if _, err := s.Sign([]byte("another payload")); err != nil {
				t.Fatalf("Sign: %v", err)
			}
			if s.Verify(sig) {
				t.Error("the signature of the payload before was accepted")
			}
		})
	}
}

func TestHeaderThatIsNotTheConfigsIsRefused(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		edit func(*sealed.Header)
		dek  int
		want refusal.Code
	}{
		"other keyring":  {func(h *sealed.Header) { h.Keyring = "other" }, 32, refusal.KeyringInvalid},
		"other KMS key":  {func(h *sealed.Header) { h.KMSKeyARN += "0" }, 32, refusal.KeyringInvalid},
		"other version":  {func(h *sealed.Header) { h.Version = 2 }, 32, refusal.KeyringInvalid},
		"no wrapped key": {func(h *sealed.Header) { h.WrappedDEK = nil }, 32, refusal.KeyringInvalid},
		"closed epoch":   {func(h *sealed.Header) { h.Epoch = 3 }, 32, refusal.EpochClosed},
		"short data key": {func(*sealed.Header) {}, 31, refusal.KMSReply},
		"long data key":  {func(*sealed.Header) {}, 33, refusal.KMSReply},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, dek := testHeader(), secret.New(make([]byte, tt.dek))
			tt.edit(h)
			if _, err := keyring.New(testConfig(), h, dek); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %s", err, tt.want)
			}
			if dek.Len() != 0 {
				t.Error("the data key was not destroyed")
			}
		})
	}
}

func TestCreateKeepsToTheConfig(t *testing.T) {
	t.Parallel()
	old := testHeader()
	old.Epoch = 1
	tests := map[string]struct {
		header    *sealed.Header
		algorithm record.Algorithm
		policy    string
		n         int
		want      refusal.Code
	}{
		"a pair that is not listed":            {testHeader(), record.Ed25519, "messages", 1, refusal.CreateDenied},
		"a policy that does not exist":         {testHeader(), record.Ed25519, "none", 1, refusal.CreateDenied},
		"an algorithm that does not exist":     {testHeader(), "dsa", "all", 1, refusal.CreateDenied},
		"more than the limit":                  {testHeader(), record.Ed25519, "all", 3, refusal.CreateLimit},
		"none":                                 {testHeader(), record.Ed25519, "all", 0, refusal.CreateLimit},
		"less than none":                       {testHeader(), record.Ed25519, "all", -1, refusal.CreateLimit},
		"an epoch that is open but not sealed": {old, record.Ed25519, "all", 1, refusal.EpochClosed},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRing(t, testConfig(), tt.header)
			if _, err := r.Create(tt.algorithm, tt.policy, tt.n); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %s", err, tt.want)
			}
			if r.Len() != 0 {
				t.Errorf("%d keys were made", r.Len())
			}
		})
	}
}

func TestTheLimitCountsOpenedKeysAndHoldsAgainstManyMakers(t *testing.T) {
	t.Parallel()
	entry, _ := create(t, newRing(t, testConfig(), testHeader()), record.Ed25519, "all")
	r := newRing(t, testConfig(), testHeader())
	for range 2 { // the second time changes nothing
		if err := r.Open(entry); err != nil {
			t.Fatalf("Open: %v", err)
		}
	}
	var wg sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		wg.Go(func() { _, errs[i] = r.Create(record.Ed25519, "all", 1) })
	}
	wg.Wait()
	made := 0
	for _, err := range errs {
		switch {
		case err == nil:
			made++
		case !errors.Is(err, refusal.CreateLimit):
			t.Errorf("got %v, want create_limit", err)
		}
	}
	if made != 1 || r.Len() != 2 {
		t.Errorf("made %d keys, the ring has %d: want 1 and 2", made, r.Len())
	}
}

func TestDeniedAndUnknownKeysAreRefused(t *testing.T) {
	t.Parallel()
	entry, k := create(t, newRing(t, testConfig(), testHeader()), record.Secp256k1, "messages")
	cfg := testConfig()
	cfg.DenyKeys = []string{k.ID().String()}
	r := newRing(t, cfg, testHeader())
	if err := r.Open(entry); !errors.Is(err, refusal.KeyDenied) {
		t.Errorf("Open: got %v, want key_denied", err)
	}
	if _, err := r.Key(k.ID()); !errors.Is(err, refusal.KeyDenied) {
		t.Errorf("Key: got %v, want key_denied", err)
	}
	if _, err := r.Key(record.KeyID{1}); !errors.Is(err, refusal.KeyUnknown) {
		t.Errorf("Key: got %v, want key_unknown", err)
	}
}

func TestThePolicyDecidesWhatAKeySigns(t *testing.T) {
	t.Parallel()
	r := newRing(t, testConfig(), testHeader())
	_, messages := create(t, r, record.Secp256k1, "messages")
	_, edwards := create(t, r, record.Ed25519, "all")
	tests := []struct {
		key  *keyring.Key
		kind record.Kind
		want error
	}{
		{messages, record.Message, nil},
		{messages, record.Raw, refusal.PolicyDenied},
		{messages, record.Digest, refusal.PolicyDenied},
		{messages, "transaction", refusal.PolicyDenied},
		{edwards, record.Raw, nil},
		{edwards, record.Digest, refusal.PolicyDenied},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%s %s", tt.key.Algorithm(), tt.kind), func(t *testing.T) {
			t.Parallel()
			if _, err := tt.key.NewSigner(tt.kind); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
	cfg := testConfig()
	cfg.Policies, cfg.Create = cfg.Policies[1:], nil
	entry, _ := create(t, r, record.P256, "all")
	if err := newRing(t, cfg, testHeader()).Open(entry); !errors.Is(err, refusal.PolicyDenied) {
		t.Errorf("a key whose policy is gone: got %v, want policy_denied", err)
	}
}

func TestADigestOfAnotherLengthIsRefusedAndTheNextSigned(t *testing.T) {
	t.Parallel()
	for _, a := range []record.Algorithm{record.Secp256k1, record.P256, record.RSA2048} {
		_, k := create(t, newRing(t, testConfig(), testHeader()), a, "all")
		s, err := k.NewSigner(record.Digest)
		if err != nil {
			t.Fatalf("NewSigner: %v", err)
		}
		good, err := s.Sign(make([]byte, 32))
		if err != nil {
			t.Fatalf("%s: %v", a, err)
		}
		for _, n := range []int{0, 31, 33, 64} {
			if _, err := s.Sign(make([]byte, n)); !errors.Is(err, refusal.DigestLength) {
				t.Errorf("%s, %d bytes: got %v, want digest_length", a, n, err)
			}
			if s.Verify(good) {
				t.Errorf("%s: a signature verified after a refused record", a)
			}
		}
		if _, err := s.Sign(make([]byte, 32)); err != nil {
			t.Errorf("%s: after a refusal: %v", a, err)
		}
	}
}

func TestADestroyedRingSignsNothing(t *testing.T) {
	t.Parallel()
	r := newRing(t, testConfig(), testHeader())
	entry, k := create(t, r, record.Secp256k1, "messages")
	s, err := k.NewSigner(record.Message)
	if err != nil {
		t.Fatalf("NewSigner: %v", err)
	}
	r.Destroy()
	r.Destroy()
	if _, err := s.Sign([]byte("x")); !errors.Is(err, refusal.NoKeyring) {
		t.Errorf("Sign: got %v, want no_keyring", err)
	}
	if _, err := k.NewSigner(record.Message); !errors.Is(err, refusal.NoKeyring) {
		t.Errorf("NewSigner: got %v, want no_keyring", err)
	}
	if err := r.Open(entry); !errors.Is(err, refusal.NoKeyring) {
		t.Errorf("Open: got %v, want no_keyring", err)
	}
	if _, err := r.Create(record.Secp256k1, "messages", 1); !errors.Is(err, refusal.NoKeyring) {
		t.Errorf("Create: got %v, want no_keyring", err)
	}
	if _, err := r.Key(k.ID()); !errors.Is(err, refusal.KeyUnknown) {
		t.Errorf("Key: got %v, want key_unknown", err)
	}
	if r.Len() != 0 {
		t.Errorf("Len is %d", r.Len())
	}
}

func TestOpeningMakingSigningAndDestroyingAtOnce(t *testing.T) {
	t.Parallel()
	maker := newRing(t, testConfig(), testHeader())
	entries, err := maker.Create(record.Secp256k1, "messages", 64)
	if err != nil {
		t.Fatalf("Create: %v", err)
	}
	r := newRing(t, testConfig(), testHeader())
	_, k := create(t, r, record.Secp256k1, "messages")
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range entries {
				if err := r.Open(entries[(i+16*g)%len(entries)]); err != nil {
					t.Errorf("Open: %v", err)
				}
			}
		})
		wg.Go(func() {
			s, err := k.NewSigner(record.Message)
			if err != nil {
				t.Errorf("NewSigner: %v", err)
				return
			}
			for range 64 {
				if sig, err := s.Sign([]byte("x")); err != nil || !s.Verify(sig) {
					t.Errorf("Sign: %v", err)
				}
			}
		})
		wg.Go(func() {
			if _, err := r.Create(record.Secp256k1, "messages", 4); err != nil {
				t.Errorf("Create: %v", err)
			}
		})
	}
	wg.Wait()
	if want := 64 + 1 + 16; r.Len() != want {
		t.Errorf("the ring has %d keys, want %d", r.Len(), want)
	}
	wg.Go(func() { r.Destroy() })
	wg.Go(func() {
		s, err := k.NewSigner(record.Message)
		for err == nil {
			_, err = s.Sign([]byte("x"))
		}
		if !errors.Is(err, refusal.NoKeyring) {
			t.Errorf("while destroying: %v", err)
		}
	})
	wg.Wait()
}

func TestEveryNonceAndKeyIsNew(t *testing.T) {
	t.Parallel()
	entries, err := newRing(t, testConfig(), testHeader()).Create(record.Secp256k1, "messages", 200)
	if err != nil {
		t.Fatalf("Create: %v", err)
	}
	seen := make(map[string]bool)
	for _, b := range entries {
		e, err := sealed.DecodeEntry(b)
		if err != nil {
			t.Fatalf("DecodeEntry: %v", err)
		}
		seen[string(e.Nonce)], seen[string(e.Public.PublicKey)] = true, true
	}
	if len(seen) != 400 {
		t.Errorf("200 keys have %d different nonces and public keys", len(seen))
	}
}

func TestEpochAndFingerprintAreTheHeaders(t *testing.T) {
	t.Parallel()
	r := newRing(t, testConfig(), testHeader())
	if r.Epoch() != 2 || r.Fingerprint() != testHeader().Fingerprint() {
		t.Errorf("got epoch %d and fingerprint %x", r.Epoch(), r.Fingerprint())
	}
}
