package receipt

import (
	"crypto/sha256"
	"encoding/binary"

	"github.com/keyhold/keyhold/internal/record"
)

// Roots are Merkle trees so that one record can be shown with its receipt and
// log2(n) hashes, without the rest of its batch. Leaves and nodes start with
// domain strings of their own; an odd node goes up unchanged, as in RFC 6962.
const (
	payloadLeaf = "keyhold-payload-v1\x00"
	resultLeaf  = "keyhold-result-v1\x00"
	keyLeaf     = "keyhold-key-v1\x00"
	nodePrefix  = "keyhold-node-v1\x00"
)

// Tree gathers the leaves of one root. It is made for reuse: Reset keeps the
// memory.
type Tree struct {
	leaves [][32]byte
	buf    []byte
}

// NewTree returns an empty tree with room for n leaves.
func NewTree(n int) *Tree { return &Tree{leaves: make([][32]byte, 0, n)} }

// Reset empties t.
func (t *Tree) Reset() { t.leaves = t.leaves[:0] }

// AddPayload adds record i: hash of (index, kind, id, payload).
func (t *Tree) AddPayload(i int, kind record.Kind, r record.Record) {
	b := append(t.buf[:0], payloadLeaf...)
	b = binary.BigEndian.AppendUint32(b, uint32(i)) //nolint:gosec // below record.MaxBatchSize
	b = appendBytes(b, string(kind))
	b = appendBytes(b, r.ID)
	b = appendBytes(b, r.Payload)
	t.add(b)
}

// AddOutcome adds the outcome of record i: hash of (index, refusal, signature).
func (t *Tree) AddOutcome(i int, o record.Outcome) {
	b := append(t.buf[:0], resultLeaf...)
	b = binary.BigEndian.AppendUint32(b, uint32(i)) //nolint:gosec // below record.MaxBatchSize
	b = appendBytes(b, o.Refusal)
	b = appendBytes(b, o.Signature)
	t.add(b)
}

// AddKey adds a created key's encoded sealed entry.
func (t *Tree) AddKey(entry []byte) { t.add(appendBytes(append(t.buf[:0], keyLeaf...), entry)) }

func (t *Tree) add(b []byte) {
	t.buf = b
	t.leaves = append(t.leaves, sha256.Sum256(b))
}

func appendBytes[T ~string | ~[]byte](b []byte, v T) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(v))) //nolint:gosec // a field of a frame, which has at most 1 MiB
	return append(b, v...)
}

// Root returns the root of the leaves so far, zero where there are none. It
// consumes the leaves.
func (t *Tree) Root() [32]byte {
	if len(t.leaves) == 0 {
		return [32]byte{}
	}
	level := t.leaves
	buf := append(t.buf[:0], nodePrefix...)
	for len(level) > 1 {
		n := 0
		for i := 0; i+1 < len(level); i += 2 {
			b := append(append(buf, level[i][:]...), level[i+1][:]...)
			level[n] = sha256.Sum256(b)
			n++
		}
		if len(level)%2 == 1 {
			level[n] = level[len(level)-1]
			n++
		}
		level = level[:n]
	}
	t.buf, t.leaves = buf[:0], t.leaves[:0]
	return level[0]
}

// PayloadRoot of a batch.
func PayloadRoot(kind record.Kind, rs []record.Record) [32]byte {
	t := NewTree(len(rs))
	for i, r := range rs {
		t.AddPayload(i, kind, r)
	}
	return t.Root()
}

// ResultRoot of a batch.
func ResultRoot(out []record.Outcome) [32]byte {
	t := NewTree(len(out))
	for i, o := range out {
		t.AddOutcome(i, o)
	}
	return t.Root()
}

// KeysRoot of created sealed entries.
func KeysRoot(entries [][]byte) [32]byte {
	t := NewTree(len(entries))
	for _, e := range entries {
		t.AddKey(e)
	}
	return t.Root()
}
