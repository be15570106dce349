package checker

import (
	"encoding/binary"
	"errors"
)

var errSegment = errors.New("a segment is malformed")

type entry struct {
	id      string
	payload []byte
}

type outcome struct {
	signature []byte
	refusal   string
}

type segmentReader struct {
	b   []byte
	bad bool
}

func (s *segmentReader) number() int {
	v, n := binary.Uvarint(s.b)
	if n <= 0 || v > 1<<20 {
		s.bad, s.b = true, nil
		return 0
	}
	s.b = s.b[n:]
	return int(v)
}

func (s *segmentReader) bytes(n int) []byte {
	if n > len(s.b) {
		s.bad, s.b = true, nil
		return nil
	}
	v := s.b[:n:n]
	s.b = s.b[n:]
	return v
}

func openSegment(b []byte) (*segmentReader, int, error) {
	if len(b) == 0 || b[0] != 1 {
		return nil, 0, errSegment
	}
	s := &segmentReader{b: b[1:]}
	n := s.number()
	if s.bad || n == 0 || n > 5000 {
		return nil, 0, errSegment
	}
	return s, n, nil
}

// readPayload reads version 1 | count | (id length, id, payload length, payload)...
func readPayload(b []byte) ([]entry, error) {
	s, n, err := openSegment(b)
	if err != nil {
		return nil, err
	}
	out := make([]entry, n)
	for i := range out {
		out[i] = entry{id: string(s.bytes(s.number())), payload: s.bytes(s.number())}
	}
	if s.bad || len(s.b) != 0 {
		return nil, errSegment
	}
	return out, nil
}

// readResult reads version 1 | count | signature length | refused | (index, length, code)... | signatures.
func readResult(b []byte) ([]outcome, error) {
	s, n, err := openSegment(b)
	if err != nil {
		return nil, err
	}
	out := make([]outcome, n)
	length := s.number()
	for refused := s.number(); refused > 0 && !s.bad; refused-- {
		i := s.number()
		code := string(s.bytes(s.number()))
		if i >= n || code == "" || out[i].refusal != "" {
			return nil, errSegment
		}
		out[i].refusal = code
	}
	for i := range out {
		if out[i].refusal == "" {
			out[i].signature = s.bytes(length)
		}
	}
	if s.bad || len(s.b) != 0 || length == 0 {
		return nil, errSegment
	}
	return out, nil
}
