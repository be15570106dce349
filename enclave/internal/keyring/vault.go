package keyring

// chunkLen is how much memory for private keys is taken at once, in bytes: 2048
// scalars, or some 50 RSA keys.
const chunkLen = 64 << 10

// span is a place in a vault.
type span struct {
	chunk, offset, length int
}

// vault is memory for private keys: appended to, never moved, erased as a
// whole. A million scalars take 32 MB and 500 pointers.
type vault struct {
	chunks []*[chunkLen]byte
	used   int // of the last chunk
}

// put copies b; the caller clears its own.
func (v *vault) put(b []byte) span {
	if len(v.chunks) == 0 || v.used+len(b) > chunkLen {
		v.chunks, v.used = append(v.chunks, new([chunkLen]byte)), 0
	}
	s := span{len(v.chunks) - 1, v.used, len(b)}
	v.used += copy(v.chunks[s.chunk][v.used:], b)
	return s
}

// get returns the memory itself, which stays where it is.
func (v *vault) get(s span) []byte {
	return v.chunks[s.chunk][s.offset : s.offset+s.length : s.offset+s.length]
}

func (v *vault) erase() {
	for _, c := range v.chunks {
		clear(c[:])
	}
	v.chunks, v.used = nil, 0
}
