package eif

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha512"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"math/big"

	"github.com/fxamacker/cbor/v2"
)

const (
	coordinateLen    = 48 // of P-384, in bytes
	maxSignatureLen  = 64 << 10
	signingRegister  = 0 // PCR0 is what a signature signs
	certificateBlock = "CERTIFICATE"
)

// es384 is the protected header {1: -35}: ECDSA with SHA-384 (RFC 9053).
//
//nolint:gochecknoglobals // never written
var es384 = []byte{0xa1, 0x01, 0x38, 0x22}

// octets is a byte string as AWS writes it into this section: an array of
// numbers, one for each byte.
type octets []uint16

func toOctets(b []byte) octets {
	o := make(octets, len(b))
	for i, v := range b {
		o[i] = uint16(v)
	}
	return o
}

func (o octets) bytes() ([]byte, bool) {
	b := make([]byte, len(o))
	for i, v := range o {
		if v > 0xff {
			return nil, false
		}
		b[i] = byte(v)
	}
	return b, true
}

// pcrSignature is the section: a list of one of these.
type pcrSignature struct {
	Certificate octets `cbor:"signing_certificate"` // PEM
	Signature   octets `cbor:"signature"`           // COSE_Sign1 over the CBOR of a pcrInfo
}

type pcrInfo struct {
	Index int32  `cbor:"register_index"`
	Value octets `cbor:"register_value"`
}

// sign1 is a COSE_Sign1 (RFC 9052) without its tag.
type sign1 struct {
	_           struct{} `cbor:",toarray"`
	Protected   []byte
	Unprotected struct{}
	Payload     []byte
	Signature   []byte
}

// sigStructure is what a COSE_Sign1 signs.
type sigStructure struct {
	_         struct{} `cbor:",toarray"`
	Context   string
	Protected []byte
	External  []byte
	Payload   []byte
}

//nolint:gochecknoglobals // both are built once from constants
var (
	encoder = must(cbor.EncOptions{Sort: cbor.SortNone, NilContainers: cbor.NilContainerAsEmpty}.EncMode())
	decoder = must(cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField, MaxNestedLevels: 4,
	}.DecMode())
)

func must[M any](mode M, err error) M {
	if err != nil {
		panic("eif: the options for CBOR contradict each other: " + err.Error())
	}
	return mode
}

// strictly decodes b and takes nothing that would be encoded in another way.
func strictly(b []byte, v any) error {
	if err := decoder.Unmarshal(b, v); err != nil {
		return BadSignature
	}
	if again, err := encoder.Marshal(v); err != nil || !bytes.Equal(again, b) { //nolint:forbidigo // nothing here is secret
		return BadSignature
	}
	return nil
}

// Sign signs the image: its PCR0, in the section that nitro-cli writes, with a
// P-384 key whose certificate, in PEM, is measured in PCR8. Everything that is
// measured must be in place; what is not (metadata) may still change.
func (m *Image) Sign(key *ecdsa.PrivateKey, certificatePEM []byte) error {
	cert, err := ParseCertificate(certificatePEM)
	if err != nil {
		return err
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return WrongSignature
	}
	pcr0, _, _ := m.registers()
	payload, err := encoder.Marshal(pcrInfo{Index: signingRegister, Value: toOctets(pcr0[:])})
	if err != nil {
		return fmt.Errorf("encode the register to sign: %w", err)
	}
	digest, err := toBeSigned(payload)
	if err != nil {
		return err
	}
	// Without a source of randomness the signature is that of RFC 6979: the same image
	// signed again with the same key is the same file.
	der, err := key.Sign(nil, digest[:], crypto.SHA384)
	if err != nil {
		return fmt.Errorf("sign the image: %w", err)
	}
	var point struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(der, &point); err != nil {
		return fmt.Errorf("sign the image: %w", err)
	}
	raw := make([]byte, 2*coordinateLen)
	point.R.FillBytes(raw[:coordinateLen])
	point.S.FillBytes(raw[coordinateLen:])
	message, err := encoder.Marshal(sign1{Protected: es384, Payload: payload, Signature: raw})
	if err != nil {
		return fmt.Errorf("encode the signature: %w", err)
	}
	m.Signature, err = encoder.Marshal([]pcrSignature{{Certificate: toOctets(certificatePEM), Signature: toOctets(message)}})
	if err != nil {
		return fmt.Errorf("encode the signature section: %w", err)
	}
	return nil
}

func toBeSigned(payload []byte) ([sha512.Size384]byte, error) {
	b, err := encoder.Marshal(sigStructure{Context: "Signature1", Protected: es384, External: []byte{}, Payload: payload})
	if err != nil {
		return [sha512.Size384]byte{}, fmt.Errorf("encode what is signed: %w", err)
	}
	return sha512.Sum384(b), nil
}

// VerifySignature checks that a signature section signs pcr0, and returns the
// certificate. Who trusts it compares PCR8: nothing is said here about who issued
// it or when it runs out.
func VerifySignature(raw []byte, pcr0 PCR) (*x509.Certificate, error) {
	cert, message, err := signatureParts(raw)
	if err != nil {
		return nil, err
	}
	var info pcrInfo
	if err := strictly(message.Payload, &info); err != nil {
		return nil, err
	}
	value, ok := info.Value.bytes()
	if !ok {
		return nil, BadSignature
	}
	digest, err := toBeSigned(message.Payload)
	if err != nil {
		return nil, err
	}
	r := new(big.Int).SetBytes(message.Signature[:coordinateLen])
	s := new(big.Int).SetBytes(message.Signature[coordinateLen:])
	key, isECDSA := cert.PublicKey.(*ecdsa.PublicKey)
	if !isECDSA || info.Index != signingRegister || string(value) != string(pcr0[:]) || !ecdsa.Verify(key, digest[:], r, s) {
		return nil, WrongSignature
	}
	return cert, nil
}

func signatureParts(raw []byte) (*x509.Certificate, *sign1, error) {
	var list []pcrSignature
	if len(raw) > maxSignatureLen {
		return nil, nil, BadSignature
	}
	if err := strictly(raw, &list); err != nil {
		return nil, nil, err
	}
	if len(list) != 1 {
		return nil, nil, BadSignature
	}
	block, ok := list[0].Certificate.bytes()
	if !ok {
		return nil, nil, BadSignature
	}
	cert, err := ParseCertificate(block)
	if err != nil {
		return nil, nil, err
	}
	packed, ok := list[0].Signature.bytes()
	if !ok {
		return nil, nil, BadSignature
	}
	var message sign1
	if err := strictly(packed, &message); err != nil {
		return nil, nil, err
	}
	if string(message.Protected) != string(es384) || len(message.Signature) != 2*coordinateLen {
		return nil, nil, BadSignature
	}
	return cert, &message, nil
}

// ParseCertificate reads the one PEM certificate, of a P-384 key, that may sign an
// image, written as openssl and Go write it: whatever else stands in it would be in
// the image without being measured.
func ParseCertificate(text []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != certificateBlock || len(block.Headers) != 0 || string(pem.EncodeToMemory(block)) != string(text) {
		return nil, BadCertificate
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, BadCertificate
	}
	if key, ok := cert.PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P384() {
		return nil, BadCertificate
	}
	return cert, nil
}

// CertificatePCR is PCR8 of an image that cert signed.
func CertificatePCR(cert *x509.Certificate) PCR {
	digest := sha512.Sum384(cert.Raw)
	return extended(digest[:])
}
