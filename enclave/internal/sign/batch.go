package sign

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/keyhold/keyhold/enclave/internal/keyring"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

// checkEvery is the number of records between two looks at deadline and fence:
// some milliseconds of ECDSA, a tenth of a second of RSA.
const checkEvery = 64

const useDomain = "keyhold-fence-use-v1\x00"

// batch is a request that may be signed as far as its form, key and policy go.
type batch struct {
	request *wire.Sign
	key     *keyring.Key
	signer  *keyring.Signer
	records []record.Record
	refuse  []bool // by record: it took an enclave down. Nil where none did
	root    [32]byte
}

// newBatch checks the form of m and finds its key.
func newBatch(o *opened, m *wire.Sign) (*batch, error) {
	imp, _, err := m.BatchID.Split()
	if err != nil || imp != m.ImportID || m.BatchFence == 0 || m.KeyFence == 0 || m.Probe < wire.NoProbe {
		return nil, refusal.BadMessage
	}
	kind, err := record.ParseKind(string(m.Kind))
	if err != nil {
		return nil, refusal.BadMessage
	}
	b := &batch{request: m}
	if b.key, err = o.ring.Key(m.KeyID); err != nil {
		return nil, fmt.Errorf("find key: %w", err)
	}
	if b.signer, err = b.key.NewSigner(kind); err != nil {
		return nil, fmt.Errorf("set up signer: %w", err)
	}
	if b.records, err = record.DecodePayload(m.Payload); err != nil {
		return nil, refusal.PayloadInvalid
	}
	// The result would not fit its item of the table.
	if len(b.records)*b.key.Algorithm().SignatureLen() > record.MaxSegmentLen-resultHead {
		return nil, refusal.TooLarge
	}
	if m.Probe >= len(b.records) {
		return nil, refusal.BadMessage
	}
	if b.refuse, err = places(m.Refuse, len(b.records)); err != nil {
		return nil, err
	}
	b.root = payloadRoot(kind, b.records)
	return b, nil
}

// resultHead is more than what a result segment has beside signatures.
const resultHead = 32

// places turns ascending indices into a set over n records.
func places(indices []uint32, n int) ([]bool, error) {
	if len(indices) == 0 {
		return nil, nil
	}
	set := make([]bool, n)
	last := int64(-1)
	for _, i := range indices {
		if int64(i) <= last || int64(i) >= int64(n) {
			return nil, refusal.BadMessage
		}
		set[i], last = true, int64(i)
	}
	return set, nil
}

// use is the identity of the batch under its key fence. Records to refuse are no
// part of it: they are found by probing under the same fence.
func (b *batch) use() use {
	m := b.request
	buf := append(make([]byte, 0, 256), useDomain...)
	buf = binary.BigEndian.AppendUint64(buf, uint64(m.BatchFence))
	buf = append(buf, b.root[:]...) // covers kind, ids and payloads
	buf = append(buf, m.BatchID...) // last, the only part of no fixed length
	return sha256.Sum256(buf)
}

// signAll signs every record that may be signed. A bad record is refused alone;
// a signature that does not verify ends the batch, since it says that this
// machine computes wrongly.
func (e *Engine) signAll(b *batch, current func() error) ([]record.Outcome, error) {
	out := make([]record.Outcome, len(b.records))
	for i := range b.records {
		if i%checkEvery == 0 {
			if err := current(); err != nil {
				return nil, err
			}
		}
		if b.refuse != nil && b.refuse[i] {
			out[i].Refusal = string(refusal.EnclaveCrash)
			continue
		}
		o, err := e.signOne(b.signer, b.records[i].Payload)
		if err != nil {
			return nil, err
		}
		out[i] = o
	}
	return out, nil
}

// probe signs one record and drops the outcome.
func (e *Engine) probe(b *batch, i int, current func() error) error {
	if err := current(); err != nil {
		return err
	}
	_, err := e.signOne(b.signer, b.records[i].Payload)
	return err
}

func (e *Engine) signOne(s *keyring.Signer, payload []byte) (record.Outcome, error) {
	if e.beforeRecord != nil {
		e.beforeRecord(payload)
	}
	sig, err := s.Sign(payload)
	if err != nil {
		code := refusal.Of(err)
		if e, ok := refusal.Lookup(code); !ok || e.Class != refusal.Refuse { // not the record's fault
			return record.Outcome{}, fmt.Errorf("sign record: %w", err)
		}
		return record.Outcome{Refusal: string(code)}, nil
	}
	if !e.verify(s, sig) {
		return record.Outcome{}, refusal.VerifyFailed
	}
	return record.Outcome{Signature: sig}, nil
}

// trees are reused: a batch needs two, of 32 bytes a record.
//
//nolint:gochecknoglobals // a pool is shared by nature
var trees = sync.Pool{New: func() any { return receipt.NewTree(512) }}

func withTree(fill func(*receipt.Tree)) [32]byte {
	t, ok := trees.Get().(*receipt.Tree)
	if !ok {
		t = receipt.NewTree(512)
	}
	defer trees.Put(t)
	t.Reset()
	fill(t)
	return t.Root()
}

func payloadRoot(kind record.Kind, rs []record.Record) [32]byte {
	return withTree(func(t *receipt.Tree) {
		for i, r := range rs {
			t.AddPayload(i, kind, r)
		}
	})
}

func resultRoot(out []record.Outcome) [32]byte {
	return withTree(func(t *receipt.Tree) {
		for i, o := range out {
			t.AddOutcome(i, o)
		}
	})
}
