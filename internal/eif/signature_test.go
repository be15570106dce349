package eif_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/eif"
)

// signer makes a key and its own certificate, in PEM.
func signer(t testing.TB, curve elliptic.Curve) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "image signer", Organization: []string{"Example"}},
		NotBefore: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), NotAfter: time.Date(2036, 1, 2, 3, 4, 5, 0, time.UTC),
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func signed(t testing.TB) eif.Image {
	t.Helper()
	key, cert := signer(t, elliptic.P384())
	m := sample()
	if err := m.Sign(key, cert); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestASignedImageMeasuresItsCertificateInPCR8(t *testing.T) {
	key, cert := signer(t, elliptic.P384())
	m := sample()
	plain, err := m.Measure()
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Sign(key, cert); err != nil {
		t.Fatal(err)
	}
	got, err := m.Measure()
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(cert)
	digest := sha512.Sum384(block.Bytes)
	pcr8 := sha512.Sum384(append(make([]byte, 48), digest[:]...))
	want := plain
	want.PCR8 = hex.EncodeToString(pcr8[:])
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestTheSameImageSignedAgainIsTheSameFile(t *testing.T) {
	key, cert := signer(t, elliptic.P384())
	a, b := sample(), sample()
	if err := errors.Join(a.Sign(key, cert), b.Sign(key, cert)); err != nil {
		t.Fatal(err)
	}
	if string(encode(t, a)) != string(encode(t, b)) {
		t.Error("two signatures differ")
	}
}

// What AWS's reader deserializes: a list of maps whose values are lists of
// numbers, since Rust's Vec<u8> becomes one, and within it an untagged COSE_Sign1
// whose payload is {register_index, register_value}. QEMU reads it in the same way.
func TestTheSectionIsEncodedAsAWSDoes(t *testing.T) {
	m := signed(t)
	head := append([]byte{0x81, 0xa2, 0x73}, "signing_certificate"...)
	if !bytes.HasPrefix(m.Signature, append(head, 0x99)) { // an array whose length takes two bytes
		t.Errorf("the section begins with %x", m.Signature[:40])
	}
	var list []map[string][]int
	if err := cbor.Unmarshal(m.Signature, &list); err != nil {
		t.Fatal(err)
	}
	raw := make([]byte, len(list[0]["signature"]))
	for i, v := range list[0]["signature"] {
		raw[i] = byte(v)
	}
	var message []cbor.RawMessage
	if err := cbor.Unmarshal(raw, &message); err != nil || len(message) != 4 {
		t.Fatalf("%d parts, %v", len(message), err)
	}
	if got := hex.EncodeToString(message[0]) + " " + hex.EncodeToString(message[1]); got != "44a1013822 a0" {
		t.Errorf("headers %s, want ES384 and none", got)
	}
	var payload []byte
	if err := cbor.Unmarshal(message[2], &payload); err != nil {
		t.Fatal(err)
	}
	want := append(append([]byte{0xa2, 0x6e}, "register_index"...), 0x00, 0x6e)
	want = append(append(want, "register_value"...), 0x98, 48)
	if !bytes.HasPrefix(payload, want) {
		t.Errorf("the payload begins with %q, want %q", payload[:len(want)], want)
	}
}

func TestASignatureOfAnotherImageIsRefused(t *testing.T) {
	for name, edit := range map[string]func(*eif.Image){
		"kernel":         func(m *eif.Image) { m.Kernel = []byte("another kernel") },
		"command line":   func(m *eif.Image) { m.Cmdline += " quiet" },
		"second ramdisk": func(m *eif.Image) { m.Ramdisks[1] = []byte("another init") },
	} {
		t.Run(name, func(t *testing.T) {
			m := signed(t)
			edit(&m)
			if _, err := m.Measure(); !errors.Is(err, eif.WrongSignature) {
				t.Errorf("%v, want %v", err, eif.WrongSignature)
			}
		})
	}
	t.Run("another certificate", func(t *testing.T) {
		m := signed(t)
		key, _ := signer(t, elliptic.P384())
		_, cert := signer(t, elliptic.P384())
		if err := m.Sign(key, cert); !errors.Is(err, eif.WrongSignature) {
			t.Errorf("%v, want %v", err, eif.WrongSignature)
		}
	})
}

func TestMetadataMayChangeUnderASignature(t *testing.T) {
	m := signed(t)
	m.Metadata = []byte(`{"ImageName":"renamed"}`)
	if _, err := m.Measure(); err != nil {
		t.Error(err)
	}
}

func TestNoChangeOfASignatureSectionGoesUnmeasured(t *testing.T) {
	m := signed(t)
	good := m.Signature
	before, err := m.Measure()
	if err != nil {
		t.Fatal(err)
	}
	for i := range good {
		m.Signature = bytes.Clone(good)
		m.Signature[i] ^= 1
		after, err := m.Measure()
		if err == nil {
			// Another certificate of the same key: it is another one to whoever compares PCR8.
			if after.PCR8 == before.PCR8 {
				t.Errorf("byte %d: taken, the registers stay", i)
			}
		} else if !hasCode(err) {
			t.Errorf("byte %d: %v has no code", i, err)
		}
	}
	for n := range good {
		m.Signature = good[:n:n]
		if _, err := m.Measure(); err == nil {
			t.Errorf("cut after %d bytes: taken", n)
		}
	}
	m.Signature = append(bytes.Clone(good), 0)
	if _, err := m.Measure(); !errors.Is(err, eif.BadSignature) {
		t.Errorf("a byte more: %v", err)
	}
}

func TestOnlyACertificateOfAP384KeySigns(t *testing.T) {
	key, good := signer(t, elliptic.P384())
	small, p256 := signer(t, elliptic.P256())
	block, _ := pem.Decode(good)
	for _, tc := range []struct {
		name string
		key  *ecdsa.PrivateKey
		cert []byte
	}{
		{"P-256", small, p256},
		{"nothing", key, nil},
		{"DER", key, block.Bytes},
		{"two certificates", key, append(bytes.Clone(good), p256...)},
		{"text before", key, append([]byte("hidden\n"), good...)},
		{"text behind", key, append(bytes.Clone(good), "hidden"...)},
		{"another block", key, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: block.Bytes})},
		{"other line ends", key, bytes.ReplaceAll(good, []byte("\n"), []byte("\r\n"))},
		{"headers", key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Headers: map[string]string{"a": "b"}, Bytes: block.Bytes})},
		{"damaged", key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: block.Bytes[1:]})},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := sample()
			if err := m.Sign(tc.key, tc.cert); !errors.Is(err, eif.BadCertificate) {
				t.Errorf("%v, want %v", err, eif.BadCertificate)
			}
		})
	}
}

