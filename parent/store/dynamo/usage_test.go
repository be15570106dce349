package dynamo_test

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/dynamo"
)

const (
	perBatch    = 500
	maxPerBatch = 0.17 * perBatch // write units for claim, receipt and commit, indexes included
)

func TestClaimReceiptAndCommitStayWithinTheirWriteUnits(t *testing.T) {
	var meter dynamo.Meter
	s := newStore(t, dynamo.Options{Observe: meter.Observe})
	const batches = 20
	fill(t, s, batches, batches)
	before := meter.Totals()
	outcomes := make([]record.Outcome, perBatch)
	for i := range outcomes {
		outcomes[i].Signature = bytes.Repeat([]byte{0xa5}, record.Secp256k1.SignatureLen())
	}
	result := record.EncodeResult(record.Secp256k1.SignatureLen(), outcomes)
	for n := range batches {
		b := must[store.Batch](t)(s.Claim(t.Context(), claimOf(n)))
		ref := store.ReceiptRef{BootID: b.BootID, Lane: 1, Seq: uint64(n + 1)}
		noError(t, s.PutReceipt(t.Context(), store.Receipt{Ref: ref, Signed: make([]byte, 900)}))
		noError(t, s.Commit(t.Context(), store.Commit{Batch: b, Result: result, Receipt: ref, Now: b.ClaimedAt}))
	}
	sum := 0.0
	for _, operation := range []string{"claim batch", "put receipt", "commit batch"} {
		units := (meter.Totals()[operation].Write - before[operation].Write) / batches
		t.Logf("%s: %v write units", operation, units)
		if units == 0 {
			t.Errorf("%s: nothing was measured", operation)
		}
		sum += units
	}
	t.Logf("%v write units a batch, %.4f a record", sum, sum/perBatch)
	if sum > maxPerBatch {
		t.Errorf("%v write units a batch, want at most %v", sum, maxPerBatch)
	}
}

// The longest names that the formats allow, and as long a history as is kept.
func TestControlItemsAndLeasesStaySmall(t *testing.T) {
	id := record.ImportID(bytes.Repeat([]byte("i"), 64))
	b := store.Batch{
		ID: record.MakeBatchID(id, 1_234_567_890), ImportID: id, State: record.Quarantined,
		Pool: string(bytes.Repeat([]byte("p"), 64)), Kind: record.Message,
		KeyID: record.KeyID{1}, Pinned: true, Fence: 1 << 40, KeyFence: 1 << 40,
		Owner: fmt.Sprintf("%032d", 1), ClaimID: fmt.Sprintf("%032d", 2), BootID: record.BootID{1},
		Lease: 10e9, Attempts: 5, Count: 5000, Refused: 5000, PayloadRoot: [32]byte{1},
		Used: 1 << 60, UsedBefore: 1<<60 - 1, VisibleAt: start, ClaimedAt: start, CommittedAt: start,
		Receipt: store.ReceiptRef{BootID: record.BootID{2}, Lane: 1 << 31, Seq: 1 << 60},
		Crashed: []uint32{1001, 2002, 3003, 4004, 4999},
	}
	for range store.KeptAttempts {
		b.History = append(b.History, store.Attempt{Owner: b.Owner, KeyFence: b.KeyFence, End: "ticket_expired_"})
	}
	if n := dynamo.TestingOnlyBatchSize(b); n >= 1024 {
		t.Errorf("the largest control item has %d bytes, want less than 1024", n)
	} else {
		t.Logf("largest control item: %d bytes", n)
	}
	b.ID, b.Pool = record.MakeBatchID("import-2026-11-20", 1), "default"
	if n := dynamo.TestingOnlyLeaseSize(b.Taken()); n > 200 {
		t.Errorf("a held lease has %d bytes, want at most 200", n)
	} else {
		t.Logf("held lease: %d bytes", n)
	}
}
