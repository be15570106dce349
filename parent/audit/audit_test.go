package audit_test

import (
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/audit"
	"github.com/keyhold/keyhold/parent/export"
	"github.com/keyhold/keyhold/parent/store"
)

// honest runs the audit of an undisturbed world, which must find nothing.
func honest(t *testing.T, w *world) audit.Report {
	t.Helper()
	r, err := audit.Run(t.Context(), w.tables, w.opt)
	if err != nil {
		t.Fatalf("%v: %v", err, r.Findings)
	}
	return r
}

// found checks that the audit ends with receipt_invalid and a finding that holds
// each of those texts.
func found(t *testing.T, w *world, what string, texts ...string) {
	t.Helper()
	r, err := audit.Run(t.Context(), w.tables, w.opt)
	if !errors.Is(err, refusal.ReceiptInvalid) || refusal.Exit(err) != 1 || r.Problems == 0 {
		t.Errorf("%s was not found: %v, %+v", what, err, r)
		return
	}
	for _, f := range r.Findings {
		if strings.ContainsFunc(f, func(c rune) bool { return c < ' ' || c > '~' }) {
			t.Errorf("%s: the finding holds what it should not: %q", what, f)
		}
	}
	for _, text := range texts {
		if !slices.ContainsFunc(r.Findings, func(f string) bool { return strings.Contains(f, text) }) {
			t.Errorf("%s: no finding says %q: %q", what, text, r.Findings)
		}
	}
}

func batch(id record.ImportID, n int) record.BatchID { return record.MakeBatchID(id, n) }

func TestAnUndisturbedRunIsSound(t *testing.T) {
	w := of(t, twoBoots)
	r := honest(t, w)
	r.Lanes, r.Receipts = min(r.Lanes, 1), min(r.Receipts, 1) // how many depends on the pipeline
	want := audit.Report{
		Boots: 2, Lanes: 1, Receipts: 1, Keys: 4, Batches: 8, Records: 16, Signed: 12, Refused: 4,
		Verified: 12, Proved: 12, Findings: []string{},
	}
	if diff := cmp.Diff(want, r); diff != "" {
		t.Error(diff)
	}
	for id := range w.tables.batches {
		none := strings.HasPrefix(string(id), "denied-")
		if (w.tables.batches[id].Receipt.Seq == 0) != none {
			t.Errorf("%s: the world is not the one that is meant: %+v", id, w.tables.batches[id].Receipt)
		}
	}
}

func TestSignaturesAreVerifiedWithoutReceiptsToo(t *testing.T) {
	w := of(t, twoBoots)
	w.opt = audit.Options{Imports: []record.ImportID{signedImport(1), mixedImport(0)}}
	w.tables.boots, w.tables.receipts = nil, nil
	for id, b := range w.tables.batches {
		b.Receipt = store.ReceiptRef{}
		w.tables.batches[id] = b
	}
	var done int
	var seen []record.BatchID
	w.opt.Progress = func(n int) { done = max(done, n) }
	w.opt.Each = func(it export.Item, sound bool) {
		if !sound {
			t.Errorf("%s is not sound", it.Batch.ID)
		}
		seen = append(seen, it.Batch.ID)
	}
	r := honest(t, w)
	want := audit.Report{Batches: 3, Records: 7, Signed: 6, Refused: 1, Verified: 6, Findings: []string{}}
	if diff := cmp.Diff(want, r); diff != "" {
		t.Error(diff)
	}
	slices.Sort(seen)
	if diff := cmp.Diff([]record.BatchID{batch(mixedImport(0), 0), batch(signedImport(1), 0), batch(signedImport(1), 1)}, seen); diff != "" || done != 7 {
		t.Errorf("progress %d: %s", done, diff)
	}
}

func TestBatchesThatAreNotSignedAreOpen(t *testing.T) {
	w := of(t, oneBoot)
	id := batch(signedImport(0), 1)
	for _, state := range []record.State{record.Ready, record.Claimed, record.Quarantined} {
		w.tables.edit(id, func(b *store.Batch) {
			b.State, b.Refused, b.Receipt, b.CommittedAt = state, 0, store.ReceiptRef{}, time.Time{}
		})
		if r := honest(t, w); r.Open != 2 || r.Signed != 4 || r.Verified != 4 {
			t.Errorf("%s: %+v", state, r)
		}
	}
	for _, state := range []record.State{record.Refused, "DONE", ""} {
		w.tables.edit(id, func(b *store.Batch) { b.State = state })
		found(t, w, "state "+string(state), "batch "+string(id)+": its state")
	}
}

