package keyring_test

import (
	"bytes"
	"encoding/base64"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
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

func silent(tb testing.TB, how, out string) {
	tb.Helper()
	dek := bytes.Repeat([]byte{0x42}, 32)
	for _, s := range append(spellings([]byte(marker)), spellings(dek)...) {
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
			k := plantMarker(t, r, a)
			s, err := k.NewSigner(record.Message)
			if err != nil {
				t.Fatalf("NewSigner: %v", err)
			}
			if _, err := s.Sign([]byte("payload")); err != nil {
				t.Fatalf("Sign: %v", err)
			}
			values := map[string]any{
				"*Ring": r, "Ring": *r, "*Key": k, "Key": *k, "*Signer": s, "Signer": *s,
				"outer":  outer{r, k, s, []keyring.Ring{*r}, map[string]keyring.Key{"k": *k}, *s},
				"*outer": &outer{ring: r, key: k, signer: s}, "[]any": []any{r, k, s, *r, *k, *s},
			}
			for name, v := range values {
				checkSilent(t, name, v)
			}
		})
	}
}

func checkSilent(t *testing.T, name string, v any) {
	t.Helper()
	for _, flags := range []string{"", "+", "#", "-", " ", "0", "64.64"} {
		for _, verb := range "vsxXdqtbcoOUeEfFgGpTw" {
			f := "%" + flags + string(verb)
			silent(t, name+" under "+f, fmt.Sprintf(f, v))
		}
	}
	var log, stream bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).InfoContext(t.Context(), "message", slog.Any("value", v))
	slog.New(slog.NewTextHandler(&log, nil)).InfoContext(t.Context(), "message", slog.Any("value", v))
	silent(t, name+" in slog", log.String())
	// An encoder may fail or write nothing; neither may show anything.
	for how, encode := range map[string]func() ([]byte, error){
		"JSON": func() ([]byte, error) { return json.Marshal(v) },
		"CBOR": func() ([]byte, error) { return cbor.Marshal(v) },
		"gob":  func() ([]byte, error) { err := gob.NewEncoder(&stream).Encode(v); return stream.Bytes(), err },
	} {
		out, err := encode()
		silent(t, name+" as "+how, string(out)+hex.EncodeToString(out))
		silent(t, name+" as "+how+" error", fmt.Sprint(err))
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

func plantMarker(tb testing.TB, r *keyring.Ring, a record.Algorithm) *keyring.Key {
	tb.Helper()
	p := publicFor(tb, a, []byte(marker))
	entry, err := keyring.TestingOnlySeal(r, p, []byte(marker))
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
