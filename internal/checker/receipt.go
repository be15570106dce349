package checker

import (
	"cmp"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// place is where a receipt stands.
type place struct {
	boot string // 32 bytes
	lane uint32
	seq  uint64
}

func (p place) String() string { return fmt.Sprintf("%x lane %d number %d", p.boot[:4], p.lane, p.seq) }

// receipt is one that its boot's key has signed.
type receipt struct {
	subject, batch, imported string
	key, algorithm           string
	public                   []byte
	batchFence, keyFence     uint64
	count                    uint64
	payloadRoot, resultRoot  [32]byte
	timeMS                   int64
	prev                     [32]byte
	hash                     [32]byte // the next one's prev
}

// openReceipt verifies a stored receipt under the key of its boot.
func openReceipt(at place, signed []byte, key ed25519.PublicKey) (*receipt, error) {
	outer, err := decodeFields(signed)
	if err != nil {
		return nil, err
	}
	body, signature := field[[]byte](outer, "body"), field[[]byte](outer, "signature")
	if outer.bad || len(outer.m) != 2 || !ed25519.Verify(key, body, signature) {
		return nil, errors.New("its signature is not valid")
	}
	f, err := decodeFields(body)
	if err != nil {
		return nil, err
	}
	root := func(name string) (r [32]byte) {
		b := field[[]byte](f, name)
		f.bad = f.bad || len(b) != len(r)
		copy(r[:], b)
		return r
	}
	r := &receipt{
		subject: field[string](f, "subject"), batch: field[string](f, "batch_id"), imported: field[string](f, "import_id"),
		key: string(field[[]byte](f, "key_id")), algorithm: field[string](f, "algorithm"), public: field[[]byte](f, "public_key"),
		batchFence: field[uint64](f, "batch_fence"), keyFence: field[uint64](f, "key_fence"), count: field[uint64](f, "count"),
		payloadRoot: root("payload_root"), resultRoot: root("result_root"), prev: root("prev"),
		timeMS: int64(field[uint64](f, "time_ms")), //nolint:gosec // milliseconds since 1970
		hash:   sha256.Sum256(append([]byte("keyhold-receipt-chain-v1\x00"), signed...)),
	}
	says := place{string(field[[]byte](f, "boot_id")), uint32(field[uint64](f, "lane")), field[uint64](f, "seq")} //nolint:gosec // compared below
	if f.bad || field[string](f, "domain") != "keyhold-receipt-v1" || says != at {
		return nil, errors.New("it is another receipt than the one that belongs here")
	}
	if r.subject == "batch" && r.key != keyID(r.algorithm, r.public) {
		return nil, errors.New("its key id is not that of its public key")
	}
	return r, nil
}

// isOf reports whether r is about that batch, as it was claimed last.
func (r *receipt) isOf(c *control) bool {
	return r.subject == "batch" && r.batch == c.id && r.imported == c.imported && r.key == c.key && r.count == c.count &&
		r.batchFence == c.fence && r.keyFence == c.keyFence && c.receipt.boot == c.boot
}

func keyID(algorithm string, public []byte) string {
	sum := sha256.Sum256(append([]byte("keyhold-key-id-v1\x00"+algorithm+"\x00"), public...))
	return string(sum[:])
}

// parseLane splits the key of the receipts table.
func parseLane(b []byte, seq uint64) (place, error) {
	if len(b) != 36 || seq == 0 {
		return place{}, errors.New("a receipt stands at no place")
	}
	return place{string(b[:32]), binary.BigEndian.Uint32(b[32:]), seq}, nil
}

// checkLanes wants the receipts of each lane without a gap, each naming the one before, and all receipts of
// one batch to name one key and one payload.
func checkLanes(receipts map[place]*receipt, found func(string, ...any)) {
	places := make([]place, 0, len(receipts))
	for p := range receipts {
		places = append(places, p)
	}
	slices.SortFunc(places, func(a, b place) int {
		return cmp.Or(cmp.Compare(a.boot, b.boot), cmp.Compare(a.lane, b.lane), cmp.Compare(a.seq, b.seq))
	})
	first := map[string]*receipt{}
	for i, p := range places {
		r := receipts[p]
		var prev [32]byte
		if i > 0 && places[i-1] == (place{p.boot, p.lane, p.seq - 1}) {
			prev = receipts[places[i-1]].hash
		} else if p.seq != 1 {
			found("H3: receipt %s: the one before it is missing", p)
			continue
		}
		if r.prev != prev {
			found("H3: receipt %s: it does not follow the one before it", p)
		}
		if r.subject != "batch" {
			continue
		}
		other, again := first[r.batch]
		if again && (other.key != r.key || other.payloadRoot != r.payloadRoot) {
			found("H3: batch %s: two receipts name two keys or payloads", r.batch)
		}
		first[r.batch] = r
	}
}
