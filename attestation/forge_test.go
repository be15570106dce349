package attestation_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"slices"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/keyhold/keyhold/attestation"
)

// forger writes documents of any form, so that each check can be violated on
// its own while everything else is right.
type forger struct {
	t                    testing.TB
	now                  time.Time
	root, regional, zone entity
	leaf                 entity
}

type entity struct {
	cert *x509.Certificate
	key  crypto.Signer
}

const (
	forgedModule = "i-0123456789abcdef0-enc0123456789abcdef"
	forgedName   = forgedModule + ".test-1.test"
	forgedNonce  = "0123456789abcdef0123456789abcdef"
)

var protectedES384 = []byte{0xa1, 0x01, 0x38, 0x22}

func newForger(t testing.TB) *forger {
	t.Helper()
	f := &forger{t: t, now: time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)}
	f.root = f.certify(nil, "root", asCA(-1))
	f.regional = f.certify(&f.root, "regional", asCA(1))
	f.zone = f.certify(&f.regional, "zone", asCA(0))
	f.leaf = f.certify(&f.zone, forgedName, asLeaf)
	return f
}

// asCA makes a template a CA that permits pathLen intermediates, -1 any.
func asCA(pathLen int) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.IsCA, c.MaxPathLen, c.MaxPathLenZero = true, pathLen, pathLen == 0
		c.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	}
}

func asLeaf(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }

func (f *forger) newKey(curve elliptic.Curve) crypto.Signer {
	f.t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		f.t.Fatal(err)
	}
	return key
}

func (f *forger) certify(parent *entity, name string, edits ...func(*x509.Certificate)) entity {
	f.t.Helper()
	return f.certifyKey(parent, name, f.newKey(elliptic.P384()), edits...)
}

func (f *forger) certifyKey(parent *entity, name string, key crypto.Signer, edits ...func(*x509.Certificate)) entity {
	f.t.Helper()
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             f.now.Add(-time.Hour),
		NotAfter:              f.now.Add(2 * time.Hour),
		BasicConstraintsValid: true,
	}
	for _, edit := range edits {
		edit(template)
	}
	signer := entity{template, key}
	if parent != nil {
		signer = *parent
	}
	if k, ok := signer.key.(*ecdsa.PrivateKey); ok && k.Curve == elliptic.P384() && template.SignatureAlgorithm == 0 {
		template.SignatureAlgorithm = x509.ECDSAWithSHA384
	}
	der, err := x509.CreateCertificate(rand.Reader, template, signer.cert, key.Public(), signer.key)
	if err != nil {
		f.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		f.t.Fatal(err)
	}
	return entity{cert, key}
}

func (f *forger) rsaKey() crypto.Signer {
	f.t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		f.t.Fatal(err)
	}
	return key
}

// field is one pair of the payload map; both sides are encoded as they are.
type field struct {
	name  any
	value any
}

// fields returns a right payload in AWS's order.
func (f *forger) fields() []field {
	return []field{
		{"module_id", forgedModule},
		{"digest", "SHA384"},
		{"timestamp", uint64(f.now.UnixMilli())},
		{"pcrs", registers(16, 48, 7)},
		{"certificate", f.leaf.cert.Raw},
		{"cabundle", [][]byte{f.root.cert.Raw, f.regional.cert.Raw, f.zone.cert.Raw}},
		{"public_key", []byte("public key")},
		{"user_data", nil},
		{"nonce", []byte(forgedNonce)},
	}
}

// with returns the right payload with one value replaced, or with a new field.
func (f *forger) with(name string, value any) []field {
	out := f.fields()
	for i := range out {
		if out[i].name == name {
			out[i].value = value
			return out
		}
	}
	return append(out, field{name, value})
}

func (f *forger) without(name string) []field {
	return slices.DeleteFunc(f.fields(), func(x field) bool { return x.name == name })
}

