package kms_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/keyhold/keyhold/enclave/internal/kms"
)

// vectorFile reads a file of shared/vectors, which lies beside the module, and
// skips the test where that folder is absent.
func vectorFile(tb testing.TB, elem ...string) []byte {
	tb.Helper()
	path := filepath.Join(append([]string{"..", "..", "..", "..", "shared", "vectors"}, elem...)...)
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		tb.Skipf("the public vectors are not beside the module: shared/vectors/%s", strings.Join(elem, "/"))
	}
	if err != nil {
		tb.Fatal(err)
	}
	return data
}

var recipientKey = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
})

// tlv encodes a value of definite length.
func tlv(tag byte, content ...[]byte) []byte {
	body := bytes.Join(content, nil)
	n := len(body)
	switch {
	case n < 0x80:
		return append([]byte{tag, byte(n)}, body...)
	case n < 0x100:
		return append([]byte{tag, 0x81, byte(n)}, body...)
	case n < 0x10000:
		return append([]byte{tag, 0x82, byte(n >> 8), byte(n)}, body...)
	default:
		return append([]byte{tag, 0x83, byte(n >> 16), byte(n >> 8), byte(n)}, body...)
	}
}

// indef encodes a value of indefinite length.
func indef(tag byte, content ...[]byte) []byte {
	body := bytes.Join(content, nil)
	return append(append([]byte{tag, 0x80}, body...), 0, 0)
}

func unhex(text string) []byte {
	b, err := hex.DecodeString(strings.ReplaceAll(text, " ", ""))
	if err != nil {
		panic(err)
	}
	return b
}

// parts are the pieces of an envelope; a test changes one and builds.
type parts struct {
	wrap                                   func(tag byte, content ...[]byte) []byte // indef or tlv
	contentType, version                   []byte
	before, recipients, after              []byte
	dataType, cipherAlgorithm, content     []byte
	recipientVersion, rid, keyAlg, wrapped []byte
	trailing                               []byte
}

var (
	sha256Alg = unhex("300d 0609 608648016503040201 0500")
	oaepAlg   = tlv(0x30, unhex("0609 2a864886f70d010107"),
		tlv(0x30, tlv(0xa0, sha256Alg), tlv(0xa1, tlv(0x30, unhex("0609 2a864886f70d010108"), sha256Alg))))
	aesOID = unhex("0609 60864801650304012a")
)

func encrypt(key, iv, padded []byte) []byte {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err)
	}
	out := make([]byte, len(padded))
	cipher.NewCBCEncrypter(block, iv).CryptBlocks(out, padded)
	return out
}

func pad(p []byte) []byte {
	n := aes.BlockSize - len(p)%aes.BlockSize
	return append(bytes.Clone(p), bytes.Repeat([]byte{byte(n)}, n)...)
}

var (
	contentKey = bytes.Repeat([]byte{0x42}, 32)
	contentIV  = bytes.Repeat([]byte{0x17}, 16)
	dataKey    = []byte("0123456789abcdef0123456789abcdef")
)

func keyID(pub *rsa.PublicKey) []byte {
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		panic(err)
	}
	sum := sha256.Sum256(spki)
	return sum[:]
}

func oaep(tb testing.TB, content []byte) []byte {
	tb.Helper()
	out, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, &recipientKey().PublicKey, content, nil)
	if err != nil {
		tb.Fatal(err)
	}
	return out
}

func goodParts(tb testing.TB) *parts {
	tb.Helper()
	return &parts{
		wrap:             indef,
		contentType:      unhex("0609 2a864886f70d010703"),
		version:          unhex("020102"),
		recipientVersion: unhex("020102"),
		rid:              tlv(0x80, keyID(&recipientKey().PublicKey)),
		keyAlg:           oaepAlg,
		wrapped:          tlv(0x04, oaep(tb, contentKey)),
		dataType:         unhex("0609 2a864886f70d010701"),
		cipherAlgorithm:  tlv(0x30, aesOID, tlv(0x04, contentIV)),
		content:          indef(0xa0, tlv(0x04, encrypt(contentKey, contentIV, pad(dataKey)))),
	}
}

