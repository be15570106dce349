package export

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/keyhold/keyhold/internal/payload"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

// RecordLine is one line of a records export. What does not apply is null; hex
// is without 0x but for addresses. Its form is fixed: tools read it.
type RecordLine struct {
	RecordID          string  `json:"record_id"`
	Kind              string  `json:"kind"`
	Payload           string  `json:"payload"` // standard base64
	Algorithm         *string `json:"algorithm"`
	KeyID             *string `json:"key_id"`
	PublicKey         *string `json:"public_key"` // hex: uncompressed point, 32 bytes for Ed25519, PKIX DER for RSA
	Address           *string `json:"address"`    // EIP-55
	Digest            *string `json:"digest"`     // hex; null where the scheme hashes itself
	Signature         *string `json:"signature"`  // hex
	SignedTransaction *string `json:"signed_transaction"`
	BatchID           string  `json:"batch_id"`
	Index             int     `json:"index"`
	State             string  `json:"state"`
	Refusal           *string `json:"refusal"`
}

// AttemptLine is one entry of BatchLine.Attempts.
type AttemptLine struct {
	Owner    string `json:"owner"`
	KeyFence uint64 `json:"key_fence"`
	End      string `json:"end"` // empty while it goes on
}

// ReceiptLine names a receipt and carries it.
type ReceiptLine struct {
	BootID string `json:"boot_id"`
	Lane   uint32 `json:"lane"`
	Seq    uint64 `json:"seq"`
	Signed string `json:"signed"` // standard base64 of the encoded receipt.Signed
}

// BatchLine is one line of a batches export. Its form is fixed: tools read it.
type BatchLine struct {
	BatchID     string        `json:"batch_id"`
	ImportID    string        `json:"import_id"`
	State       string        `json:"state"`
	KeyID       *string       `json:"key_id"`
	Fence       uint64        `json:"fence"`
	KeyFence    uint64        `json:"key_fence"`
	Used        uint64        `json:"used"`
	UsedBefore  uint64        `json:"used_before"`
	Attempts    []AttemptLine `json:"attempts"`
	RecordCount int           `json:"record_count"`
	Owner       *string       `json:"owner"`
	BootID      *string       `json:"boot_id"`
	ClaimedAt   *string       `json:"claimed_at"` // RFC 3339 with nanoseconds
	CommittedAt *string       `json:"committed_at"`
	Receipt     *ReceiptLine  `json:"receipt"`
}

// Counts says what was written.
type Counts struct {
	Batches, Records, Signed, Refused, Other int
}

// Records writes one line per record of these imports.
func Records(ctx context.Context, s Store, imports []store.Import, w io.Writer) (n Counts, err error) {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	err = Walk(ctx, s, imports, func(it Item) error {
		if it.Problem != nil {
			return it.Problem
		}
		n.Batches++
		for i := range it.Records {
			line, err := recordLine(&it, i)
			if err != nil {
				return err
			}
			n.count(it.State(i))
			if err := enc.Encode(line); err != nil {
				return fmt.Errorf("write the export: %w", err)
			}
		}
		return nil
	})
	return n, err
}

func (n *Counts) count(s record.State) {
	n.Records++
	switch s {
	case record.Signed:
		n.Signed++
	case record.Refused:
		n.Refused++
	case record.Ready, record.Claimed, record.Quarantined:
		n.Other++
	}
}

func recordLine(it *Item, i int) (*RecordLine, error) {
	r := it.Records[i]
	line := &RecordLine{
		RecordID: it.RecordID(i), Kind: string(it.Batch.Kind), Payload: base64.StdEncoding.EncodeToString(r.Payload),
		BatchID: string(it.Batch.ID), Index: i, State: string(it.State(i)),
	}
	if !it.Batch.KeyID.IsZero() {
		line.KeyID = text(it.Batch.KeyID.String())
	}
	if k := it.Key; k != nil {
		line.Algorithm, line.PublicKey, line.Address = text(string(k.Algorithm)), hexText(k.PublicKey), text(k.Address)
	}
	if it.Outcomes == nil {
		return line, nil
	}
	if line.Refusal = text(it.Outcomes[i].Refusal); line.Refusal != nil {
		return line, nil
	}
	line.Signature = hexText(it.Outcomes[i].Signature)
	if it.Key.Algorithm == record.Ed25519 {
		return line, nil
	}
	d, err := payload.Digest(it.Key.Algorithm, it.Batch.Kind, r.Payload)
	if err != nil {
		return nil, fmt.Errorf("digest of record %s: %w", line.RecordID, err)
	}
	line.Digest = hexText(d)
	return line, nil
}

// Batches writes one line per batch of these imports.
func Batches(ctx context.Context, s Store, imports []store.Import, keep func(*store.Batch) bool, w io.Writer) (n int, err error) {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	err = Walk(ctx, s, imports, func(it Item) error {
		if keep != nil && !keep(&it.Batch) {
			return nil
		}
		n++
		if err := enc.Encode(batchLine(&it)); err != nil {
			return fmt.Errorf("write the export: %w", err)
		}
		return nil
	})
	return n, err
}

func batchLine(it *Item) *BatchLine {
	b := &it.Batch
	line := &BatchLine{
		BatchID: string(b.ID), ImportID: string(b.ImportID), State: string(b.State),
		Fence: uint64(b.Fence), KeyFence: uint64(b.KeyFence), Used: b.Used, UsedBefore: b.UsedBefore,
		Attempts: []AttemptLine{}, RecordCount: b.Count, Owner: text(b.Owner),
		ClaimedAt: stamp(b.ClaimedAt), CommittedAt: stamp(b.CommittedAt),
	}
	if !b.KeyID.IsZero() {
		line.KeyID = text(b.KeyID.String())
	}
	if !b.BootID.IsZero() {
		line.BootID = text(b.BootID.String())
	}
	for _, a := range b.History {
		line.Attempts = append(line.Attempts, AttemptLine{Owner: a.Owner, KeyFence: uint64(a.KeyFence), End: a.End})
	}
	if b.Receipt.Seq != 0 {
		line.Receipt = &ReceiptLine{
			BootID: b.Receipt.BootID.String(), Lane: b.Receipt.Lane, Seq: b.Receipt.Seq,
			Signed: base64.StdEncoding.EncodeToString(it.Receipt),
		}
	}
	return line
}

func text(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

func hexText(b []byte) *string { return text(hex.EncodeToString(b)) }

// stampForm is RFC 3339 with all nine digits, so that texts sort as times do.
const stampForm = "2006-01-02T15:04:05.000000000Z07:00"

func stamp(t time.Time) *string {
	if t.IsZero() {
		return nil
	}
	return text(t.UTC().Format(stampForm))
}
