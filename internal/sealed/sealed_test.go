package sealed_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
)

const arn = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"

func header() *sealed.Header {
	return &sealed.Header{Version: 1, Keyring: "main", Epoch: 3, KMSKeyARN: arn, WrappedDEK: []byte("wrapped")}
}

func entry() *sealed.Entry {
	public := bytes.Repeat([]byte{4}, 65)
	return &sealed.Entry{
		Public: sealed.Public{
			Version: 1, Keyring: "main", Fingerprint: header().Fingerprint(), Epoch: 3,
			KeyID: sealed.KeyID(record.Secp256k1, public), Algorithm: record.Secp256k1, PublicKey: public,
			Address: "0x2c7536E3605D9C16a7a3D7b1898e529396a65c23", Policy: "messages",
		},
		Nonce: make([]byte, sealed.NonceLen), Ciphertext: make([]byte, 48),
	}
}

func TestHeadersAndEntriesComeBackAsTheyWere(t *testing.T) {
	t.Parallel()
	h, err := sealed.DecodeHeader(sealed.EncodeHeader(header()))
	if err != nil {
		t.Fatalf("DecodeHeader: %v", err)
	}
	if diff := cmp.Diff(header(), h); diff != "" {
		t.Error(diff)
	}
	e, err := sealed.DecodeEntry(sealed.EncodeEntry(entry()))
	if err != nil {
		t.Fatalf("DecodeEntry: %v", err)
	}
	if diff := cmp.Diff(entry(), e); diff != "" {
		t.Error(diff)
	}
}

// The format is stored for good: keys in the order of RFC 8949 4.2.1, ids as
// byte strings.
func TestAHeaderHasTheseBytes(t *testing.T) {
	t.Parallel()
	want := "a5" + "6176" + "01" +
		"65" + hex.EncodeToString([]byte("epoch")) + "03" +
		"67" + hex.EncodeToString([]byte("keyring")) + "64" + hex.EncodeToString([]byte("main")) +
		"6b" + hex.EncodeToString([]byte("kms_key_arn")) + "784e" + hex.EncodeToString([]byte(arn)) +
		"6b" + hex.EncodeToString([]byte("wrapped_dek")) + "47" + hex.EncodeToString([]byte("wrapped"))
	if diff := cmp.Diff(want, hex.EncodeToString(sealed.EncodeHeader(header()))); diff != "" {
		t.Error(diff)
	}
}

