package keypolicy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"
)

// Limits of what is read.
const (
	maxPolicy = 32 << 10  // bytes; the KMS quota for a key policy
	maxOutput = 256 << 10 // bytes of a command's output around it, where every character may be escaped
	maxDepth  = 8         // a policy needs 6
)

// ErrMalformed says that a text is not the JSON of a key policy.
var ErrMalformed = errors.New("key policy is malformed")

func malformed(what string) error { return fmt.Errorf("%w: %s", ErrMalformed, what) }

// object is a JSON object. Unlike a map that encoding/json fills, it had no name
// twice, and its names are compared exactly.
type object map[string]any

// readJSON reads one JSON value: a string, a bool, a json.Number, nil, []any or
// object. It refuses names that come twice, anything after the value, bytes that
// are not UTF-8, and what is nested too deeply.
func readJSON(raw []byte, limit int) (any, error) {
	switch {
	case len(raw) > limit:
		return nil, malformed("it is too long")
	case !utf8.Valid(raw):
		return nil, malformed("it is not UTF-8")
	case !json.Valid(raw): // Token alone forgives some commas
		return nil, malformed("it is not one JSON value")
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	v, err := readValue(dec, 0)
	if err != nil {
		return nil, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, malformed("something follows it")
	}
	return v, nil
}

func readValue(dec *json.Decoder, depth int) (any, error) {
	if depth > maxDepth {
		return nil, malformed("it is nested too deeply")
	}
	token, err := dec.Token()
	if err != nil {
		return nil, malformed("it is not JSON")
	}
	switch token {
	case json.Delim('{'):
		return readObject(dec, depth)
	case json.Delim('['):
		list := []any{}
		for dec.More() {
			v, err := readValue(dec, depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		_, err = dec.Token() // the bracket
		return list, err
	}
	return token, nil
}

func readObject(dec *json.Decoder, depth int) (any, error) {
	o := object{}
	for dec.More() {
		token, err := dec.Token()
		name, ok := token.(string)
		if err != nil || !ok {
			return nil, malformed("it is not JSON")
		}
		if _, twice := o[name]; twice {
			return nil, malformed("a name comes twice in one object")
		}
		if o[name], err = readValue(dec, depth+1); err != nil {
			return nil, err
		}
	}
	_, err := dec.Token() // the brace
	return o, err
}

// texts reads a string or a list of strings that is not empty.
func texts(v any) ([]string, error) {
	if s, ok := v.(string); ok {
		return []string{s}, nil
	}
	list, ok := v.([]any)
	if !ok || len(list) == 0 {
		return nil, malformed("want a string or a list of strings")
	}
	out := make([]string, len(list))
	for i, item := range list {
		if out[i], ok = item.(string); !ok {
			return nil, malformed("want a string or a list of strings")
		}
	}
	return out, nil
}
