package audit

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

// maxLanes is how many lanes a boot can have: the enclave's cap on connections
// stays far below it.
const maxLanes = 1024

// emptyLanes in a row end the search: connections that never signed leave empty
// lanes between others.
const emptyLanes = 32

// boot is a verified boot. public is nil where it does not verify.
type boot struct {
	public    ed25519.PublicKey
	statement *receipt.Statement
}

// walkBoots verifies every boot and the lanes of each.
func (a *auditor) walkBoots(ctx context.Context) error {
	all, err := a.s.Boots(ctx)
	if err != nil {
		return fmt.Errorf("list the boots: %w", err)
	}
	for _, b := range all {
		v, err := verifyBoot(b, a.o.Root, a.o.Images)
		a.boots[b.ID] = v
		if err != nil {
			a.problem("boot %s: %v", b.ID, err)
			continue
		}
		a.r.Boots++
		if err := a.walkLanes(ctx, b.ID, v.public); err != nil {
			return err
		}
	}
	return nil
}

// verifyBoot checks a boot document at its own time against the root and the
// wanted images, and the statement against the document.
func verifyBoot(b store.Boot, root attestation.Root, images []attestation.Image) (*boot, error) {
	none := &boot{}
	rec, err := attestation.VerifyRecorded(b.Document, attestation.RecordedPolicy{Root: root, Images: images})
	if err != nil {
		return none, fmt.Errorf("its document: %w", err)
	}
	doc, err := rec.Document()
	if err != nil {
		return none, fmt.Errorf("its document: %w", err)
	}
	st, err := receipt.CheckStatement(b.Statement, doc.PublicKey, doc.UserData)
	if err != nil {
		return none, fmt.Errorf("its statement: %w", err)
	}
	if st.BootID != b.ID {
		return none, errors.New("its document and statement are of another boot")
	}
	return &boot{public: doc.PublicKey, statement: st}, nil
}

func (a *auditor) walkLanes(ctx context.Context, id record.BootID, public ed25519.PublicKey) error {
	empty := 0
	for lane := uint32(0); lane < maxLanes && empty < emptyLanes; lane++ {
		n, err := a.walkLane(ctx, id, lane, public)
		if err != nil {
			return err
		}
		if empty++; n > 0 {
			empty = 0
			a.r.Lanes++
			a.r.Receipts += n
		}
	}
	return nil
}

// walkLane checks signature, sequence and chain of one lane from its first
// receipt on, and that no batch was signed as two things.
func (a *auditor) walkLane(ctx context.Context, id record.BootID, lane uint32, public ed25519.PublicKey) (n int, err error) {
	var seq uint64
	var prev [32]byte
	err = a.s.Receipts(ctx, id, lane, 1, func(stored store.Receipt) error {
		n++
		where := fmt.Sprintf("receipt %d of lane %d of boot %s", stored.Ref.Seq, lane, id)
		if stored.Ref.Seq != seq+1 {
			a.problem("%s: the receipts before it are missing from %d on", where, seq+1)
			prev = [32]byte{} // the chain goes on after the gap; the gap itself is the finding
		}
		r, err := receipt.OpenReceipt(public, stored.Signed)
		switch {
		case err != nil:
			a.problem("%s: %v", where, err)
		case r.Lane != lane || r.Seq != stored.Ref.Seq:
			a.problem("%s: it belongs to another place", where)
		case r.Prev != prev && stored.Ref.Seq == seq+1:
			a.problem("%s: it does not follow the one before it", where)
		case r.Subject == receipt.SubjectBatch:
			a.sameAsBefore(where, r)
		}
		seq, prev = stored.Ref.Seq, receipt.ChainHash(stored.Signed)
		return nil
	})
	if err != nil {
		return n, fmt.Errorf("read lane %d of boot %s: %w", lane, id, err)
	}
	return n, nil
}

// sameAsBefore finds two receipts for one batch with another key or payload:
// somebody cheated.
func (a *auditor) sameAsBefore(where string, r *receipt.Receipt) {
	now := claimOf{key: r.KeyID, root: r.PayloadRoot}
	was, ok := a.seen[r.BatchID]
	if ok && was != now {
		a.problem("%s: batch %s was signed with two keys or as two payloads", where, r.BatchID)
	}
	a.seen[r.BatchID] = now
}