func TestAnAuditThatWouldProveLessIsRefused(t *testing.T) {
	w := of(t, oneBoot)
	w.opt.Images = []attestation.Image{{PCRs: map[int][]byte{0: w.opt.Images[0].PCRs[0]}}}
	if _, err := audit.Run(t.Context(), w.tables, w.opt); !errors.Is(err, refusal.UsageWrong) {
		t.Errorf("images without PCR16: %v", err)
	}
	w = of(t, oneBoot)
	w.opt.Images = nil
	found(t, w, "no wanted image", "boot ")
	w = of(t, oneBoot)
	w.opt.Root = attestation.Root{}
	found(t, w, "no root", "boot ")
	w = of(t, oneBoot)
	w.opt.Root = attestation.AWSRoot()
	found(t, w, "another root", "boot ")
}

func TestAStoreThatFailsIsNoFinding(t *testing.T) {
	away := errors.New("the store is away")
	for _, name := range []string{"Boots", "Keys", "Receipts", "Imports", "Batch", "Payload", "Result", "Key", "Receipt"} {
		w := of(t, oneBoot)
		r, err := audit.Run(t.Context(), &failing{tables: w.tables, call: name, err: away}, w.opt)
		if !errors.Is(err, away) || errors.Is(err, refusal.ReceiptInvalid) || r.Problems != 0 {
			t.Errorf("%s: %v, %+v", name, err, r)
		}
	}
}

func TestEachOfManyProblemsIsCountedAndTheFirstAreNamed(t *testing.T) {
	w := of(t, oneBoot)
	const n = 150
	for i := range n {
		k := store.Key{ID: record.KeyID{byte(i), 1}, Keyring: "test#1", Sealed: []byte{0xa0}}
		w.tables.keys[k.ID] = k
	}
	r, err := audit.Run(t.Context(), w.tables, w.opt)
	if !errors.Is(err, refusal.ReceiptInvalid) || r.Problems != n || len(r.Findings) != 100 || !strings.Contains(err.Error(), "150 problems") {
		t.Errorf("%d problems, %d findings, %v", r.Problems, len(r.Findings), err)
	}
}

func TestAnImportThatIsNotThereCannotBeAudited(t *testing.T) {
	w := of(t, oneBoot)
	w.opt.Imports = []record.ImportID{"none"}
	if _, err := audit.Run(t.Context(), w.tables, w.opt); !errors.Is(err, store.ErrNotFound) {
		t.Error(err)
	}
}

func TestLanesBehindManyEmptyOnesAreWalked(t *testing.T) {
	w := of(t, crowded)
	r := honest(t, w)
	var at lane
	for k, in := range w.tables.receipts {
		if k.number < 40 {
			t.Fatalf("a receipt in lane %d: the world is not crowded", k.number)
		}
		if len(in) > 1 {
			at = k
		}
	}
	if r.Lanes != len(w.tables.receipts) {
		t.Errorf("%d of %d lanes", r.Lanes, len(w.tables.receipts))
	}
	w.tables.receipts[at] = w.tables.receipts[at][1:]
	found(t, w, "a gap in a late lane", "the receipts before it are missing from 1 on")
}

func TestAnAuditOfOneImportLeavesOthersAlone(t *testing.T) {
	w := of(t, twoBoots)
	delete(w.tables.batches, batch(signedImport(0), 0))
	w.opt.Imports = []record.ImportID{signedImport(1)}
	if r := honest(t, w); r.Batches != 2 {
		t.Errorf("%+v", r)
	}
	w.opt.Imports = nil
	found(t, w, "another import's batch", "batch "+string(batch(signedImport(0), 0))+": it is missing")
}

// A shorter count in the import leaves a batch out of the walk, but not out of
// the lanes.
func TestABatchThatTheImportDeniesIsFoundThroughItsReceipt(t *testing.T) {
	w := of(t, oneBoot)
	all := honest(t, w)
	i := slices.IndexFunc(w.tables.imports, func(im store.Import) bool { return im.ID == signedImport(0) })
	w.tables.imports[i].Batches = 1
	if diff := cmp.Diff(all, honest(t, w)); diff != "" {
		t.Error(diff)
	}
	id := batch(signedImport(0), 1)
	w.tables.results[id] = flipped(w.tables.results[id], 60)
	found(t, w, "its result", "batch "+string(id))
	delete(w.tables.batches, id)
	found(t, w, "its absence", "batch "+string(id)+": an enclave signed it, but it is not in the tables")
	w.tables.imports = slices.DeleteFunc(w.tables.imports, func(im store.Import) bool { return im.ID == signedImport(0) })
	maps.DeleteFunc(w.tables.batches, func(_ record.BatchID, b store.Batch) bool { return b.ImportID == signedImport(0) })
	found(t, w, "the import's absence", "batch "+string(id)+": an enclave signed it, but it is not in the tables")
}
