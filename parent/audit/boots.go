package audit

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

// Limits of an enclave. It hands out the lowest lane that is free, so below a
// lane with receipts there are at most as many without as it takes connections.
const (
	maxConnections = 450
	maxLanes       = 2 * maxConnections
	lanesAtOnce    = 30 // read side by side
)

// boot is a verified boot. public is nil where it does not verify.
type boot struct {
	public    ed25519.PublicKey
	statement *receipt.Statement
	config    *config.Config // of Options.Configs, nil where there are none
}

// walkBoots verifies every boot that it has not seen yet.
func (a *auditor) walkBoots(ctx context.Context) error {
	all, err := a.s.Boots(ctx)
	if err != nil {
		return fmt.Errorf("list the boots: %w", err)
	}
	for _, b := range all {
		if a.boots[b.ID] != nil {
			continue
		}
		v, err := verifyBoot(b, a.o.Root, a.o.Images)
		if err == nil && len(a.configs) > 0 {
			if v.config = a.configs[v.statement.ConfigHash]; v.config == nil {
				v, err = &boot{}, errors.New("its config is none of the wanted ones")
			}
		}
		a.boots[b.ID] = v
		if err != nil {
			a.problem("boot %s: %v", b.ID, err)
			continue
		}
		a.r.Boots++
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

func (a *auditor) walkLanes(ctx context.Context, id record.BootID) error {
	empty := 0
	for first := uint32(0); first < maxLanes && empty <= maxConnections; first += lanesAtOnce {
		var n [lanesAtOnce]int
		g, ctx := errgroup.WithContext(ctx)
		for i := range n {
			g.Go(func() (err error) {
				n[i], err = a.walkLane(ctx, laneOf{id, first + uint32(i)}) //nolint:gosec // below lanesAtOnce
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return err //nolint:wrapcheck // it names the lane
		}
		for _, receipts := range n {
			if empty++; receipts > 0 {
				empty = 0
				a.r.Lanes++
				a.r.Receipts += receipts
			}
		}
	}
	return nil
}

// walkLane checks signature, sequence and chain of one lane from its first
// receipt on, and that no batch was signed as two things.
func (a *auditor) walkLane(ctx context.Context, at laneOf) (n int, err error) {
	b := a.boots[at.boot]
	var seq uint64
	var prev [32]byte
	err = a.s.Receipts(ctx, at.boot, at.lane, 1, func(stored store.Receipt) error {
		n++
		where := fmt.Sprintf("receipt %d of lane %d of boot %s", stored.Ref.Seq, at.lane, at.boot)
		gap := stored.Ref.Seq != seq+1
		if gap { // the chain goes on after it; the gap itself is the finding
			a.problem("%s: the receipts before it are missing from %d on", where, seq+1)
		}
		r, err := receipt.OpenReceipt(b.public, stored.Signed)
		switch {
		case err != nil:
			a.problem("%s: %v", where, err)
		case r.Lane != at.lane || r.Seq != stored.Ref.Seq:
			a.problem("%s: it belongs to another place", where)
		case r.Prev != prev && !gap:
			a.problem("%s: it does not follow the one before it", where)
		case r.Subject == receipt.SubjectBatch:
			a.sameAsBefore(where, r)
		case r.Subject == receipt.SubjectKeys:
			a.add(b, r)
		default:
			a.problem("%s: it is about nothing known", where)
		}
		seq, prev = stored.Ref.Seq, receipt.ChainHash(stored.Signed)
		return nil
	})
	if err != nil {
		return n, fmt.Errorf("read lane %d of boot %s: %w", at.lane, at.boot, err)
	}
	return n, nil
}

// add counts the keys that a receipt tells of.
func (a *auditor) add(b *boot, r *receipt.Receipt) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.made[kindOfKey{b.statement.Fingerprint, r.Algorithm, r.PolicyHash}] += int(r.Count)
}

// sameAsBefore finds two receipts for one batch with another key or payload:
// somebody cheated.
func (a *auditor) sameAsBefore(where string, r *receipt.Receipt) {
	a.mu.Lock()
	was := a.seen[r.BatchID]
	if was == nil {
		a.seen[r.BatchID] = &claimOf{key: r.KeyID, root: r.PayloadRoot}
	}
	a.mu.Unlock()
	if was != nil && (was.key != r.KeyID || was.root != r.PayloadRoot) {
		a.problem("%s: batch %s was signed with two keys or as two payloads", where, r.BatchID)
	}
}
