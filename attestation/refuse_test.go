package attestation_test

import (
	"bytes"
	"crypto/elliptic"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/keyhold/keyhold/attestation"
)

// refused is a document that differs from a right one in one thing.
type refused struct {
	name string
	raw  []byte
	want *attestation.Error
}

func TestEveryMalformedDocumentIsRefusedWithItsOwnCode(t *testing.T) {
	f := newForger(t)
	if _, err := attestation.VerifyLive(f.document(f.fields()), f.live()); err != nil {
		t.Fatalf("the document that all others are made of: %v", err)
	}
	var all []refused
	for _, part := range []func(*forger) []refused{
		malformedEnvelopes, malformedCBOR, malformedFields, malformedRegisters,
		malformedBundles, wrongChains, wrongLeaves, wrongKeys, wrongSignatures,
	} {
		all = append(all, part(f)...)
	}
	if len(all) < 50 {
		t.Errorf("%d variants, want at least 50", len(all))
	}
	for _, tc := range all {
		t.Run(tc.name, func(t *testing.T) {
			live, err := attestation.VerifyLive(tc.raw, f.live())
			check(t, "VerifyLive", err, tc.want)
			if _, err := live.Document(); !errors.Is(err, attestation.ErrUnverified) {
				t.Errorf("the result of a refused document: %v", err)
			}
			_, err = attestation.VerifyRecorded(tc.raw, f.recorded())
			check(t, "VerifyRecorded", err, tc.want)
		})
	}
}

func check(t *testing.T, what string, err error, want *attestation.Error) {
	t.Helper()
	if !errors.Is(err, want) || attestation.Code(err) != want.Code {
		t.Errorf("%s: code %q (%v), want %q", what, attestation.Code(err), err, want.Code)
	}
}

func malformedEnvelopes(f *forger) []refused {
	good := f.document(f.fields())
	payload := f.pairs(f.fields())
	signature := f.encode(f.sign(protectedES384, payload))
	protected, empty, body := f.encode(protectedES384), []byte{0xa0}, f.encode(payload)
	ints := func(b []byte) []byte { // the same bytes as a CBOR array of integers
		out := make([]uint, len(b))
		for i, v := range b {
			out[i] = uint(v)
		}
		return f.encode(out)
	}
	five := cose(protected, empty, body, signature, []byte{0xf6})
	withAlg := func(header ...byte) []byte { return f.signedUnder(header, payload) }
	return []refused{
		{"nothing", nil, attestation.ErrSize},
		{"16 KiB and a byte", append(bytes.Clone(good), make([]byte, 16<<10+1-len(good))...), attestation.ErrSize},
		{"a bare tag", []byte{0xd2}, attestation.ErrCOSE},
		{"null", []byte{0xf6}, attestation.ErrCOSE},
		{"an empty array", []byte{0x80}, attestation.ErrCOSE},
		{"an array of five", five, attestation.ErrCOSE},
		{"an array of three", cose(protected, empty, body), attestation.ErrCOSE},
		{"a map", f.encode(map[int][]byte{0: good}), attestation.ErrCOSE},
		{"a trailing byte", append(bytes.Clone(good), 0), attestation.ErrCOSE},
		{"the last byte missing", good[:len(good)-1], attestation.ErrCOSE},
		{"tag 17, a MAC", append([]byte{0xd1}, good...), attestation.ErrCOSE},
		{"tag 18 twice", append([]byte{0xd2, 0xd2}, good...), attestation.ErrCOSE},
		{"tag 18 in two bytes", append([]byte{0xd8, 0x12}, good...), attestation.ErrCOSE},
		{"nested 10,000 deep", bytes.Repeat([]byte{0x81}, 10000), attestation.ErrCOSE},
		{"a length of 2^63", []byte{0x84, 0x5b, 0x80, 0, 0, 0, 0, 0, 0, 0}, attestation.ErrCOSE},
		{"a header as text", cose(f.encode(string([]byte{0x61})), empty, body, signature), attestation.ErrCOSE},
		{"a header as array of integers", cose(ints(protectedES384), empty, body, signature), attestation.ErrCOSE},
		{"a tagged payload", cose(protected, empty, append([]byte{0xc2}, body...), signature), attestation.ErrCOSE},
		{"no header", cose([]byte{0xf6}, empty, body, signature), attestation.ErrProtected},
		{"algorithm ES256", withAlg(0xa1, 0x01, 0x26), attestation.ErrProtected},
		{"algorithm as text", withAlg(append([]byte{0xa1, 0x01, 0x65}, "ES384"...)...), attestation.ErrProtected},
		{"algorithm twice", withAlg(0xa2, 0x01, 0x38, 0x22, 0x01, 0x26), attestation.ErrProtected},
		{"a critical header", withAlg(0xa2, 0x01, 0x38, 0x22, 0x02, 0x81, 0x18, 0x63), attestation.ErrProtected},
		{"a longer form of the header", withAlg(0xa1, 0x18, 0x01, 0x38, 0x22), attestation.ErrProtected},
		{"a trailing byte in the header", withAlg(0xa1, 0x01, 0x38, 0x22, 0x00), attestation.ErrProtected},
		{"an unprotected header", cose(protected, []byte{0xa1, 0x04, 0x41, 0x31}, body, signature), attestation.ErrUnprotected},
		{"an unprotected header that is no map", cose(protected, []byte{0x05}, body, signature), attestation.ErrUnprotected},
		{"an unprotected header of indefinite length", cose(protected, []byte{0xbf, 0xff}, body, signature), attestation.ErrUnprotected},
		{"no signature", cose(protected, empty, body, []byte{0xf6}), attestation.ErrSignatureSize},
		{"a signature of 95 bytes", cose(protected, empty, body, f.encode(make([]byte, 95))), attestation.ErrSignatureSize},
		{"a DER signature", cose(protected, empty, body, f.encode(make([]byte, 103))), attestation.ErrSignatureSize},
	}
}