func (p *parts) recipient() []byte {
	return tlv(0x30, p.recipientVersion, p.rid, p.keyAlg, p.wrapped)
}

func (p *parts) build() []byte {
	recipients := p.recipients
	if recipients == nil {
		recipients = tlv(0x31, p.recipient())
	}
	enveloped := p.wrap(0x30, p.version, p.before, recipients,
		p.wrap(0x30, p.dataType, p.cipherAlgorithm, p.content), p.after)
	return append(p.wrap(0x30, p.contentType, p.wrap(0xa0, enveloped)), p.trailing...)
}

func TestOpenReadsWhatAWSSends(t *testing.T) {
	block, _ := pem.Decode(vectorFile(t, "kms-recipient", "constructed-key.pem"))
	if block == nil {
		t.Fatal("the key file holds no PEM block")
	}
	key, err := parseKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	got, err := kms.OpenEnvelope(key, vectorFile(t, "kms-recipient", "constructed.ber"))
	if err != nil {
		t.Fatal(err)
	}
	if want := vectorFile(t, "kms-recipient", "constructed-plaintext.bin"); !bytes.Equal(got, want) { //nolint:forbidigo // a public vector
		t.Errorf("got %x, want %x", got, want)
	}
	if _, err := kms.OpenEnvelope(key, vectorFile(t, "kms-recipient", "parse-only.ber")); !errors.Is(err, kms.ErrEnvelope) {
		t.Errorf("an envelope for another key: %v", err)
	}
}

func parseKey(der []byte) (*rsa.PrivateKey, error) {
	if key, err := x509.ParsePKCS1PrivateKey(der); err == nil {
		return key, nil
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, err
	}
	rsaKey, ok := key.(*rsa.PrivateKey)
	if !ok {
		return nil, errors.New("not an RSA key")
	}
	return rsaKey, nil
}

func TestOpenAcceptsEveryPermittedEncoding(t *testing.T) {
	ciphertext := encrypt(contentKey, contentIV, pad(dataKey))
	bareHash := unhex("300b 0609 608648016503040201")
	tests := map[string]func(p *parts){
		"constructed content, indefinite": func(*parts) {},
		"primitive content":               func(p *parts) { p.content = tlv(0x80, ciphertext) },
		"content in three pieces": func(p *parts) {
			p.content = indef(0xa0, tlv(4, ciphertext[:1]), tlv(4, ciphertext[1:20]), tlv(4, ciphertext[20:]))
		},
		"an empty piece among them":          func(p *parts) { p.content = indef(0xa0, tlv(4, ciphertext), tlv(4)) },
		"constructed content, definite":      func(p *parts) { p.content = tlv(0xa0, tlv(4, ciphertext)) },
		"definite lengths everywhere":        func(p *parts) { p.wrap = tlv; p.content = tlv(0x80, ciphertext) },
		"recipients in an indefinite set":    func(p *parts) { p.recipients = indef(0x31, p.recipient()) },
		"hash without parameters (RFC 4055)": func(p *parts) { p.keyAlg = oaepAlgWith(bareHash, bareHash) },
		"mixed hash parameters (RFC 4055)":   func(p *parts) { p.keyAlg = oaepAlgWith(sha256Alg, bareHash) },
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			p := goodParts(t)
			change(p)
			got, err := kms.OpenEnvelope(recipientKey(), p.build())
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, dataKey) { //nolint:forbidigo // a key of this test
				t.Errorf("got %x", got)
			}
		})
	}
}

func oaepAlgWith(hash, mgfHash []byte) []byte {
	return tlv(0x30, unhex("0609 2a864886f70d010107"),
		tlv(0x30, tlv(0xa0, hash), tlv(0xa1, tlv(0x30, unhex("0609 2a864886f70d010108"), mgfHash))))
}