// registers returns n of them, all of the same bytes.
func registers(n, size int, fill byte) map[uint64][]byte {
	out := make(map[uint64][]byte, n)
	for i := range n {
		out[uint64(i)] = bytes.Repeat([]byte{fill}, size)
	}
	return out
}

func edited(regs map[uint64][]byte, index uint64, value []byte) map[uint64][]byte {
	regs[index] = value
	return regs
}

func (f *forger) encode(v any) []byte {
	f.t.Helper()
	out, err := cbor.Marshal(v)
	if err != nil {
		f.t.Fatal(err)
	}
	return out
}

// pairs encodes a map as it stands, duplicate keys and order included.
func (f *forger) pairs(fields []field) []byte {
	f.t.Helper()
	head := f.encode(uint64(len(fields)))
	head[0] |= 5 << 5
	for _, x := range fields {
		head = append(append(head, f.encode(x.name)...), f.encode(x.value)...)
	}
	return head
}

func (f *forger) indefinitePairs(fields []field) []byte {
	f.t.Helper()
	out := []byte{0xbf}
	for _, x := range fields {
		out = append(append(out, f.encode(x.name)...), f.encode(x.value)...)
	}
	return append(out, 0xff)
}

// sign makes an ES384-like signature of the leaf's key over any header.
func (f *forger) sign(protected, payload []byte) []byte {
	f.t.Helper()
	digest := sha512.Sum384(f.encode([]any{"Signature1", protected, []byte{}, payload}))
	key, ok := f.leaf.key.(*ecdsa.PrivateKey)
	if !ok {
		return make([]byte, 96)
	}
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		f.t.Fatal(err)
	}
	size := max(48, (key.Curve.Params().BitSize+7)/8)
	out := make([]byte, 2*size)
	r.FillBytes(out[:size])
	s.FillBytes(out[size:])
	return out
}

// cose joins already encoded parts into the array of four.
func cose(parts ...[]byte) []byte {
	return append([]byte{0x80 | byte(len(parts))}, bytes.Join(parts, nil)...)
}

// signed is a right envelope around any payload bytes.
func (f *forger) signed(payload []byte) []byte {
	f.t.Helper()
	return f.signedUnder(protectedES384, payload)
}

func (f *forger) signedUnder(protected, payload []byte) []byte {
	f.t.Helper()
	return cose(f.encode(protected), []byte{0xa0}, f.encode(payload), f.encode(f.sign(protected, payload)))
}

func (f *forger) document(fields []field) []byte {
	f.t.Helper()
	return f.signed(f.pairs(fields))
}

// from returns a right document of another chain below the same root.
func (f *forger) from(leaf entity, bundle ...entity) []byte {
	f.t.Helper()
	g := *f
	g.leaf = leaf
	ders := [][]byte{f.root.cert.Raw}
	for _, e := range bundle {
		ders = append(ders, e.cert.Raw)
	}
	return g.document(g.with("cabundle", ders))
}

// otherHalf returns (r, n-s), as valid an ECDSA signature as (r, s).
func (f *forger) otherHalf(signature []byte) []byte {
	out := bytes.Clone(signature)
	n := elliptic.P384().Params().N
	s := new(big.Int).SetBytes(out[48:])
	s.Sub(n, s).FillBytes(out[48:])
	return out
}

func (f *forger) trusted() attestation.Root { return attestation.TestRoot(f.root.cert) }

// images wants the registers that fields returns.
func (f *forger) images() []attestation.Image {
	return []attestation.Image{{PCRs: map[int][]byte{0: bytes.Repeat([]byte{7}, 48)}}}
}

func (f *forger) live() attestation.LivePolicy {
	return attestation.LivePolicy{Root: f.trusted(), Images: f.images(), Nonce: []byte(forgedNonce), Now: f.now}
}

func (f *forger) recorded() attestation.RecordedPolicy {
	return attestation.RecordedPolicy{Root: f.trusted(), Images: f.images()}
}