func TestAKeyIDIsTheHashOfAlgorithmAndPublicKey(t *testing.T) {
	t.Parallel()
	want := record.KeyID(sha256.Sum256([]byte("keyhold-key-id-v1\x00ed25519\x00public")))
	if got := sealed.KeyID(record.Ed25519, []byte("public")); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestFingerprintAndNames(t *testing.T) {
	t.Parallel()
	h := header()
	if h.Fingerprint() != sha256.Sum256([]byte("wrapped")) {
		t.Error("the fingerprint is not the SHA-256 of the wrapped key")
	}
	if h.ID() != "main#3" || sealed.KeyringID("a", 4294967295) != "a#4294967295" {
		t.Errorf("ids are %s and %s", h.ID(), sealed.KeyringID("a", 4294967295))
	}
	want := map[string]string{"keyhold:keyring": "main", "keyhold:epoch": "3"}
	if diff := cmp.Diff(want, sealed.EncryptionContext("main", 3)); diff != "" {
		t.Error(diff)
	}
}

func TestEveryPublicFieldIsInTheAAD(t *testing.T) {
	t.Parallel()
	seen := map[string]string{string(entryAAD(func(*sealed.Public) {})): "unchanged"}
	for name, edit := range map[string]func(*sealed.Public){
		"version":     func(p *sealed.Public) { p.Version = 2 },
		"keyring":     func(p *sealed.Public) { p.Keyring = "other" },
		"fingerprint": func(p *sealed.Public) { p.Fingerprint[31] ^= 1 },
		"epoch":       func(p *sealed.Public) { p.Epoch++ },
		"key id":      func(p *sealed.Public) { p.KeyID[0] ^= 1 },
		"algorithm":   func(p *sealed.Public) { p.Algorithm = record.P256 },
		"public key":  func(p *sealed.Public) { p.PublicKey = p.PublicKey[1:] },
		"address":     func(p *sealed.Public) { p.Address = "" },
		"policy":      func(p *sealed.Public) { p.Policy = "all" },
	} {
		aad := string(entryAAD(edit))
		if other, ok := seen[aad]; ok {
			t.Errorf("%s and %s have one AAD", name, other)
		}
		seen[aad] = name
	}
}

func entryAAD(edit func(*sealed.Public)) []byte {
	p := entry().Public
	edit(&p)
	return p.AAD()
}

func TestMalformedHeadersAreRefused(t *testing.T) {
	t.Parallel()
	for name, edit := range map[string]func(*sealed.Header){
		"version 0":        func(h *sealed.Header) { h.Version = 0 },
		"version 2":        func(h *sealed.Header) { h.Version = 2 },
		"no keyring":       func(h *sealed.Header) { h.Keyring = "" },
		"epoch 0":          func(h *sealed.Header) { h.Epoch = 0 },
		"no wrapped key":   func(h *sealed.Header) { h.WrappedDEK = nil },
		"wrapped too long": func(h *sealed.Header) { h.WrappedDEK = make([]byte, sealed.MaxWrappedLen+1) },
		"header too long":  func(h *sealed.Header) { h.Keyring = strings.Repeat("a", sealed.MaxHeaderLen) },
	} {
		h := header()
		edit(h)
		if _, err := sealed.DecodeHeader(sealed.EncodeHeader(h)); !errors.Is(err, sealed.ErrMalformed) {
			t.Errorf("%s: got %v, want ErrMalformed", name, err)
		}
	}
}

func TestMalformedEntriesAreRefused(t *testing.T) {
	t.Parallel()
	for name, edit := range map[string]func(*sealed.Entry){
		"version 0":       func(e *sealed.Entry) { e.Public.Version = 0 },
		"version 2":       func(e *sealed.Entry) { e.Public.Version = 2 },
		"other algorithm": func(e *sealed.Entry) { e.Public.Algorithm = record.P256 },
		"unknown algorithm": func(e *sealed.Entry) {
			e.Public.Algorithm = "dsa"
			e.Public.KeyID = sealed.KeyID("dsa", e.Public.PublicKey)
		},
		"other public key":     func(e *sealed.Entry) { e.Public.PublicKey[1] ^= 1 },
		"other key id":         func(e *sealed.Entry) { e.Public.KeyID[0] ^= 1 },
		"no policy":            func(e *sealed.Entry) { e.Public.Policy = "" },
		"no nonce":             func(e *sealed.Entry) { e.Nonce = nil },
		"short nonce":          func(e *sealed.Entry) { e.Nonce = e.Nonce[1:] },
		"long nonce":           func(e *sealed.Entry) { e.Nonce = append(e.Nonce, 0) },
		"ciphertext no tag":    func(e *sealed.Entry) { e.Ciphertext = e.Ciphertext[:15] },
		"no ciphertext":        func(e *sealed.Entry) { e.Ciphertext = nil },
		"entry over the limit": func(e *sealed.Entry) { e.Ciphertext = make([]byte, sealed.MaxEntryLen) },
	} {
		e := entry()
		edit(e)
		if _, err := sealed.DecodeEntry(sealed.EncodeEntry(e)); !errors.Is(err, sealed.ErrMalformed) {
			t.Errorf("%s: got %v, want ErrMalformed", name, err)
		}
	}
}

// Each of these means the same to a lenient reader.
func TestOtherEncodingsOfAHeaderAreRefused(t *testing.T) {
	t.Parallel()
	good := sealed.EncodeHeader(header())
	fields := map[string]any{"v": 1, "keyring": "main", "epoch": 3, "kms_key_arn": arn, "wrapped_dek": []byte("wrapped")}
	with := func(key string, value any) []byte {
		m := map[string]any{key: value}
		for k, v := range fields {
			if _, ok := m[k]; !ok {
				m[k] = v
			}
		}
		return marshal(t, m)
	}
	if diff := cmp.Diff(good, with("v", 1)); diff != "" {
		t.Fatalf("the test's own encoding is not canonical: %s", diff)
	}
	swapped := append([]byte{0xa5}, good[4:11]...) // epoch first
	swapped = append(append(swapped, good[1:4]...), good[11:]...)
	for name, b := range map[string][]byte{
		"nothing":           nil,
		"trailing byte":     append(bytes.Clone(good), 0),
		"cut off":           good[:len(good)-1],
		"unknown field":     with("extra", 1),
		"other capitals":    bytes.Replace(good, []byte("epoch"), []byte("Epoch"), 1),
		"missing field":     append([]byte{0xa4}, good[4:]...),
		"doubled field":     append([]byte{0xa6, 0x61, 'v', 1}, good[1:]...),
		"other order":       swapped,
		"longer number":     bytes.Replace(good, []byte("epoch\x03"), []byte("epoch\x18\x03"), 1),
		"float":             bytes.Replace(good, []byte("epoch\x03"), []byte("epoch\xf9\x42\x00"), 1),
		"indefinite map":    append(append([]byte{0xbf}, good[1:]...), 0xff),
		"indefinite bytes":  bytes.Replace(good, []byte("\x47wrapped"), []byte("\x5f\x47wrapped\xff"), 1),
		"tagged":            append([]byte{0xd9, 0xd9, 0xf7}, good...),
		"text for bytes":    with("wrapped_dek", "wrapped"),
		"bytes for text":    with("keyring", []byte("main")),
		"null for bytes":    with("wrapped_dek", nil),
		"negative epoch":    with("epoch", -1),
		"epoch over 32 bit": with("epoch", uint64(1)<<32),
		"invalid UTF-8":     bytes.Replace(good, []byte("\x64main"), []byte("\x64ma\xffn"), 1),
	} {
		if slices.Equal(b, good) {
			t.Errorf("%s: the test changes nothing", name)
		}
		if _, err := sealed.DecodeHeader(b); !errors.Is(err, sealed.ErrMalformed) {
			t.Errorf("%s: got %v, want ErrMalformed", name, err)
		}
	}
}

func TestIDsOfAnotherLengthAreRefused(t *testing.T) {
	t.Parallel()
	good := sealed.EncodeEntry(entry())
	id := entry().Public.KeyID
	field := append([]byte("\x66key_id\x58\x20"), id[:]...)
	if !bytes.Contains(good, field) {
		t.Fatal("the entry does not hold the key id as a byte string")
	}
	for name, repl := range map[string][]byte{
		"shorter": append([]byte("\x66key_id\x58\x1f"), id[:31]...),
		"longer":  append(append([]byte("\x66key_id\x58\x21"), id[:]...), 0),
		"hex":     append([]byte("\x66key_id\x78\x40"), id.String()...),
		"null":    []byte("\x66key_id\xf6"),
	} {
		if _, err := sealed.DecodeEntry(bytes.Replace(good, field, repl, 1)); !errors.Is(err, sealed.ErrMalformed) {
			t.Errorf("%s: got %v, want ErrMalformed", name, err)
		}
	}
}

func marshal(tb testing.TB, v any) []byte {
	tb.Helper()
	mode, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		tb.Fatalf("EncMode: %v", err)
	}
	b, err := mode.Marshal(v)
	if err != nil {
		tb.Fatalf("Marshal: %v", err)
	}
	return b
}

func FuzzDecodeHeaderTakesOnlyWhatEncodeGives(f *testing.F) {
	f.Add(sealed.EncodeHeader(header()))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := sealed.DecodeHeader(b)
		if err == nil && !slices.Equal(sealed.EncodeHeader(h), b) {
			t.Error("encodes to other bytes")
		}
		if err != nil && !errors.Is(err, sealed.ErrMalformed) {
			t.Errorf("got %v, want ErrMalformed", err)
		}
	})
}

func FuzzDecodeEntryTakesOnlyWhatEncodeGives(f *testing.F) {
	f.Add(sealed.EncodeEntry(entry()))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := sealed.DecodeEntry(b)
		if err == nil && !slices.Equal(sealed.EncodeEntry(e), b) {
			t.Error("encodes to other bytes")
		}
		if err != nil && !errors.Is(err, sealed.ErrMalformed) {
			t.Errorf("got %v, want ErrMalformed", err)
		}
	})
}