func TestOpenRefusesEverythingElse(t *testing.T) {
	ciphertext := encrypt(contentKey, contentIV, pad(dataKey))
	sha1Alg := unhex("3009 0605 2b0e03021a 0500")
	labelled := tlv(0x30, unhex("0609 2a864886f70d010107"), tlv(0x30, tlv(0xa0, sha256Alg),
		tlv(0xa1, tlv(0x30, unhex("0609 2a864886f70d010108"), sha256Alg)), tlv(0xa2, unhex("300d 0609 2a864886f70d010109 0400"))))
	other, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	padded := func(padding ...byte) []byte {
		return tlv(0x80, encrypt(contentKey, contentIV, append(bytes.Clone(dataKey), padding...)))
	}
	sixteen := func(b byte) []byte { return bytes.Repeat([]byte{b}, 16) }
	tests := map[string]func(p *parts){
		"signed data instead of enveloped":  func(p *parts) { p.contentType = unhex("0609 2a864886f70d010702") },
		"version 0":                         func(p *parts) { p.version = unhex("020100") },
		"version 2 in two bytes":            func(p *parts) { p.version = unhex("02020002") },
		"no version":                        func(p *parts) { p.version = nil },
		"originator info":                   func(p *parts) { p.before = tlv(0xa0) },
		"unprotected attributes":            func(p *parts) { p.after = tlv(0xa1) },
		"no recipient":                      func(p *parts) { p.recipients = tlv(0x31) },
		"two recipients":                    func(p *parts) { p.recipients = tlv(0x31, p.recipient(), p.recipient()) },
		"recipients in a sequence":          func(p *parts) { p.recipients = tlv(0x30, p.recipient()) },
		"key agreement recipient":           func(p *parts) { p.recipients = tlv(0x31, tlv(0xa1, p.recipientVersion, p.rid, p.keyAlg, p.wrapped)) },
		"recipient version 0":               func(p *parts) { p.recipientVersion = unhex("020100") },
		"recipient by issuer and serial":    func(p *parts) { p.rid = tlv(0x30, tlv(0x30), unhex("020101")) },
		"another recipient":                 func(p *parts) { p.rid = tlv(0x80, keyID(&other.PublicKey)) },
		"recipient id of 20 bytes":          func(p *parts) { p.rid = tlv(0x80, keyID(&recipientKey().PublicKey)[:20]) },
		"recipient id with a byte more":     func(p *parts) { p.rid = tlv(0x80, keyID(&recipientKey().PublicKey), []byte{0}) },
		"empty recipient id":                func(p *parts) { p.rid = tlv(0x80) },
		"constructed recipient id":          func(p *parts) { p.rid = tlv(0xa0, tlv(4, keyID(&recipientKey().PublicKey))) },
		"RSA PKCS#1 v1.5":                   func(p *parts) { p.keyAlg = unhex("300d 0609 2a864886f70d010101 0500") },
		"OAEP with default parameters":      func(p *parts) { p.keyAlg = tlv(0x30, unhex("0609 2a864886f70d010107"), tlv(0x30)) },
		"OAEP without parameters":           func(p *parts) { p.keyAlg = tlv(0x30, unhex("0609 2a864886f70d010107")) },
		"OAEP with SHA-1":                   func(p *parts) { p.keyAlg = oaepAlgWith(sha1Alg, sha256Alg) },
		"MGF1 with SHA-1":                   func(p *parts) { p.keyAlg = oaepAlgWith(sha256Alg, sha1Alg) },
		"hash parameters that are not NULL": func(p *parts) { p.keyAlg = oaepAlgWith(unhex("300e 0609 608648016503040201 020100"), sha256Alg) },
		"NULL with content":                 func(p *parts) { p.keyAlg = oaepAlgWith(unhex("300e 0609 608648016503040201 050100"), sha256Alg) },
		"two parameters of the hash":        func(p *parts) { p.keyAlg = oaepAlgWith(unhex("300f 0609 608648016503040201 0500 0500"), sha256Alg) },
		"a label":                           func(p *parts) { p.keyAlg = labelled },
		"another MGF": func(p *parts) {
			p.keyAlg = bytes.Replace(oaepAlg, unhex("2a864886f70d010108"), unhex("2a864886f70d010109"), 1)
		},
		"wrapped key too short":  func(p *parts) { p.wrapped = tlv(4, oaep(t, contentKey)[:255]) },
		"wrapped key not for us": func(p *parts) { p.wrapped = tlv(4, bytes.Repeat([]byte{1}, 256)) },
		"wrapped key empty":      func(p *parts) { p.wrapped = tlv(4) },
		"content key of 16 bytes": func(p *parts) {
			p.wrapped, p.content = tlv(4, oaep(t, contentKey[:16])), tlv(0x80, encrypt(contentKey[:16], contentIV, pad(dataKey)))
		},
		"content key of 24 bytes": func(p *parts) {
			p.wrapped, p.content = tlv(4, oaep(t, contentKey[:24])), tlv(0x80, encrypt(contentKey[:24], contentIV, pad(dataKey)))
		},
		"content key of 33 bytes":               func(p *parts) { p.wrapped = tlv(4, oaep(t, append(bytes.Clone(contentKey), 0))) },
		"recipient with a field more":           func(p *parts) { p.wrapped = append(p.wrapped, tlv(4)...) },
		"content of another type":               func(p *parts) { p.dataType = unhex("0609 2a864886f70d010702") },
		"AES-128-CBC":                           func(p *parts) { p.cipherAlgorithm = tlv(0x30, unhex("0609 608648016503040102"), tlv(4, contentIV)) },
		"AES-256-GCM":                           func(p *parts) { p.cipherAlgorithm = tlv(0x30, unhex("0609 60864801650304012e"), tlv(4, contentIV)) },
		"IV of 15 bytes":                        func(p *parts) { p.cipherAlgorithm = tlv(0x30, aesOID, tlv(4, contentIV[:15])) },
		"IV of 17 bytes":                        func(p *parts) { p.cipherAlgorithm = tlv(0x30, aesOID, tlv(4, contentIV, []byte{0})) },
		"no IV":                                 func(p *parts) { p.cipherAlgorithm = tlv(0x30, aesOID) },
		"two IVs":                               func(p *parts) { p.cipherAlgorithm = tlv(0x30, aesOID, tlv(4, contentIV), tlv(4, contentIV)) },
		"no content":                            func(p *parts) { p.content = nil },
		"empty content":                         func(p *parts) { p.content = tlv(0x80) },
		"constructed content without pieces":    func(p *parts) { p.content = indef(0xa0) },
		"content that is no whole block":        func(p *parts) { p.content = tlv(0x80, ciphertext[:47]) },
		"content in nested pieces":              func(p *parts) { p.content = indef(0xa0, indef(0x24, tlv(4, ciphertext))) },
		"primitive content of indefinite form":  func(p *parts) { p.content = indef(0x80, ciphertext) },
		"content twice":                         func(p *parts) { p.content = append(tlv(0x80, ciphertext), tlv(0x80, ciphertext)...) },
		"padding byte 0":                        func(p *parts) { p.content = padded(sixteen(0)...) },
		"padding byte 17":                       func(p *parts) { p.content = padded(sixteen(17)...) },
		"padding byte 255":                      func(p *parts) { p.content = padded(sixteen(255)...) },
		"first padding byte wrong":              func(p *parts) { b := sixteen(16); b[0] = 15; p.content = padded(b...) },
		"one padding byte wrong":                func(p *parts) { b := sixteen(16); b[9] = 1; p.content = padded(b...) },
		"trailing byte":                         func(p *parts) { p.trailing = []byte{0} },
		"trailing end of contents":              func(p *parts) { p.trailing = []byte{0, 0} },
		"a second envelope":                     func(p *parts) { p.trailing = p.build() },
		"100 KB of content":                     func(p *parts) { p.content = tlv(0x80, encrypt(contentKey, contentIV, pad(make([]byte, 100_000)))) },
		"100 KB after the end":                  func(p *parts) { p.trailing = make([]byte, 100_000) },
		"definite sequence with EOC inside":     func(p *parts) { p.after = []byte{0, 0}; p.wrap = tlv },
		"version behind a three-byte length":    func(p *parts) { p.version = unhex("02 83 000001 02") },
		"length in more bytes than needed":      func(p *parts) { p.version = unhex("02 81 01 02") },
		"two length bytes where one is enough":  func(p *parts) { p.version = unhex("02 82 00ff 02") },
		"length past the end":                   func(p *parts) { p.version = unhex("02 82 ffff 02") },
		"high tag number":                       func(p *parts) { p.version = unhex("1f 02 01 02") },
		"primitive value of indefinite length":  func(p *parts) { p.version = unhex("02 80 02 0000") },
		"set of indefinite length, not closed":  func(p *parts) { p.recipients = append([]byte{0x31, 0x80}, p.recipient()...) },
		"unknown field behind the content":      func(p *parts) { p.content = append(p.content, tlv(0x82)...) },
		"padding of the one that came before":   func(p *parts) { p.content = tlv(0x80, ciphertext[:32]) },
		"content key swapped for the recipient": func(p *parts) { p.wrapped = tlv(4, keyID(&other.PublicKey)) },
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			p := goodParts(t)
			change(p)
			got, err := kms.OpenEnvelope(recipientKey(), p.build())
			if got != nil || err != kms.ErrEnvelope { //nolint:errorlint // exactly this one, wrapping nothing
				t.Errorf("got %d bytes and error %v, want ErrEnvelope alone", len(got), err)
			}
		})
	}
}

