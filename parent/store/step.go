package store

import (
	"bytes"
	"slices"
	"time"

	"github.com/keyhold/keyhold/internal/record"
)

// This file holds what each write makes of a batch, and how a write is
// recognised that was made before and whose answer was lost. The functions are
// pure and every implementation uses them, so that none can differ.

// Words of Attempt.End that are no refusal codes.
const (
	EndLost   = "lost"   // taken over
	EndSigned = "signed" // committed
)

// Clone returns a copy of b that shares nothing with it. Empty lists are nil.
func (b Batch) Clone() Batch {
	b.History = append([]Attempt(nil), b.History...)
	b.Crashed = append([]uint32(nil), b.Crashed...)
	return b
}

// Shard is the shard of the ready index that b is in, and whether it is in one.
func (b *Batch) Shard() (int, bool) {
	switch b.State {
	case record.Ready, record.Claimed:
		return ReadyShard(b.ID), true
	case record.Quarantined:
		return QuarantinedShard, true
	case record.Signed, record.Refused:
	}
	return 0, false
}

// Fits reports whether a batch as it is now is the one that c has seen and may
// be claimed with c's key.
func (c *Claim) Fits(now *Batch) bool {
	return now.Fence == c.Batch.Fence && now.State == c.Batch.State &&
		(now.State == record.Ready || now.State == record.Claimed) &&
		(now.KeyID.IsZero() || now.KeyID == c.KeyID) &&
		slices.Equal(now.Crashed, c.Batch.Crashed)
}

// FitsKey reports whether a lease as it is now is the one that c may take.
func (c *Claim) FitsKey(now *Lease) bool {
	if now.Fence != c.KeySeen || now.Pool != c.Batch.Pool {
		return false
	}
	if c.TakeOver {
		return !now.Idle() && now.BatchID == c.Batch.ID
	}
	return now.Idle()
}

// Made reports whether a batch as it is now is held under c.
func (c *Claim) Made(now *Batch) bool {
	return now.State == record.Claimed && now.Fence == c.Batch.Fence+1 &&
		now.ClaimID == c.ClaimID && now.KeyID == c.KeyID
}

// Claimed is the batch under c, where its key had the stamp usedBefore.
func (c *Claim) Claimed(usedBefore uint64) Batch {
	b := c.Batch.Clone()
	if n := len(b.History); n > 0 && b.State == record.Claimed {
		b.History[n-1].End = EndLost
	}
	b.State = record.Claimed
	b.Fence++
	b.KeyID, b.KeyFence = c.KeyID, c.KeySeen+1
	b.Owner, b.ClaimID, b.BootID, b.Lease = c.Owner, c.ClaimID, c.BootID, c.Lease
	b.Attempts++
	b.History = append(b.History, Attempt{Owner: c.Owner, KeyFence: b.KeyFence})
	b.History = slices.Clone(b.History[max(0, len(b.History)-KeptAttempts):])
	b.UsedBefore, b.Used = usedBefore, max(c.Used, usedBefore)
	b.ClaimedAt, b.VisibleAt = c.Now, c.Next
	return b
}

// Taken is the lease of c's key once b was claimed with it.
func (b *Batch) Taken() Lease {
	return Lease{
		KeyID: b.KeyID, Pool: b.Pool, Fence: b.KeyFence, Owner: b.Owner,
		BatchID: b.ID, BootID: b.BootID, Lease: b.Lease, Used: b.Used,
	}
}

// Holds reports whether a batch as it is now is held under b's claim.
func (b *Batch) Holds(now *Batch) bool {
	return now.State == record.Claimed && b.claimOf(now) &&
		now.KeyFence == b.KeyFence && now.KeyID == b.KeyID
}

// claimOf reports whether b's claim is the newest of a batch, whatever became of it.
func (b *Batch) claimOf(now *Batch) bool {
	return now.Fence == b.Fence && now.ClaimID == b.ClaimID
}

// HoldsKey reports whether a lease as it is now is held under b's claim.
func (b *Batch) HoldsKey(now *Lease) bool {
	return !now.Idle() && now.Fence == b.KeyFence && now.BatchID == b.ID
}

