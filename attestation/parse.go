package attestation

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/fxamacker/cbor/v2"
)

// Limits of the form. Where AWS permits more than it writes, the limit is what
// it writes (design).
const (
	maxDocument     = 16 << 10 // bytes; AWS 3.1 limits the payload to this
	signatureSize   = 96       // bytes, r || s of ES384 (RFC 9053, section 2.1)
	pcrSize         = 48       // bytes of SHA-384; AWS 2.2 permits 32 and 64 too
	bootPCRs        = 16       // registers 0..15 are always locked, hence shown
	maxPCRs         = 32       // AWS 3.2.2.2
	maxField        = 1024     // bytes; AWS 2.2 (3.2.2.2 says 512, real documents have 1024)
	maxModuleID     = 128      // bytes; AWS writes 39
	maxCertificates = 8        // of the bundle; AWS writes 4
	maxCertificate  = 1024     // bytes; AWS 2.2
)

// maxTimestamp is the last millisecond of the year 9999, the last that RFC 3339
// can write.
const maxTimestamp = 253402300799999

// coseTag is CBOR tag 18, COSE_Sign1, in its only minimal form (RFC 9052,
// section 2). AWS writes documents without it.
const coseTag = 0xd2

// Each is compared byte by byte: other encodings of the same maps are refused.
const (
	protectedES384 = "\xa1\x01\x38\x22" // {1: -35}, RFC 9053, section 2.1
	emptyMap       = "\xa0"
)

// decoding is strict CBOR. Indefinite lengths are allowed, since real documents
// have had them since 2025; so are lengths in more bytes than needed. The depth
// limit is the least that the library knows: payload, pcrs, value need 3.
var decoding = func() cbor.DecMode {
	var rejected []func(*cbor.SimpleValueRegistry) error
	for v := range 256 {
		switch {
		case v == 20 || v == 21 || v == 22: // false, true, null
		case v >= 24 && v < 32: // not well-formed (RFC 8949, section 3.3)
		default: // undefined and the unassigned ones, which decode as integers
			rejected = append(rejected, cbor.WithRejectedSimpleValue(cbor.SimpleValue(v)))
		}
	}
	simple, err := cbor.NewSimpleValueRegistryFromDefaults(rejected...)
	if err != nil {
		panic("attestation: fixed CBOR simple values: " + err.Error())
	}
	mode, err := cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		FieldNameMatching: cbor.FieldNameMatchingCaseSensitive,
		IndefLength:       cbor.IndefLengthAllowed,
		TagsMd:            cbor.TagsForbidden,
		SimpleValues:      simple,
		MaxNestedLevels:   4,
		MaxArrayElements:  16,
		MaxMapPairs:       64,
	}.DecMode()
	if err != nil {
		panic("attestation: fixed CBOR options: " + err.Error())
	}
	return mode
}()

var errNoByteString = errors.New("not a byte string")

// byteString is a CBOR byte string or null. A plain []byte would also take an
// array of small integers.
type byteString []byte

// UnmarshalCBOR implements cbor.Unmarshaler.
func (b *byteString) UnmarshalCBOR(data []byte) error {
	const majorByteString, null = 2, 0xf6
	if len(data) == 1 && data[0] == null {
		*b = nil
		return nil
	}
	if len(data) == 0 || data[0]>>5 != majorByteString {
		return errNoByteString
	}
	var plain []byte
	if err := decoding.Unmarshal(data, &plain); err != nil {
		return fmt.Errorf("decode byte string: %w", err)
	}
	*b = plain
	return nil
}

// envelope is COSE_Sign1 (RFC 9052, section 4.2).
type envelope struct {
	_           struct{} `cbor:",toarray"`
	Protected   byteString
	Unprotected cbor.RawMessage
	Payload     byteString
	Signature   byteString
}

// payload is AttestationDocument of AWS 2.2. Unknown fields are skipped: AWS
// may add some.
type payload struct {
	ModuleID    *string            `cbor:"module_id"`
	Digest      *string            `cbor:"digest"`
	Timestamp   *int64             `cbor:"timestamp"`
	PCRs        map[int]byteString `cbor:"pcrs"`
	Certificate byteString         `cbor:"certificate"`
	CABundle    []byteString       `cbor:"cabundle"`
	PublicKey   byteString         `cbor:"public_key"`
	UserData    byteString         `cbor:"user_data"`
	Nonce       byteString         `cbor:"nonce"`
}