func malformedCBOR(f *forger) []refused {
	dup := append(f.fields(), field{"nonce", []byte("another nonce of many bytes here")})
	unknownTwice := append(f.fields(), field{"extra", 1}, field{"extra", 2})
	pcr0Twice := []byte{0xb1}
	for i := range 17 {
		pcr0Twice = append(pcr0Twice, byte(i%16))
		pcr0Twice = append(pcr0Twice, f.encode(bytes.Repeat([]byte{byte(i)}, 48))...)
	}
	deep := cbor.RawMessage{0x81, 0x81, 0x81, 0x81, 0x00}
	many := f.fields()
	for i := range 60 {
		many = append(many, field{i, i})
	}
	tagged := cbor.RawMessage(append([]byte{0xc0}, f.encode("SHA384")...))
	return []refused{
		{"no payload", cose(f.encode(protectedES384), []byte{0xa0}, []byte{0xf6}, f.encode(f.sign(protectedES384, nil))), attestation.ErrPayload},
		{"an empty payload", f.signed([]byte{}), attestation.ErrPayload},
		{"a null payload", f.signed([]byte{0xf6}), attestation.ErrPayload},
		{"an array as payload", f.signed([]byte{0x80}), attestation.ErrPayload},
		{"a trailing byte in the payload", f.signed(append(f.pairs(f.fields()), 0)), attestation.ErrPayload},
		{"a cut payload", f.signed(f.pairs(f.fields())[:500]), attestation.ErrPayload},
		{"the nonce twice", f.document(dup), attestation.ErrPayload},
		{"an unknown field twice", f.document(unknownTwice), attestation.ErrPayload},
		{"PCR0 twice", f.document(f.with("pcrs", cbor.RawMessage(pcr0Twice))), attestation.ErrPayload},
		{"too deep an unknown field", f.document(f.with("extra", deep)), attestation.ErrPayload},
		{"too many fields", f.document(many), attestation.ErrPayload},
		{"a tagged field", f.document(f.with("digest", tagged)), attestation.ErrPayload},
		{"an invalid UTF-8 text", f.document(f.with("digest", cbor.RawMessage{0x62, 0xff, 0xfe})), attestation.ErrPayload},
		{"undefined as nonce", f.document(f.with("nonce", cbor.RawMessage{0xf7})), attestation.ErrPayload},
	}
}

