package checker

import (
	"encoding/binary"
	"errors"
	"math"
)

// maxNesting of arrays and maps; the deepest form here has four.
const maxNesting = 8

var errCBOR = errors.New("not the CBOR that is written here")

// tagged is a value with a tag.
type tagged struct {
	tag   uint64
	value any
}

// decodeCBOR reads one value: uint64, int64 (negative), []byte, string, []any, map[any]any, bool, nil or
// tagged. It refuses floats, indefinite lengths, doubled keys and trailing bytes.
func decodeCBOR(b []byte) (any, error) {
	d := cborReader{b: b}
	v := d.value(maxNesting)
	if d.bad || len(d.b) != 0 {
		return nil, errCBOR
	}
	return v, nil
}

type cborReader struct {
	b   []byte
	bad bool
}

func (d *cborReader) fail() any {
	d.bad = true
	return nil
}

func (d *cborReader) take(n uint64) []byte {
	if d.bad || n > uint64(len(d.b)) {
		d.bad = true
		return nil
	}
	v := d.b[:n:n]
	d.b = d.b[n:]
	return v
}

// head reads major type and argument.
func (d *cborReader) head() (major byte, n uint64) {
	first := d.take(1)
	if d.bad {
		return 0, 0
	}
	major, n = first[0]>>5, uint64(first[0]&31)
	if n < 24 {
		return major, n
	}
	if n > 27 {
		d.bad = true
		return 0, 0
	}
	wide := make([]byte, 8)
	width := 1 << (n - 24)
	copy(wide[8-width:], d.take(uint64(width))) //nolint:gosec // 1 to 8
	return major, binary.BigEndian.Uint64(wide)
}

func (d *cborReader) value(depth int) any {
	major, n := d.head()
	if d.bad || depth == 0 {
		return d.fail()
	}
	switch major {
	case 0:
		return n
	case 1:
		if n > math.MaxInt64 {
			return d.fail()
		}
		return -1 - int64(n)
	case 2:
		return d.take(n)
	case 3:
		return string(d.take(n))
	case 4:
		return d.array(n, depth)
	case 5:
		return d.mapping(n, depth)
	case 6:
		return tagged{n, d.value(depth - 1)}
	}
	switch n {
	case 20, 21:
		return n == 21
	case 22:
		return nil
	}
	return d.fail()
}

func (d *cborReader) array(n uint64, depth int) any {
	var out []any
	for ; n > 0 && !d.bad; n-- {
		out = append(out, d.value(depth-1))
	}
	return out
}

func (d *cborReader) mapping(n uint64, depth int) any {
	out := map[any]any{}
	for ; n > 0 && !d.bad; n-- {
		k := d.value(depth - 1)
		switch k.(type) {
		case uint64, int64, string:
		default:
			return d.fail()
		}
		if _, twice := out[k]; twice {
			return d.fail()
		}
		out[k] = d.value(depth - 1)
	}
	return out
}

// fields reads a map with text keys. After the first field of another type it is bad.
type fields struct {
	m   map[any]any
	bad bool
}

func decodeFields(b []byte) (*fields, error) {
	v, err := decodeCBOR(b)
	m, ok := v.(map[any]any)
	if err != nil || !ok {
		return nil, errCBOR
	}
	return &fields{m: m}, nil
}

func field[T any](f *fields, name string) T {
	v, ok := f.m[name].(T)
	if !ok {
		f.bad = true
	}
	return v
}

// cborBytes encodes a byte string, cborText a text: what a COSE signature is made over.
func cborBytes(b []byte) []byte { return append(cborHead(2, len(b)), b...) }
func cborText(s string) []byte  { return append(cborHead(3, len(s)), s...) }

func cborHead(major byte, n int) []byte {
	switch {
	case n < 24:
		return []byte{major<<5 | byte(n)} //nolint:gosec // checked
	case n < 1<<8:
		return []byte{major<<5 | 24, byte(n)}
	case n < 1<<16:
		return binary.BigEndian.AppendUint16([]byte{major<<5 | 25}, uint16(n))
	}
	return binary.BigEndian.AppendUint32([]byte{major<<5 | 26}, uint32(n)) //nolint:gosec // items end at 400 KiB
}