func bothForms(tb testing.TB) [][]byte {
	tb.Helper()
	constructed, primitive := goodParts(tb), goodParts(tb)
	primitive.content = tlv(0x80, encrypt(contentKey, contentIV, pad(dataKey)))
	return [][]byte{constructed.build(), primitive.build()}
}

func TestEveryTruncationIsRefused(t *testing.T) {
	for _, raw := range bothForms(t) {
		for n := range raw {
			if got, err := kms.OpenEnvelope(recipientKey(), raw[:n]); got != nil || !errors.Is(err, kms.ErrEnvelope) {
				t.Fatalf("cut at %d of %d: %v", n, len(raw), err)
			}
		}
	}
}

// A flipped bit of IV or ciphertext can leave the padding whole, so some of
// these open to other bytes: CBC authenticates nothing, TLS does.
func TestNoFlippedByteOpensToTheKeyOrPanics(t *testing.T) {
	for _, raw := range bothForms(t) {
		for i := range raw {
			for _, mask := range []byte{0x01, 0x80, 0xff} {
				mutant := bytes.Clone(raw)
				mutant[i] ^= mask
				got, err := kms.OpenEnvelope(recipientKey(), mutant)
				if err != nil && !errors.Is(err, kms.ErrEnvelope) {
					t.Fatalf("byte %d ^ %#x: %v", i, mask, err)
				}
				if bytes.Equal(got, dataKey) { //nolint:forbidigo // a key of this test
					t.Fatalf("byte %d ^ %#x opens as if nothing had happened", i, mask)
				}
			}
		}
	}
}