func malformedFields(f *forger) []refused {
	long := make([]byte, 1025)
	out := []refused{
		{"module_id as bytes", f.document(f.with("module_id", []byte(forgedModule))), attestation.ErrPayload},
		{"an empty module_id", f.document(f.with("module_id", "")), attestation.ErrModuleID},
		{"a module_id with a dot", f.document(f.with("module_id", forgedModule+".test-1")), attestation.ErrModuleID},
		{"a module_id with a zero byte", f.document(f.with("module_id", "i-\x00../../etc")), attestation.ErrModuleID},
		{"a module_id of 129 bytes", f.document(f.with("module_id", string(bytes.Repeat([]byte{'a'}, 129)))), attestation.ErrModuleID},
		{"digest SHA256", f.document(f.with("digest", "SHA256")), attestation.ErrDigest},
		{"digest in small letters", f.document(f.with("digest", "sha384")), attestation.ErrDigest},
		{"timestamp 0", f.document(f.with("timestamp", uint64(0))), attestation.ErrTimestamp},
		{"a timestamp after the year 9999", f.document(f.with("timestamp", int64(253402300800000))), attestation.ErrTimestamp},
		{"timestamp 2^63", f.document(f.with("timestamp", uint64(1)<<63)), attestation.ErrPayload},
		{"a negative timestamp", f.document(f.with("timestamp", -1)), attestation.ErrTimestamp},
		{"a timestamp as floating point", f.document(f.with("timestamp", float64(f.now.UnixMilli()))), attestation.ErrPayload},
		{"a simple value as timestamp", f.document(f.with("timestamp", cbor.RawMessage{0xe5})), attestation.ErrPayload},
		{"a public_key of 1025 bytes", f.document(f.with("public_key", long)), attestation.ErrFieldSize},
		{"user_data of 1025 bytes", f.document(f.with("user_data", long)), attestation.ErrFieldSize},
		{"a nonce of 1025 bytes", f.document(f.with("nonce", long)), attestation.ErrFieldSize},
		{"a nonce as text", f.document(f.with("nonce", forgedNonce)), attestation.ErrPayload},
		{"user_data as array of integers", f.document(f.with("user_data", []int{1, 2, 3})), attestation.ErrPayload},
	}
	for _, name := range []string{"module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"} {
		out = append(out,
			refused{"no " + name, f.document(f.without(name)), attestation.ErrMissing},
			refused{"null as " + name, f.document(f.with(name, nil)), attestation.ErrMissing})
	}
	upper := f.without("digest")
	return append(out, refused{"DIGEST for digest", f.document(append(upper, field{"DIGEST", "SHA384"})), attestation.ErrMissing})
}

func malformedRegisters(f *forger) []refused {
	pcrs := func(v any) []byte { return f.document(f.with("pcrs", v)) }
	gap := registers(17, 48, 7)
	delete(gap, 5)
	return []refused{
		{"no registers", pcrs(registers(0, 48, 7)), attestation.ErrPCRs},
		{"15 registers", pcrs(registers(15, 48, 7)), attestation.ErrPCRs},
		{"33 registers", pcrs(registers(33, 48, 7)), attestation.ErrPCRs},
		{"16 registers without PCR5", pcrs(gap), attestation.ErrPCRs},
		{"PCR32", pcrs(edited(registers(16, 48, 7), 32, make([]byte, 48))), attestation.ErrPCRs},
		{"PCR 2^63", pcrs(edited(registers(16, 48, 7), 1<<63, make([]byte, 48))), attestation.ErrPayload},
		{"SHA-256 registers", pcrs(registers(16, 32, 7)), attestation.ErrPCRs},
		{"SHA-512 registers", pcrs(registers(16, 64, 7)), attestation.ErrPCRs},
		{"one register of 47 bytes", pcrs(edited(registers(16, 48, 7), 9, make([]byte, 47))), attestation.ErrPCRs},
		{"an empty register", pcrs(edited(registers(16, 48, 7), 9, []byte{})), attestation.ErrPCRs},
		{"a null register", pcrs(edited(registers(16, 48, 7), 9, nil)), attestation.ErrPCRs},
		{"a negative register", pcrs(map[int][]byte{-1: make([]byte, 48)}), attestation.ErrPCRs},
		{"a register numbered by floating point", pcrs(map[float64][]byte{0: make([]byte, 48)}), attestation.ErrPayload},
		{"a register named by text", pcrs(map[string][]byte{"0": make([]byte, 48)}), attestation.ErrPayload},
		{"registers as array", pcrs([][]byte{make([]byte, 48)}), attestation.ErrPayload},
	}
}

