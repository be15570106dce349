package nsm

import (
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/fxamacker/cbor/v2"
)

// maxDocument bounds a document before it is decoded: 16 KiB, the payload limit
// of AWS attestation_process.md, section 3.1.
const maxDocument = 16 << 10

// coseTag is the optional CBOR tag 18 of a COSE_Sign1 (RFC 9052, section 2).
const coseTag = 0xd2

// ErrDocument is returned for bytes that are no attestation document.
var ErrDocument = errors.New("not an attestation document")

// decoding is as strict as package attestation's. Indefinite lengths are
// allowed because the device has used them since 2025.
var decoding = func() cbor.DecMode {
	mode, err := cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		FieldNameMatching: cbor.FieldNameMatchingCaseSensitive,
		IndefLength:       cbor.IndefLengthAllowed,
		TagsMd:            cbor.TagsForbidden,
		MaxNestedLevels:   4,
		MaxArrayElements:  64,
		MaxMapPairs:       64,
	}.DecMode()
	if err != nil {
		panic("nsm: fixed CBOR options: " + err.Error())
	}
	return mode
}()

// Timestamp returns the NSM's clock out of a document that this process got
// from its own device. It checks no signature: never give it a document that
// came from anywhere else.
func Timestamp(doc []byte) (time.Time, error) {
	if len(doc) == 0 || len(doc) > maxDocument {
		return time.Time{}, fmt.Errorf("read NSM clock: size: %w", ErrDocument)
	}
	if doc[0] == coseTag {
		doc = doc[1:]
	}
	var envelope struct {
		_           struct{} `cbor:",toarray"`
		Protected   []byte
		Unprotected cbor.RawMessage
		Payload     []byte
		Signature   []byte
	}
	if decoding.Unmarshal(doc, &envelope) != nil {
		return time.Time{}, fmt.Errorf("read NSM clock: envelope: %w", ErrDocument)
	}
	var payload struct {
		Timestamp *uint64 `cbor:"timestamp"`
	}
	if decoding.Unmarshal(envelope.Payload, &payload) != nil || payload.Timestamp == nil {
		return time.Time{}, fmt.Errorf("read NSM clock: payload: %w", ErrDocument)
	}
	ms := *payload.Timestamp
	if ms == 0 || ms > math.MaxInt64/uint64(time.Millisecond) { // beyond the year 2262 time arithmetic overflows
		return time.Time{}, fmt.Errorf("read NSM clock: timestamp: %w", ErrDocument)
	}
	return time.UnixMilli(int64(ms)).UTC(), nil
}