// parsed is a document together with what its signature covers.
type parsed struct {
	doc       *Document
	untagged  []byte // the input without tag 18
	payload   []byte
	signature []byte
}

// Parse reads a document and VERIFIES NOTHING: anybody can write what it
// accepts. It checks size and form only. Use it to look at a document; use
// VerifyLive or VerifyRecorded to believe one.
func Parse(raw []byte) (*Document, error) {
	p, err := parse(raw)
	if err != nil {
		return nil, fmt.Errorf("parse attestation document: %w", err)
	}
	return p.doc, nil
}

func parse(raw []byte) (*parsed, error) {
	if len(raw) == 0 || len(raw) > maxDocument {
		return nil, ErrSize
	}
	if raw[0] == coseTag {
		raw = raw[1:]
	}
	var e envelope
	if !isArray(raw) || decoding.Unmarshal(raw, &e) != nil {
		return nil, ErrCOSE
	}
	switch {
	case string(e.Protected) != protectedES384:
		return nil, ErrProtected
	case string(e.Unprotected) != emptyMap:
		return nil, ErrUnprotected
	case len(e.Signature) != signatureSize:
		return nil, ErrSignatureSize
	}
	doc, err := parsePayload(e.Payload)
	if err != nil {
		return nil, err
	}
	return &parsed{doc: doc, untagged: raw, payload: e.Payload, signature: e.Signature}, nil
}

func parsePayload(data []byte) (*Document, error) {
	var p payload
	if !isMap(data) || decoding.Unmarshal(data, &p) != nil {
		return nil, ErrPayload
	}
	switch {
	case !p.complete():
		return nil, ErrMissing
	case !validModuleID(*p.ModuleID):
		return nil, ErrModuleID
	case *p.Digest != "SHA384":
		return nil, ErrDigest
	case *p.Timestamp <= 0 || *p.Timestamp > maxTimestamp:
		return nil, ErrTimestamp
	case !validPCRs(p.PCRs):
		return nil, ErrPCRs
	case max(len(p.PublicKey), len(p.UserData), len(p.Nonce)) > maxField:
		return nil, ErrFieldSize
	case !validBundle(p.CABundle, p.Certificate):
		return nil, ErrCABundle
	}
	return p.document(), nil
}

// complete reports whether the mandatory fields of AWS 3.2.2.1 are there and
// not null.
func (p *payload) complete() bool {
	return p.ModuleID != nil && p.Digest != nil && p.Timestamp != nil &&
		p.PCRs != nil && p.Certificate != nil && p.CABundle != nil
}

// document converts a payload whose form was checked.
func (p *payload) document() *Document {
	d := &Document{
		ModuleID:    *p.ModuleID,
		Timestamp:   time.UnixMilli(*p.Timestamp).UTC(),
		Digest:      *p.Digest,
		PCRs:        make(map[int][]byte, len(p.PCRs)),
		PublicKey:   p.PublicKey,
		UserData:    p.UserData,
		Nonce:       p.Nonce,
		Certificate: p.Certificate,
	}
	for i, v := range p.PCRs {
		d.PCRs[i] = v
	}
	for _, c := range p.CABundle {
		d.CABundle = append(d.CABundle, c)
	}
	return d
}

// isArray and isMap keep a bare null from decoding as an empty value.
func isArray(data []byte) bool { return len(data) > 0 && data[0]>>5 == 4 }
func isMap(data []byte) bool   { return len(data) > 0 && data[0]>>5 == 5 }

// validModuleID permits no dot, which ends the module id in the leaf's name.
func validModuleID(id string) bool {
	const allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	foreign := func(r rune) bool { return !strings.ContainsRune(allowed, r) }
	return len(id) >= 1 && len(id) <= maxModuleID && !strings.ContainsFunc(id, foreign)
}

func validPCRs(pcrs map[int]byteString) bool {
	for i, v := range pcrs {
		if i < 0 || i >= maxPCRs || len(v) != pcrSize {
			return false
		}
	}
	for i := range bootPCRs {
		if _, ok := pcrs[i]; !ok {
			return false
		}
	}
	return true
}

func validBundle(bundle []byteString, leaf byteString) bool {
	if len(bundle) < 1 || len(bundle) > maxCertificates {
		return false
	}
	for _, c := range bundle {
		if len(c) < 1 || len(c) > maxCertificate {
			return false
		}
	}
	return len(leaf) >= 1 && len(leaf) <= maxCertificate
}