func malformedBundles(f *forger) []refused {
	root, regional, zone := f.root.cert.Raw, f.regional.cert.Raw, f.zone.cert.Raw
	bundle := func(ders ...[]byte) []byte { return f.document(f.with("cabundle", ders)) }
	other := newForger(f.t)
	nine := [][]byte{root, regional, zone, zone, zone, zone, zone, zone, zone}
	return []refused{
		{"an empty bundle", f.document(f.with("cabundle", [][]byte{})), attestation.ErrCABundle},
		{"nine certificates", bundle(nine...), attestation.ErrCABundle},
		{"17 certificates", bundle(append(nine, nine...)...), attestation.ErrPayload},
		{"an empty certificate in the bundle", bundle(root, []byte{}, zone), attestation.ErrCABundle},
		{"a certificate of 1025 bytes", bundle(root, make([]byte, 1025)), attestation.ErrCABundle},
		{"an empty leaf", f.document(f.with("certificate", []byte{})), attestation.ErrCABundle},
		{"a leaf of 1025 bytes", f.document(f.with("certificate", make([]byte, 1025))), attestation.ErrCABundle},
		{"the bundle reversed", bundle(zone, regional, root), attestation.ErrRoot},
		{"another root first", bundle(other.root.cert.Raw, regional, zone), attestation.ErrRoot},
		{"everything of another root", other.document(other.fields()), attestation.ErrRoot},
		{"a root with a bit changed", bundle(flipped(root), regional, zone), attestation.ErrRoot},
		{"garbage as intermediate", bundle(root, []byte("garbage"), zone), attestation.ErrCertificate},
		{"a trailing byte after a certificate", bundle(root, append(bytes.Clone(regional), 0), zone), attestation.ErrCertificate},
		{"garbage as leaf", f.document(f.with("certificate", []byte("garbage"))), attestation.ErrCertificate},
		{"the intermediates swapped", bundle(root, zone, regional), attestation.ErrPathLen},
		{"an intermediate left out", bundle(root, zone), attestation.ErrChain},
		{"another chain's intermediate", bundle(root, other.regional.cert.Raw, zone), attestation.ErrChain},
		{"a foreign certificate added", bundle(root, regional, zone, other.zone.cert.Raw), attestation.ErrPathLen},
	}
}

func flipped(der []byte) []byte {
	out := bytes.Clone(der)
	out[len(out)-1] ^= 1
	return out
}

func wrongChains(f *forger) []refused {
	leafUnder := func(e entity) entity { return f.certify(&e, forgedName, asLeaf) }
	under := func(name string, edits ...func(*x509.Certificate)) []byte {
		mid := f.certify(&f.root, name, edits...)
		return f.from(leafUnder(mid), mid)
	}
	short := f.certify(&f.root, "short", asCA(0))
	below := f.certify(&short, "below", asCA(-1))
	forged := f.certify(nil, "regional", asCA(-1)) // the right name, its own key
	stranger := f.certify(&f.root, "stranger", asCA(-1))
	renamed := f.certifyKey(&f.root, "renamed", stranger.key, asCA(-1)) // the right key, another name
	misnamed := stranger                                                // its leaf will name another issuer key, under a right signature
	copied := *stranger.cert
	copied.SubjectKeyId = f.root.cert.SubjectKeyId
	misnamed.cert = &copied
	critical := pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 1, 1}, Critical: true, Value: []byte{5, 0}}
	return []refused{
		{"an intermediate that is no CA", under("no CA", asLeaf, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }), attestation.ErrNotCA},
		{"an intermediate without basic constraints", under("none", func(c *x509.Certificate) {
			c.BasicConstraintsValid, c.KeyUsage = false, x509.KeyUsageCertSign
		}), attestation.ErrNotCA},
		{"an intermediate that may not sign certificates", under("usage", asCA(-1), func(c *x509.Certificate) {
			c.KeyUsage = x509.KeyUsageDigitalSignature
		}), attestation.ErrKeyUsage},
		{"an intermediate without key usage", under("no usage", asCA(-1), func(c *x509.Certificate) { c.KeyUsage = 0 }), attestation.ErrKeyUsage},
		{"more intermediates than permitted", f.from(leafUnder(below), short, below), attestation.ErrPathLen},
		{"an intermediate that issued itself", f.from(leafUnder(forged), forged), attestation.ErrChain},
		{"a leaf of the same key under another name", f.from(leafUnder(stranger), renamed), attestation.ErrChain},
		{"a leaf that names another issuer key", f.from(leafUnder(misnamed), stranger), attestation.ErrChain},
		{"an expired intermediate", under("old", asCA(-1), func(c *x509.Certificate) { c.NotAfter = f.now.Add(-time.Second) }), attestation.ErrCertificateTime},
		{"an intermediate not yet valid", under("young", asCA(-1), func(c *x509.Certificate) { c.NotBefore = f.now.Add(time.Second) }), attestation.ErrCertificateTime},
		{"an unknown critical extension", under("critical", asCA(-1), func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{critical}
		}), attestation.ErrCriticalExtension},
	}
}

