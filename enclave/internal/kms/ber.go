package kms

// ber reads a BER value whose structure the caller knows in advance. It never
// recurses, so input cannot choose the depth: maxDepth is reached by a caller
// that opens one level more than any structure here has.
//
// The first error sticks: later calls return nothing, and ok reports it once at
// the end.
type ber struct {
	in     []byte
	pos    int
	levels [maxDepth]int // where the open levels end, or indefinite
	depth  int
	failed bool
}

const (
	maxDepth   = 12 // 10 are needed, down to the hash inside MGF1
	indefinite = -1

	tagInteger     = 0x02
	tagOctetString = 0x04
	tagNull        = 0x05
	tagOID         = 0x06
	tagSequence    = 0x30
	tagSet         = 0x31
	tagContext0    = 0x80
	constructed    = 0x20
)

func (r *ber) ok() bool { return !r.failed }

func (r *ber) fail() { r.failed = true }

// end is where reading has to stop: the innermost level of known length.
func (r *ber) end() int {
	for i := r.depth - 1; i >= 0; i-- {
		if r.levels[i] != indefinite {
			return r.levels[i]
		}
	}
	return len(r.in)
}

// header reads the expected tag and a length, indefinite where it is 0x80.
func (r *ber) header(tag byte) int {
	end := r.end()
	if r.failed || end-r.pos < 2 || r.in[r.pos] != tag {
		r.fail()
		return 0
	}
	first := r.in[r.pos+1]
	r.pos += 2
	if first == 0x80 {
		return indefinite
	}
	length := int(first)
	if first > 0x80 {
		n := int(first & 0x7f)
		if n > 2 || end-r.pos < n { // two bytes reach past maxEnvelope
			r.fail()
			return 0
		}
		length = 0
		for _, b := range r.in[r.pos : r.pos+n] {
			length = length<<8 | int(b)
		}
		r.pos += n
		if length < 0x80 || n == 2 && length < 0x100 { // a shorter form exists
			r.fail()
			return 0
		}
	}
	if length > end-r.pos {
		r.fail()
		return 0
	}
	return length
}

// open enters a constructed value of definite or indefinite length.
func (r *ber) open(tag byte) {
	length := r.header(tag)
	if r.failed || tag&constructed == 0 || r.depth == maxDepth {
		r.fail()
		return
	}
	r.levels[r.depth] = indefinite
	if length != indefinite {
		r.levels[r.depth] = r.pos + length
	}
	r.depth++
}

// shut leaves the innermost value, which must have been read to its end.
func (r *ber) shut() {
	if r.failed || r.more() {
		r.fail()
		return
	}
	r.depth--
	if r.levels[r.depth] == indefinite {
		r.pos += 2 // the end-of-contents octets that more saw
	}
}

// more reports whether the innermost value goes on. Running out of input inside
// an indefinite one is an error.
func (r *ber) more() bool {
	if r.failed || r.depth == 0 {
		return false
	}
	if r.levels[r.depth-1] != indefinite {
		return r.pos < r.levels[r.depth-1]
	}
	if r.end()-r.pos < 2 {
		r.fail()
		return false
	}
	return r.in[r.pos] != 0 || r.in[r.pos+1] != 0
}

// next reports whether the innermost value goes on with this tag.
func (r *ber) next(tag byte) bool { return r.more() && r.in[r.pos] == tag }

// primitive returns the content of a value of definite length.
func (r *ber) primitive(tag byte) []byte {
	length := r.header(tag)
	if r.failed || length == indefinite {
		r.fail()
		return nil
	}
	content := r.in[r.pos : r.pos+length]
	r.pos += length
	return content
}

// exactly reads a primitive value and compares its content. Nothing here is secret.
func (r *ber) exactly(tag byte, want string) {
	if string(r.primitive(tag)) != want {
		r.fail()
	}
}
