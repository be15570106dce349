package sim_test

import (
	"github.com/keyhold/keyhold/internal/payload"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/parent/store"
)

// atTheEnd reads the tables once nothing fails any more and time went by.
func (j *judge) atTheEnd() {
	j.mu.Lock()
	defer j.mu.Unlock()
	seen := map[string]int{}
	for _, b := range j.w.batches() {
		if b.State != record.Signed {
			j.failLocked("G5", "%s is still %s: attempts %d, %v", b.ID, b.State, b.Attempts, b.History)
			continue
		}
		j.result(&b, seen)
		if j.w.plan.calm && b.Attempts != 1 {
			j.failLocked("answers", "%s took %d attempts where only answers were lost: %v", b.ID, b.Attempts, b.History)
		}
	}
	j.everyRecordOnce(seen)
	for i := range j.w.plan.keys {
		l, err := j.w.tables.Lease(j.w.ctx, j.w.keys.public[i].KeyID)
		if err != nil || !l.Idle() {
			j.failLocked("G6", "key %d is held for %s at the end", i, l.BatchID)
		}
	}
}

func (j *judge) everyRecordOnce(seen map[string]int) {
	for imp, n := range map[string]int{freeImport: j.w.plan.batches, pinnedImport: j.w.plan.pinned} {
		for i := range n * j.w.plan.batchSize {
			if p := j.w.plan.payload(imp, i); seen[p] != 1 {
				j.failLocked("G1", "%q is in %d results", p, seen[p])
			}
		}
	}
}

// result judges the outcomes of one batch.
func (j *judge) result(b *store.Batch, seen map[string]int) {
	raw, err := j.w.tables.Result(j.w.ctx, b.ID)
	if err != nil || string(raw) != string(j.results[b.ID]) {
		j.failLocked("G1", "the result of %s is not the one that was committed first", b.ID)
		return
	}
	segment, _ := j.w.tables.Payload(j.w.ctx, b.ID)
	rs, err := record.DecodePayload(segment)
	_, out, bad := record.DecodeResult(raw)
	if err != nil || bad != nil || len(out) != len(rs) {
		j.failLocked("G1", "%s has %d outcomes for %d records", b.ID, len(out), len(rs))
		return
	}
	for i, o := range out {
		text := string(rs[i].Payload)
		seen[text]++
		switch {
		case isPoison(text):
			if o.Refusal != string(refusal.EnclaveCrash) {
				j.failLocked("G6", "%q of %s kills enclaves and is not refused for it: %q", text, b.ID, o.Refusal)
			}
		case o.Refusal == string(refusal.EnclaveCrash) && j.excused(b.ID, i):
		case o.Refusal != "":
			j.failLocked("G6", "%q of %s is refused: %s", text, b.ID, o.Refusal)
		default:
			if err := payload.Verify(record.Ed25519, j.publicKey(b.KeyID).PublicKey, record.Message, rs[i].Payload, o.Signature); err != nil {
				j.failLocked("G1", "%q of %s: %v", text, b.ID, err)
			}
		}
	}
}

// excused: the record was being tried alone when its enclave died of something
// else, or when the connection was cut and the enclave died before the parent was
// back (ADR 5: it is blamed, and says so).
func (j *judge) excused(id record.BatchID, index int) bool {
	for _, p := range j.probes {
		if p.batch == id && p.index == index && !p.over && p.boot < j.boots[p.enclave] {
			return true
		}
	}
	return false
}

func (j *judge) publicKey(id record.KeyID) sealed.Public {
	for _, k := range j.w.keys.public {
		if k.KeyID == id {
			return k
		}
	}
	return sealed.Public{}
}