// Committed is the batch once c is stored.
func (c *Commit) Committed() Batch {
	b := c.Batch.Clone()
	b.end(EndSigned)
	b.State = record.Signed
	b.Refused, b.Receipt = c.Refused, c.Receipt
	b.CommittedAt, b.VisibleAt = c.Now, time.Time{}
	return b
}

// Made reports whether a batch as it is now was signed by c; its result has to
// be compared too.
func (c *Commit) Made(now *Batch) bool {
	return now.State == record.Signed && c.Batch.claimOf(now) &&
		now.Refused == c.Refused && now.Receipt == c.Receipt
}

// Released is the batch once it was given up as e says. Its key is forgotten
// only where no claim before sent anything either: a batch that an enclave may
// have signed stays with that key, or two receipts would name two.
func (b *Batch) Released(e End) Batch {
	r := b.Clone()
	earlier := max(0, len(r.History)-1)
	if e.Attempt {
		r.end(e.Reason)
	} else {
		r.Attempts = max(0, r.Attempts-1)
		r.History = append([]Attempt(nil), r.History[:earlier]...)
	}
	if !e.KeepKey && !r.Pinned && earlier == 0 {
		r.KeyID = record.KeyID{}
	}
	r.State, r.VisibleAt = e.State, e.Now
	return r
}

// ReleasedAs reports whether a batch as it is now was given up by b's claim as
// e says. An operator may have put it back from quarantine since.
func (b *Batch) ReleasedAs(e End, now *Batch) bool {
	requeued := e.State == record.Quarantined && now.State == record.Ready && now.Attempts == 0
	return b.claimOf(now) && (now.State == e.State || requeued)
}

func (b *Batch) end(how string) {
	if n := len(b.History); n > 0 {
		b.History[n-1].End = how
	}
}

// Requeued is a quarantined batch that an operator put back.
func (b *Batch) Requeued(now time.Time) Batch {
	r := b.Clone()
	r.State, r.Attempts, r.Crashed, r.VisibleAt = record.Ready, 0, nil, now
	return r
}

// RequeuedAt reports whether b was put back at that moment and has not moved since.
func (b *Batch) RequeuedAt(now time.Time) bool {
	return b.State == record.Ready && b.Fence > 0 && b.Attempts == 0 && b.VisibleAt.Equal(now)
}

// Imported is the control item that an import writes of b: READY and never claimed.
func (b *Batch) Imported() Batch {
	return Batch{
		ID: b.ID, ImportID: b.ImportID, State: record.Ready, Pool: b.Pool, Kind: b.Kind,
		KeyID: b.KeyID, Pinned: b.Pinned, Count: b.Count, PayloadRoot: b.PayloadRoot, VisibleAt: b.VisibleAt,
	}
}

// SameImported reports whether two batches came from the same input, whatever
// became of them since.
func (b *Batch) SameImported(o *Batch) bool {
	same := b.ID == o.ID && b.ImportID == o.ImportID && b.PayloadRoot == o.PayloadRoot &&
		b.Pool == o.Pool && b.Kind == o.Kind && b.Pinned == o.Pinned
	return same && (!b.Pinned || b.KeyID == o.KeyID)
}

// Idled is the lease once its holder gave it up.
func (l *Lease) Idled() Lease {
	return Lease{KeyID: l.KeyID, Pool: l.Pool, Fence: l.Fence, Used: l.Used}
}

// SameInput reports whether a rerun with i may go on with o.
func (i *Import) SameInput(o *Import) bool {
	return i.InputHash == o.InputHash && i.BatchSize == o.BatchSize &&
		i.Pool == o.Pool && i.Kind == o.Kind && i.KeyID == o.KeyID
}

// SameTotals reports whether both were finished with the same totals.
func (i *Import) SameTotals(o *Import) bool {
	return i.Records == o.Records && i.Duplicates == o.Duplicates && i.Batches == o.Batches
}

// Same reports whether both are the same sealed key.
func (k *Key) Same(o *Key) bool {
	return k.ID == o.ID && k.Keyring == o.Keyring && k.Pool == o.Pool &&
		bytes.Equal(k.Sealed, o.Sealed) //nolint:forbidigo // ciphertext
}
