package intake

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"

	"github.com/keyhold/keyhold/internal/record"
)

// MaxLine bounds one line of input in bytes: a text of record.MaxPayloadLen
// bytes, every one escaped to six, and an id.
const MaxLine = 6*record.MaxPayloadLen + 4096

// errLine says why a line is no record. Its texts hold nothing of the line.
type lineError string

func (e lineError) Error() string { return string(e) }

// ParseLine reads one line of input:
//
//	{"id": "optional", "payload": "base64"}   or   {"id": "optional", "text": "string"}
//
// Exactly one of payload (standard base64 with padding, canonical) and text
// stands there; other and doubled keys, other JSON and invalid UTF-8 are refused,
// so are empty and too long payloads and, for digests, payloads that do not have
// 32 bytes.
func ParseLine(line []byte, kind record.Kind) (record.Record, error) {
	fields, err := fieldsOf(line)
	if err != nil {
		return record.Record{}, err
	}
	var r record.Record
	for name, v := range fields {
		switch name {
		case "id":
			if err := record.CheckID(v); err != nil {
				return record.Record{}, fmt.Errorf("id: %w", err)
			}
			r.ID = v
		case "payload":
			if r.Payload, err = base64.StdEncoding.Strict().DecodeString(v); err != nil {
				return record.Record{}, lineError("payload is not standard base64")
			}
		case "text":
			r.Payload = []byte(v)
		}
	}
	_, hasPayload := fields["payload"]
	_, hasText := fields["text"]
	switch n := len(r.Payload); {
	case hasPayload == hasText:
		return record.Record{}, lineError(`want exactly one of "payload" and "text"`)
	case n == 0:
		return record.Record{}, lineError("the payload is empty")
	case n > record.MaxPayloadLen:
		return record.Record{}, fmt.Errorf("%w: %d bytes, at most %d", errTooLong, n, record.MaxPayloadLen)
	case kind == record.Digest && n != 32:
		return record.Record{}, fmt.Errorf("%w, got %d", errDigestLen, n)
	}
	return r, nil
}

const (
	errTooLong   = lineError("the payload is too long")
	errDigestLen = lineError("a digest has 32 bytes")
)

// fieldsOf reads a flat JSON object of strings with the keys of a line, each at
// most once.
func fieldsOf(line []byte) (map[string]string, error) {
	if !utf8.Valid(line) {
		return nil, lineError("not valid UTF-8")
	}
	dec := json.NewDecoder(bytes.NewReader(line))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, lineError("not a JSON object")
	}
	fields := make(map[string]string, 2)
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return nil, lineError("not valid JSON")
		}
		name, ok := key.(string)
		if !ok || name != "id" && name != "payload" && name != "text" {
			return nil, lineError(`a key other than "id", "payload" and "text"`)
		}
		if _, twice := fields[name]; twice {
			return nil, lineError("the same key twice")
		}
		value, err := dec.Token()
		if err != nil {
			return nil, lineError("not valid JSON")
		}
		if fields[name], ok = value.(string); !ok {
			return nil, lineError("a value that is not a string")
		}
	}
	if _, err := dec.Token(); err != nil {
		return nil, lineError("not valid JSON")
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, lineError("more than one JSON value")
	}
	return fields, nil
}