func TestAnEnvelopeOfTheLargestSizeOpens(t *testing.T) {
	p := goodParts(t)
	plaintext := make([]byte, kms.TestingOnlyMaxEnvelope)
	for {
		p.content = tlv(0x80, encrypt(contentKey, contentIV, pad(plaintext)))
		if len(p.build()) <= kms.TestingOnlyMaxEnvelope {
			break
		}
		plaintext = plaintext[:len(plaintext)-1]
	}
	if got, err := kms.OpenEnvelope(recipientKey(), p.build()); err != nil || len(got) != len(plaintext) {
		t.Errorf("got %d bytes and %v, want %d", len(got), err, len(plaintext))
	}
	p.content = tlv(0x80, encrypt(contentKey, contentIV, pad(make([]byte, len(plaintext)+aes.BlockSize))))
	if _, err := kms.OpenEnvelope(recipientKey(), p.build()); !errors.Is(err, kms.ErrEnvelope) {
		t.Errorf("longer than the limit: %v", err)
	}
}

func FuzzOpen(f *testing.F) {
	for _, raw := range bothForms(f) {
		f.Add(raw)
	}
	f.Add(bytes.Repeat([]byte{0x30, 0x80}, 2000))
	f.Fuzz(func(t *testing.T, raw []byte) {
		before := bytes.Clone(raw)
		got, err := kms.OpenEnvelope(recipientKey(), raw)
		if err != nil && (got != nil || !errors.Is(err, kms.ErrEnvelope)) {
			t.Errorf("got %d bytes and %v", len(got), err)
		}
		if err == nil && len(got) >= len(raw) {
			t.Error("more came out than went in")
		}
		if !bytes.Equal(before, raw) { //nolint:forbidigo // input of the fuzzer
			t.Error("the input was changed")
		}
	})
}