func metadata(t testing.TB) []byte {
	t.Helper()
	b, err := eif.Info{
		ImageName: "keyhold", ImageVersion: "1",
		BuildMetadata: eif.BuildInfo{
			BuildTime: "1970-01-01T00:00:00Z", BuildTool: "keyhold", BuildToolVersion: "1", OperatingSystem: "Linux", KernelVersion: "6.12",
		},
		DockerInfo: json.RawMessage("null"), CustomMetadata: json.RawMessage(`{"Keyhold":{"a":"b"}}`),
	}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The names and their order are those of nitro-cli's json_output.rs.
func TestADescriptionHasTheFormOfNitroCLI(t *testing.T) {
	m := sample()
	m.Metadata = metadata(t)
	d, err := m.Describe()
	if err != nil {
		t.Fatal(err)
	}
	got, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	want := `{
  "EifVersion": 4,
  "Measurements": {
    "HashAlgorithm": "Sha384 { ... }",
    "PCR0": "` + d.Measurements.PCR0 + `",
    "PCR1": "` + d.Measurements.PCR1 + `",
    "PCR2": "` + d.Measurements.PCR2 + `"
  },
  "IsSigned": false,
  "CheckCRC": true,
  "ImageName": "keyhold",
  "ImageVersion": "1",
  "Metadata": {
    "BuildTime": "1970-01-01T00:00:00Z",
    "BuildTool": "keyhold",
    "BuildToolVersion": "1",
    "OperatingSystem": "Linux",
    "KernelVersion": "6.12",
    "DockerInfo": null,
    "Keyhold": {
      "a": "b"
    }
  }
}`
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestADescriptionOfASignedImageNamesItsSigner(t *testing.T) {
	m := signed(t)
	m.Metadata = metadata(t)
	d, err := m.Describe()
	if err != nil {
		t.Fatal(err)
	}
	c := d.SigningCertificate
	if !d.IsSigned || d.SignatureCheck == nil || !*d.SignatureCheck || c == nil {
		t.Fatalf("%+v does not say that it is signed", d)
	}
	got := []string{c.IssuerName["commonName"], c.IssuerName["organizationName"], c.Algorithm, c.NotBefore, c.NotAfter}
	want := []string{"image signer", "Example", "ecdsa-with-SHA384", "Jan  2 03:04:05 2026 GMT", "Jan  2 03:04:05 2036 GMT"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if !strings.HasPrefix(c.Signature, "30:") {
		t.Errorf("signature %s", c.Signature)
	}
}

func TestMetadataThatNitroCLICouldNotReadAreNotDescribed(t *testing.T) {
	for _, text := range []string{
		"x", "[]", "{}", `{"ImageName":"n","ImageVersion":"v","BuildMetadata":{"BuildTime":"t"}}`,
		`{"BuildMetadata":{"BuildTime":1}}`,
	} {
		m := sample()
		m.Metadata = []byte(text)
		if _, err := m.Describe(); !errors.Is(err, eif.BadMetadata) {
			t.Errorf("%s: %v, want %v", text, err, eif.BadMetadata)
		}
	}
}

func FuzzVerifySignature(f *testing.F) {
	m := signed(f)
	measured, err := sample().Measure()
	if err != nil {
		f.Fatal(err)
	}
	var pcr0 eif.PCR
	if _, err := hex.Decode(pcr0[:], []byte(measured.PCR0)); err != nil {
		f.Fatal(err)
	}
	f.Add(m.Signature)
	f.Fuzz(func(t *testing.T, b []byte) {
		cert, err := eif.VerifySignature(b, pcr0)
		if err != nil && !hasCode(err) {
			t.Fatalf("%v has no code", err)
		}
		if (cert == nil) != (err != nil) {
			t.Fatalf("certificate %v, error %v", cert != nil, err)
		}
	})
}
