package eif

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

// MaxMeasurements bounds what ParseMeasurements reads, in bytes: describe-eif
// prints some kilobytes beside the measurements.
const MaxMeasurements = 1 << 20

var errMember = errors.New("not a JSON object whose members come once each")

// ParseMeasurements reads what nitro-cli build-enclave, nitro-cli describe-eif
// and Keyhold itself print of an image. What stands beside the measurements is
// skipped. It refuses another hash, registers that are not known, written twice,
// missing or not 96 lower-case hex digits, and the zeros of a debug enclave: who
// reads too little of what is wanted, wants too little.
func ParseMeasurements(raw []byte) (Measurements, error) {
	if len(raw) > MaxMeasurements {
		return Measurements{}, BadMeasurements
	}
	outer, err := members(raw)
	if err != nil {
		return Measurements{}, fmt.Errorf("%w: %w", BadMeasurements, err)
	}
	inner, err := members(outer["Measurements"])
	if err != nil {
		return Measurements{}, fmt.Errorf("%w: Measurements: %w", BadMeasurements, err)
	}
	var m Measurements
	fields := map[string]*string{"HashAlgorithm": &m.HashAlgorithm, "PCR0": &m.PCR0, "PCR1": &m.PCR1, "PCR2": &m.PCR2, "PCR8": &m.PCR8}
	for name, value := range inner {
		field, known := fields[name]
		if !known || json.Unmarshal(value, field) != nil {
			return Measurements{}, fmt.Errorf("%w: Measurements has an unknown member or one that is no text", BadMeasurements)
		}
	}
	if m.HashAlgorithm != hashAlgorithm {
		return Measurements{}, fmt.Errorf("%w: HashAlgorithm is not %s", BadMeasurements, hashAlgorithm)
	}
	for _, r := range []struct{ name, value string }{{"PCR0", m.PCR0}, {"PCR1", m.PCR1}, {"PCR2", m.PCR2}, {"PCR8", m.PCR8}} {
		if r.name == "PCR8" && inner[r.name] == nil { // not signed
			continue
		}
		if b, err := hex.DecodeString(r.value); err != nil || len(b) != PCRLen || strings.ToLower(r.value) != r.value || PCR(b) == (PCR{}) {
			return Measurements{}, fmt.Errorf("%w: %s is not 96 lower-case hex digits, or all zero, which is debug mode", BadMeasurements, r.name)
		}
	}
	return m, nil
}

// members reads an object. Unlike encoding/json by itself it tells letters of
// either case apart, and refuses a name that comes twice.
func members(raw []byte) (map[string]json.RawMessage, error) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, errMember
	}
	out := map[string]json.RawMessage{}
	for dec.More() {
		name, err := dec.Token()
		if err != nil {
			return nil, errMember
		}
		key, ok := name.(string)
		var value json.RawMessage
		if !ok || out[key] != nil || dec.Decode(&value) != nil {
			return nil, errMember
		}
		out[key] = value
	}
	if _, err := dec.Token(); err != nil { // the closing brace
		return nil, errMember
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errMember
	}
	return out, nil
}