type wycheproof[G any] struct {
	TestGroups []G `json:"testGroups"`
}

type wycheproofCase struct {
	TcID                    int
	Comment, Result         string
	Key, IV, Msg, Ct, Label string
}

func TestWycheproofOAEP(t *testing.T) {
	type group struct {
		PrivateKeyPkcs8 string `json:"privateKeyPkcs8"`
		Tests           []wycheproofCase
	}
	var file wycheproof[group]
	if err := json.Unmarshal(vectorFile(t, "wycheproof", "rsa_oaep_2048_sha256_mgf1sha256_test.json"), &file); err != nil {
		t.Fatal(err)
	}
	ran := 0
	for _, g := range file.TestGroups {
		key, err := parseKey(unhex(g.PrivateKeyPkcs8))
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range g.Tests {
			if c.Label != "" {
				c.Result = "invalid" // we use no label, so a labelled ciphertext must not open
			}
			checkWycheproof(t, c, func() ([]byte, error) { return kms.TestingOnlyUnwrapKey(key, unhex(c.Ct)) })
			ran++
		}
	}
	t.Logf("%d vectors", ran)
}

func TestWycheproofCBC(t *testing.T) {
	type group struct {
		KeySize int `json:"keySize"`
		Tests   []wycheproofCase
	}
	var file wycheproof[group]
	if err := json.Unmarshal(vectorFile(t, "wycheproof", "aes_cbc_pkcs5_test.json"), &file); err != nil {
		t.Fatal(err)
	}
	ran := 0
	for _, g := range file.TestGroups {
		for _, c := range g.Tests { // also keys of 128 and 192 bits: the padding is the same
			checkWycheproof(t, c, func() ([]byte, error) {
				return kms.TestingOnlyDecryptCBC(unhex(c.Key), unhex(c.IV), unhex(c.Ct))
			})
			ran++
		}
	}
	t.Logf("%d vectors", ran)
}

func checkWycheproof(t *testing.T, c wycheproofCase, open func() ([]byte, error)) {
	t.Helper()
	got, err := open()
	switch {
	case c.Result == "valid" && (err != nil || hex.EncodeToString(got) != c.Msg):
		t.Errorf("case %d (%s): got %x and %v, want %s", c.TcID, c.Comment, got, err, c.Msg)
	case c.Result == "invalid" && !errors.Is(err, kms.ErrEnvelope):
		t.Errorf("case %d (%s): opened, want ErrEnvelope", c.TcID, c.Comment)
	case c.Result == "acceptable" && err == nil && hex.EncodeToString(got) != c.Msg:
		t.Errorf("case %d (%s): got %x, want %s or an error", c.TcID, c.Comment, got, c.Msg)
	}
}
