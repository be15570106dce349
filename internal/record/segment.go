package record

import (
	"encoding/binary"
	"fmt"
)

// Record is one thing to sign. ID is empty where it came without one.
type Record struct {
	ID      string
	Payload []byte
}

// Outcome is what became of one record: a signature, or the code of the
// refusal. Exactly one of them is set.
type Outcome struct {
	Signature []byte
	Refusal   string
}

// Versions of the segment formats; the first byte of each.
const (
	payloadVersion = 1
	resultVersion  = 1
	maxRefusalLen  = 64
)

// EncodePayload packs the records of a batch:
//
//	version 1 | count | count x (id length, id, payload length, payload)
//
// All numbers are minimal unsigned varints (encoding/binary).
func EncodePayload(rs []Record) []byte {
	n := 1 + binary.MaxVarintLen64
	for _, r := range rs {
		n += 2*binary.MaxVarintLen32 + len(r.ID) + len(r.Payload)
	}
	b := append(make([]byte, 0, n), payloadVersion)
	b = binary.AppendUvarint(b, uint64(len(rs)))
	for _, r := range rs {
		b = binary.AppendUvarint(b, uint64(len(r.ID)))
		b = append(b, r.ID...)
		b = binary.AppendUvarint(b, uint64(len(r.Payload)))
		b = append(b, r.Payload...)
	}
	return b
}

// DecodePayload reads what EncodePayload wrote and nothing else: whatever it
// accepts encodes back to the same bytes. The payloads alias b.
func DecodePayload(b []byte) ([]Record, error) {
	d := reader{b: b}
	n := d.head(payloadVersion)
	if d.bad || n == 0 || n > MaxBatchSize || len(b) > MaxSegmentLen {
		return nil, fmt.Errorf("%w: payload header", ErrSegment)
	}
	rs := make([]Record, n)
	for i := range rs {
		id := d.bytes(MaxIDLen)
		rs[i] = Record{ID: string(id), Payload: d.bytes(MaxPayloadLen)}
		if d.bad || rs[i].ID != "" && CheckID(rs[i].ID) != nil {
			return nil, fmt.Errorf("%w: payload record %d", ErrSegment, i)
		}
	}
	if len(d.b) != 0 {
		return nil, fmt.Errorf("%w: payload has trailing bytes", ErrSegment)
	}
	return rs, nil
}

// EncodeResult packs the outcomes of a batch in order. Every signature has
// sigLen bytes:
//
//	version 1 | count | sigLen | refused | refused x (index, code length, code) | signatures of the others
//
// It panics on a signature of another length: the caller made them.
func EncodeResult(sigLen int, out []Outcome) []byte {
	refused := 0
	for _, o := range out {
		if o.Refusal != "" {
			refused++
		}
	}
	b := append(make([]byte, 0, 32+len(out)*sigLen+refused*(maxRefusalLen+8)), resultVersion)
	b = binary.AppendUvarint(b, uint64(len(out)))
	b = binary.AppendUvarint(b, uint64(sigLen)) //nolint:gosec // a length
	b = binary.AppendUvarint(b, uint64(refused))
	for i, o := range out {
		if o.Refusal != "" {
			b = binary.AppendUvarint(b, uint64(i))
			b = binary.AppendUvarint(b, uint64(len(o.Refusal)))
			b = append(b, o.Refusal...)
		}
	}
	for _, o := range out {
		if o.Refusal != "" {
			continue
		}
		if len(o.Signature) != sigLen {
			panic("record: signature of another length")
		}
		b = append(b, o.Signature...)
	}
	return b
}

// DecodeResult reads what EncodeResult wrote and nothing else. The signatures
// alias b.
func DecodeResult(b []byte) (sigLen int, out []Outcome, err error) {
	d := reader{b: b}
	n := d.head(resultVersion)
	sigLen = d.num(512)
	refused := d.num(n)
	if d.bad || n == 0 || n > MaxBatchSize || sigLen == 0 || len(b) > MaxSegmentLen {
		return 0, nil, fmt.Errorf("%w: result header", ErrSegment)
	}
	out = make([]Outcome, n)
	last := -1
	for range refused {
		i := d.num(n - 1)
		code := d.bytes(maxRefusalLen)
		if d.bad || i <= last || len(code) == 0 {
			return 0, nil, fmt.Errorf("%w: result refusals", ErrSegment)
		}
		out[i].Refusal, last = string(code), i
	}
	if len(d.b) != (n-refused)*sigLen {
		return 0, nil, fmt.Errorf("%w: result signatures", ErrSegment)
	}
	for i := range out {
		if out[i].Refusal == "" {
			out[i].Signature, d.b = d.b[:sigLen:sigLen], d.b[sigLen:]
		}
	}
	return sigLen, out, nil
}

// reader takes minimal varints and length-prefixed bytes off b. After the first
// error it is bad and yields zeros.
type reader struct {
	b   []byte
	bad bool
}

func (d *reader) head(version byte) int {
	if len(d.b) == 0 || d.b[0] != version {
		d.bad = true
		return 0
	}
	d.b = d.b[1:]
	return d.num(MaxBatchSize)
}

func (d *reader) num(limit int) int {
	v, n := binary.Uvarint(d.b)
	if d.bad || n <= 0 || limit < 0 || v > uint64(limit) || n > 1 && d.b[n-1] == 0 {
		d.bad = true
		return 0
	}
	d.b = d.b[n:]
	return int(v) //nolint:gosec // at most limit
}

func (d *reader) bytes(limit int) []byte {
	n := d.num(limit)
	if d.bad || n > len(d.b) {
		d.bad = true
		return nil
	}
	v := d.b[:n:n]
	d.b = d.b[n:]
	return v
}
