package receipt_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
)

// frame writes the fields of a leaf as root.go says: each with its length before it.
func frame(fields ...string) []byte {
	var b []byte
	for _, f := range fields {
		b = binary.BigEndian.AppendUint32(b, uint32(len(f)))
		b = append(b, f...)
	}
	return b
}

func payloadLeaf(i int, kind record.Kind, r record.Record) [32]byte {
	b := binary.BigEndian.AppendUint32([]byte("keyhold-payload-v1\x00"), uint32(i))
	return sha256.Sum256(append(b, frame(string(kind), r.ID, string(r.Payload))...))
}

func resultLeaf(i int, o record.Outcome) [32]byte {
	b := binary.BigEndian.AppendUint32([]byte("keyhold-result-v1\x00"), uint32(i))
	return sha256.Sum256(append(b, frame(o.Refusal, string(o.Signature))...))
}

// reference is RFC 6962's recursive definition of the tree, over our node prefix.
func reference(leaves [][32]byte) [32]byte {
	switch len(leaves) {
	case 0:
		return [32]byte{}
	case 1:
		return leaves[0]
	}
	k := 1
	for k*2 < len(leaves) {
		k *= 2
	}
	left, right := reference(leaves[:k]), reference(leaves[k:])
	return sha256.Sum256(append(append([]byte("keyhold-node-v1\x00"), left[:]...), right[:]...))
}

func testRecords(n int) []record.Record {
	rs := make([]record.Record, n)
	for i := range rs {
		rs[i] = record.Record{ID: "r" + strconv.Itoa(i), Payload: bytes.Repeat([]byte{byte(i)}, i%50)}
	}
	return rs
}

func TestRootsAreThoseOfRFC6962sTree(t *testing.T) {
	t.Parallel()
	for _, n := range []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 32, 33, 500, 501} {
		rs, out := testRecords(n), make([]record.Outcome, n)
		var payloads, results, keys [][32]byte
		entries := make([][]byte, n)
		for i, r := range rs {
			out[i] = record.Outcome{Signature: []byte{byte(i), 1}}
			if i%3 == 0 {
				out[i] = record.Outcome{Refusal: "digest_length"}
			}
			entries[i] = r.Payload
			payloads = append(payloads, payloadLeaf(i, record.Message, r))
			results = append(results, resultLeaf(i, out[i]))
			keys = append(keys, sha256.Sum256(append([]byte("keyhold-key-v1\x00"), frame(string(r.Payload))...)))
		}
		if receipt.PayloadRoot(record.Message, rs) != reference(payloads) {
			t.Errorf("payload root of %d records", n)
		}
		if receipt.ResultRoot(out) != reference(results) {
			t.Errorf("result root of %d records", n)
		}
		if receipt.KeysRoot(entries) != reference(keys) {
			t.Errorf("root of %d keys", n)
		}
	}
}

// Computed with Python's hashlib.
func TestTheRootOfThreeRecordsIsThis(t *testing.T) {
	t.Parallel()
	rs := []record.Record{{ID: "a", Payload: []byte("one")}, {Payload: []byte("two")}, {ID: "c"}}
	root := receipt.PayloadRoot(record.Message, rs)
	if diff := cmp.Diff("27e8bd5b67b1d0b22905c80154237c2993183b2981da50e51d24f2862c2cd9c2", hex.EncodeToString(root[:])); diff != "" {
		t.Errorf("payload: %s", diff)
	}
	root = receipt.ResultRoot([]record.Outcome{{Signature: []byte{1, 2}}, {Refusal: "digest_length"}, {Signature: []byte{3}}})
	if diff := cmp.Diff("20edfbabf1b278599a5f0d6c4b629ff3a441d2cac4d6331bd2a7f3cd398db182", hex.EncodeToString(root[:])); diff != "" {
		t.Errorf("result: %s", diff)
	}
}

func TestARootSaysEverythingOfItsRecords(t *testing.T) {
	t.Parallel()
	base := func() []record.Record {
		return []record.Record{{ID: "a", Payload: []byte("bc")}, {ID: "d", Payload: []byte("e")}}
	}
	seen := map[[32]byte]string{receipt.PayloadRoot(record.Message, base()): "unchanged"}
	for name, edit := range map[string]func([]record.Record) []record.Record{
		"other payload": func(rs []record.Record) []record.Record { rs[0].Payload = []byte("bd"); return rs },
		"other id":      func(rs []record.Record) []record.Record { rs[1].ID = "x"; return rs },
		"moved boundary": func(rs []record.Record) []record.Record {
			rs[0] = record.Record{ID: "ab", Payload: []byte("c")}
			return rs
		},
		"other order":     func(rs []record.Record) []record.Record { rs[0], rs[1] = rs[1], rs[0]; return rs },
		"one fewer":       func(rs []record.Record) []record.Record { return rs[:1] },
		"last one twice":  func(rs []record.Record) []record.Record { return append(rs, rs[1]) },
		"one more, empty": func(rs []record.Record) []record.Record { return append(rs, record.Record{}) },
	} {
		root := receipt.PayloadRoot(record.Message, edit(base()))
		if other, ok := seen[root]; ok {
			t.Errorf("%s has the root of: %s", name, other)
		}
		seen[root] = name
	}
	if _, ok := seen[receipt.PayloadRoot(record.Raw, base())]; ok {
		t.Error("the kind is not in the root")
	}
	refusal := receipt.ResultRoot([]record.Outcome{{Refusal: "ab"}})
	if refusal == receipt.ResultRoot([]record.Outcome{{Signature: []byte("ab")}}) {
		t.Error("a refusal reads as a signature")
	}
}

func TestATreeUsedAgainGivesWhatANewOneGives(t *testing.T) {
	t.Parallel()
	used := receipt.NewTree(0)
	for _, n := range []int{7, 500, 0, 1, 33} {
		used.Reset()
		for i, r := range testRecords(n) {
			used.AddPayload(i, record.Raw, r)
		}
		if used.Root() != receipt.PayloadRoot(record.Raw, testRecords(n)) {
			t.Errorf("%d records: another root", n)
		}
	}
	used.AddKey([]byte("left over"))
	used.Reset()
	if used.Root() != ([32]byte{}) {
		t.Error("Reset left something behind")
	}
}

func BenchmarkPayloadRoot(b *testing.B) {
	rs := make([]record.Record, 500)
	for i := range rs {
		rs[i].Payload = make([]byte, 100)
	}
	tree := receipt.NewTree(len(rs))
	b.ReportAllocs()
	for b.Loop() {
		for i, r := range rs {
			tree.AddPayload(i, record.Message, r)
		}
		tree.Root()
	}
}
