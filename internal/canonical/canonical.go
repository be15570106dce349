// Package canonical encodes values as CBOR in its one canonical form (core
// deterministic encoding, RFC 8949 section 4.2.1) and decodes nothing but that
// form: a value has one encoding, and an encoding one reading (ADR 1).
package canonical

import (
	"bytes"
	"errors"

	"github.com/fxamacker/cbor/v2"
)

// ErrForm is every reason to refuse bytes. It holds nothing of them.
var ErrForm = errors.New("not the canonical CBOR of its type")

// maxDepth bounds nested maps and arrays; a sealed key in a map in a message
// needs four.
const maxDepth = 8

//nolint:gochecknoglobals // immutable codecs
var (
	enc = must(cbor.CoreDetEncOptions().EncMode())
	dec = must(cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
		IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden, MaxNestedLevels: maxDepth,
		FieldNameMatching: cbor.FieldNameMatchingCaseSensitive,
	}.DecMode())
)

func must[T any](v T, err error) T {
	if err != nil {
		panic("canonical: " + err.Error())
	}
	return v
}

// Encode returns the encoding of v. It panics where v cannot be encoded, which is
// a mistake in the program: the formats are structs of numbers, texts and bytes.
func Encode(v any) []byte { return must(enc.Marshal(v)) }

// Decode reads b into v, a pointer to a struct. It refuses with ErrForm whatever
// Encode would not have written for that value: unknown, doubled and missing
// keys, tags, indefinite lengths, other widths of numbers, trailing bytes. The
// caller bounds the length of b.
func Decode(b []byte, v any) error {
	if err := dec.Unmarshal(b, v); err != nil {
		return ErrForm
	}
	again, err := enc.Marshal(v)
	if err != nil || !bytes.Equal(again, b) { //nolint:forbidigo // public bytes
		return ErrForm
	}
	return nil
}