func wrongLeaves(f *forger) []refused {
	leaf := func(name string, edits ...func(*x509.Certificate)) []byte {
		return f.from(f.certify(&f.zone, name, append([]func(*x509.Certificate){asLeaf}, edits...)...), f.regional, f.zone)
	}
	noCAWithPathLen := pkix.Extension{ // cA absent, pathLenConstraint 0
		Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 0x03, 0x02, 0x01, 0x00},
	}
	return []refused{
		{"a CA as leaf", leaf(forgedName, asCA(-1)), attestation.ErrLeaf},
		{"an intermediate as leaf", f.from(f.zone, f.regional), attestation.ErrLeaf},
		{"a leaf that may not sign", leaf(forgedName, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }), attestation.ErrKeyUsage},
		{"a leaf that may sign certificates", leaf(forgedName, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }), attestation.ErrKeyUsage},
		{"a leaf with a path length", leaf(forgedName, func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{noCAWithPathLen}
		}), attestation.ErrPathLen},
		{"an expired leaf", leaf(forgedName, func(c *x509.Certificate) { c.NotAfter = f.now.Add(-time.Second) }), attestation.ErrCertificateTime},
		{"a leaf not yet valid", leaf(forgedName, func(c *x509.Certificate) { c.NotBefore = f.now.Add(time.Second) }), attestation.ErrCertificateTime},
		{"a leaf of another module", leaf("i-0123456789abcdef0-enc0000000000000000.test-1.test"), attestation.ErrLeafName},
		{"a leaf of a module whose id only begins alike", leaf(forgedModule + "0.test-1.test"), attestation.ErrLeafName},
		{"a leaf named by the bare module id", leaf(forgedModule), attestation.ErrLeafName},
		{"a leaf without a name", leaf(""), attestation.ErrLeafName},
	}
}

func wrongKeys(f *forger) []refused {
	leafOn := func(curve elliptic.Curve) []byte {
		return f.from(f.certifyKey(&f.zone, forgedName, f.newKey(curve), asLeaf), f.regional, f.zone)
	}
	p256 := f.certifyKey(&f.root, "p256", f.newKey(elliptic.P256()), asCA(-1))
	p521 := f.certifyKey(&f.zone, forgedName, f.newKey(elliptic.P521()), asLeaf)
	g := *f
	g.leaf = p521
	payload := g.pairs(g.fields())
	cut := g.sign(protectedES384, payload)[:96]
	return []refused{
		{"a P-256 leaf", leafOn(elliptic.P256()), attestation.ErrCertificateKey},
		{"a P-521 leaf with its longer signature", leafOn(elliptic.P521()), attestation.ErrSignatureSize},
		{"a P-521 leaf with a cut signature", cose(g.encode(protectedES384), []byte{0xa0}, g.encode(payload), g.encode(cut)), attestation.ErrCertificateKey},
		{"an RSA leaf", f.from(f.certifyKey(&f.zone, forgedName, f.rsaKey(), asLeaf), f.regional, f.zone), attestation.ErrCertificateKey},
		{"a P-256 intermediate", f.from(f.certify(&p256, forgedName, asLeaf), p256), attestation.ErrCertificateKey},
		{"a leaf certified with SHA-256", f.from(f.certify(&f.zone, forgedName, asLeaf, func(c *x509.Certificate) {
			c.SignatureAlgorithm = x509.ECDSAWithSHA256
		}), f.regional, f.zone), attestation.ErrCertificateKey},
		{"an intermediate certified with SHA-512", func() []byte {
			mid := f.certify(&f.root, "sha512", asCA(-1), func(c *x509.Certificate) { c.SignatureAlgorithm = x509.ECDSAWithSHA512 })
			return f.from(f.certify(&mid, forgedName, asLeaf), mid)
		}(), attestation.ErrCertificateKey},
	}
}

func wrongSignatures(f *forger) []refused {
	payload := f.pairs(f.fields())
	envelope := func(payload, signature []byte) []byte {
		return cose(f.encode(protectedES384), []byte{0xa0}, f.encode(payload), f.encode(signature))
	}
	good := f.sign(protectedES384, payload)
	swapped := append(bytes.Clone(good[48:]), good[:48]...)
	order := elliptic.P384().Params().N.Bytes()
	other := *f
	other.leaf = f.certify(&f.zone, forgedName, asLeaf)
	return []refused{
		{"a signature with a bit changed", envelope(payload, flipped(good)), attestation.ErrSignature},
		{"a signature of zeros", envelope(payload, make([]byte, 96)), attestation.ErrSignature},
		{"a signature of r = s = n", envelope(payload, append(bytes.Clone(order), order...)), attestation.ErrSignature},
		{"r and s swapped", envelope(payload, swapped), attestation.ErrSignature},
		{"the signature of another document", envelope(payload, f.sign(protectedES384, []byte("other"))), attestation.ErrSignature},
		{"the signature of another leaf's key", envelope(payload, other.sign(protectedES384, payload)), attestation.ErrSignature},
		{"a signature over the empty header", envelope(payload, f.sign([]byte{}, payload)), attestation.ErrSignature},
	}
}
