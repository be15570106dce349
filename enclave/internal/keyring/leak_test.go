package keyring_test

import (
	"bytes"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/fxamacker/cbor/v2"

	"github.com/keyhold/keyhold/enclave/internal/keyring"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
)

func hexBytes(tb testing.TB, s string) []byte {
	tb.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		tb.Fatalf("hex: %v", err)
	}
	return b
}

// marker is a scalar of printable bytes, so that it shows up under any verb.
const marker = "KEYHOLD-MARKER-SCALAR-0123456789"

// spellings of a secret, as verbs and encoders would write it.
func spellings(b []byte) []string {
	decimals := strings.Trim(fmt.Sprintf("%d", b), "[]")
	return []string{
		string(b), hex.EncodeToString(b), strings.ToUpper(hex.EncodeToString(b)), base64.StdEncoding.EncodeToString(b)[:40],
		decimals, strings.ReplaceAll(decimals, " ", ","), strings.ReplaceAll(decimals, " ", ", "),
		strings.TrimSuffix(strings.TrimPrefix(fmt.Sprintf("%#v", b), "[]byte{"), "}"),
		fmt.Sprintf("% x", b), hex.EncodeToString(b[:8]), string(b[:8]),
	}
}

// secrets are the spellings of the marker, of the data key and of what HKDF
// extracts from it.
var secrets = sync.OnceValue(func() []string {
	dek := bytes.Repeat([]byte{0x42}, 32)
	root, err := hkdf.Extract(sha256.New, dek, nil)
	if err != nil {
		panic(err)
	}
	return slices.Concat(spellings([]byte(marker)), spellings(dek), spellings(root))
})

func silent(tb testing.TB, how, out string, more ...string) {
	tb.Helper()
	for _, s := range slices.Concat(secrets(), more) {
		if strings.Contains(out, s) {
			tb.Errorf("%s shows a secret", how)
			return
		}
	}
}

// outer has its secrets in unexported fields, where fmt calls no methods.
type outer struct {
	ring   *keyring.Ring
	key    *keyring.Key
	signer *keyring.Signer
	rings  []keyring.Ring
	keys   map[string]keyring.Key
	any    any
}

func TestNoVerbLoggerOrEncoderShowsAScalar(t *testing.T) {
	t.Parallel()
	for _, a := range []record.Algorithm{record.Secp256k1, record.Ed25519, record.P256} {
		t.Run(string(a), func(t *testing.T) {
			t.Parallel()
			r := newRing(t, testConfig(), testHeader())
			checkAll(t, r, plant(t, r, publicFor(t, a, []byte(marker)), []byte(marker)))
		})
	}
}

func TestNoVerbLoggerOrEncoderShowsAnRSAKey(t *testing.T) {
	t.Parallel()
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatalf("GenerateKey: %v", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatalf("PKCS #8: %v", err)
	}
	public, err := x509.MarshalPKIXPublicKey(&private.PublicKey)
	if err != nil {
		t.Fatalf("PKIX: %v", err)
	}
	r := newRing(t, testConfig(), testHeader())
	k := plant(t, r, publicPart(record.RSA2048, public), der)
	more := []string{private.D.String(), private.Primes[0].String(), private.Primes[1].String(), fmt.Sprintf("%#v", private.D)}
	for _, b := range [][]byte{private.D.Bytes()[:64], private.Primes[0].Bytes()[:64], private.Primes[1].Bytes()[:64]} {
		more = append(more, spellings(b)...)
	}
	checkAll(t, r, k, more...)
}

func checkAll(t *testing.T, r *keyring.Ring, k *keyring.Key, more ...string) {
	t.Helper()
	s, err := k.NewSigner(record.Message)
	if err != nil {
		t.Fatalf("NewSigner: %v", err)
	}
	if _, err := s.Sign([]byte("payload")); err != nil {
		t.Fatalf("Sign: %v", err)
	}
	for name, v := range map[string]any{
		"*Ring": r, "Ring": *r, "*Key": k, "Key": *k, "*Signer": s, "Signer": *s,
		"outer":  outer{r, k, s, []keyring.Ring{*r}, map[string]keyring.Key{"k": *k}, *s},
		"*outer": &outer{ring: r, key: k, signer: s}, "[]any": []any{r, k, s, *r, *k, *s},
	} {
		checkSilent(t, name, v, more)
	}
}

func checkSilent(t *testing.T, name string, v any, more []string) {
	t.Helper()
	for _, flags := range []string{"", "+", "#", "-", " ", "0", "64.64"} {
		for _, verb := range "vsxXdqtbcoOUeEfFgGpTw" {
			f := "%" + flags + string(verb)
			silent(t, name+" under "+f, fmt.Sprintf(f, v), more...)
		}
	}
	var log, stream bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).InfoContext(t.Context(), "message", slog.Any("value", v))
	slog.New(slog.NewTextHandler(&log, nil)).InfoContext(t.Context(), "message", slog.Any("value", v))
	silent(t, name+" in slog", log.String(), more...)
	// An encoder may fail or write nothing; neither may show anything.
	for how, encode := range map[string]func() ([]byte, error){
		"JSON": func() ([]byte, error) { return json.Marshal(v) },
		"CBOR": func() ([]byte, error) { return cbor.Marshal(v) },
		"gob":  func() ([]byte, error) { err := gob.NewEncoder(&stream).Encode(v); return stream.Bytes(), err },
	} {
		out, err := encode()
		silent(t, name+" as "+how, string(out)+hex.EncodeToString(out), more...)
		silent(t, name+" as "+how+" error", fmt.Sprint(err), more...)
	}
}

func TestTheLeakTestSeesALeak(t *testing.T) {
	t.Parallel()
	leaks := struct{ b []byte }{[]byte(marker)}
	for _, f := range []string{"%v", "%+v", "%#v", "%s", "%x", "%X", "%d", "%q"} {
		out, found := fmt.Sprintf(f, leaks), false
		for _, s := range spellings([]byte(marker)) {
			found = found || strings.Contains(out, s)
		}
		if !found {
			t.Errorf("%s of a marker is not recognised", f)
		}
	}
}

func TestErrorsShowNoScalar(t *testing.T) {
	t.Parallel()
	r := newRing(t, testConfig(), testHeader())
	for _, a := range record.Algorithms() {
		p := sealed.Public{
			Version: 1, Keyring: "main", Fingerprint: r.Fingerprint(), Epoch: 2,
			KeyID: sealed.KeyID(a, []byte("not it")), Algorithm: a, PublicKey: []byte("not it"), Policy: "all",
		}
		entry, err := keyring.TestingOnlySeal(r, p, []byte(marker))
		if err != nil {
			t.Fatalf("seal: %v", err)
		}
		if err = r.Open(entry); err == nil {
			t.Errorf("%s: a wrong public key was accepted", a)
		}
		silent(t, "the error of Open", fmt.Sprintf("%v %+v %#v %s", err, err, err, err))
	}
}

func plant(tb testing.TB, r *keyring.Ring, p sealed.Public, private []byte) *keyring.Key {
	tb.Helper()
	entry, err := keyring.TestingOnlySeal(r, p, private)
	if err != nil {
		tb.Fatalf("seal: %v", err)
	}
	silent(tb, "the sealed entry", string(entry))
	if err := r.Open(entry); err != nil {
		tb.Fatalf("Open: %v", err)
	}
	k, err := r.Key(p.KeyID)
	if err != nil {
		tb.Fatalf("Key: %v", err)
	}
	return k
}
