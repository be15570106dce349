package dynamo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

// Idle implements store.Leases.
func (s *Store) Idle(ctx context.Context, pool string, shard, limit int) ([]store.IdleKey, error) {
	const what = "query idle keys"
	out, err := s.client.Query(ctx, &dynamodb.QueryInput{
		TableName:                 s.table(tableLeases),
		IndexName:                 aws.String(indexIdle),
		KeyConditionExpression:    aws.String(aIdleShard + " = :shard"),
		ExpressionAttributeValues: item{":shard": text(idleShard(pool, shard))},
		Limit:                     aws.Int32(int32(min(max(limit, 1), 1000))),
		ReturnConsumedCapacity:    s.capacity,
	}, s.observeAs(what))
	if err != nil {
		return nil, readFault(what, err)
	}
	var keys []store.IdleKey
	for _, m := range out.Items {
		r := reader{m: m}
		keys = append(keys, store.IdleKey{KeyID: r.id(aKey), Fence: record.Fence(r.number(aFence)), Used: r.number(aUsed)})
		if r.err != nil {
			return nil, fmt.Errorf("%s: %w", what, r.err)
		}
	}
	return keys, nil
}

// Lease implements store.Leases.
func (s *Store) Lease(ctx context.Context, id record.KeyID) (store.Lease, error) {
	m, err := s.get(ctx, "read lease", tableLeases, keyOf(id), "")
	if err != nil {
		return store.Lease{}, err
	}
	return readLease(m)
}

func keyOf(id record.KeyID) item      { return item{aKey: binary32(id)} }
func batchKey(id record.BatchID) item { return item{aBatch: text(string(id))} }

// Claim implements store.Leases. It reads the lease first: a transaction can
// neither return the stamp that the key had nor keep the higher of two.
func (s *Store) Claim(ctx context.Context, c store.Claim) (store.Batch, error) {
	const what = "claim batch"
	lease, err := s.Lease(ctx, c.KeyID)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return store.Batch{}, fmt.Errorf("%s: key: %w", what, store.ErrTaken)
	case err != nil:
		return store.Batch{}, fmt.Errorf("%s: %w", what, err)
	case !c.FitsKey(&lease) || !c.Fits(&c.Batch):
		return s.claimedBefore(ctx, c)
	}
	claimed := c.Claimed(lease.Used)
	r, err := s.transact(ctx, what, s.txUpdate(takeBatch(c, claimed)), s.txUpdate(takeKey(c, claimed)))
	if err != nil {
		return store.Batch{}, err
	}
	if r == nil {
		return readBatch(batchItem(claimed))
	}
	now, err := s.batchNow(ctx, what, r[0], c.Batch.ID)
	if err != nil {
		return store.Batch{}, err
	}
	if c.Made(&now) {
		return now, nil
	}
	return store.Batch{}, fmt.Errorf("%s: %w", what, store.ErrTaken)
}

// batchNow is the batch that a refused transaction found.
func (s *Store) batchNow(ctx context.Context, what string, o outcome, id record.BatchID) (store.Batch, error) {
	m, err := s.now(ctx, what, o, tableBatches, batchKey(id))
	if err != nil {
		return store.Batch{}, err
	}
	b, err := readBatch(m)
	if err != nil {
		return store.Batch{}, fmt.Errorf("%s: %w", what, err)
	}
	return b, nil
}

// claimedBefore answers a claim whose key is not as seen: it may be so by the
// claim itself, whose answer was lost.
func (s *Store) claimedBefore(ctx context.Context, c store.Claim) (store.Batch, error) {
	now, err := s.Batch(ctx, c.Batch.ID)
	switch {
	case err != nil && !errors.Is(err, store.ErrNotFound):
		return store.Batch{}, fmt.Errorf("claim batch: %w", err)
	case err == nil && c.Made(&now):
		return now, nil
	}
	return store.Batch{}, fmt.Errorf("claim batch: %w", store.ErrTaken)
}

// takeBatch is the condition Claim.Fits, and the attributes that a claim writes.
func takeBatch(c store.Claim, claimed store.Batch) change {
	w := same(batchItem(c.Batch), aState, aFence, aCrashed)
	w = w.and("(attribute_not_exists(" + aKey + ") OR " + aKey + " = :" + aKey + ")")
	return become(tableBatches, batchKey(c.Batch.ID), batchItem(claimed), w,
		aState, aFence, aKey, aKeyFence, aOwner, aClaim, aBoot, aLease, aAttempts, aHistory,
		aUsed, aUsedBefore, aReadyShard, aVisible, aClaimedAt)
}

// takeKey is the condition Claim.FitsKey (a key never changes its pool), and what a claim makes of the lease.
func takeKey(c store.Claim, claimed store.Batch) change {
	seen := store.Lease{KeyID: c.KeyID, Fence: c.KeySeen}
	condition := aOwner // absent: it is idle
	if c.TakeOver {
		seen.BatchID, condition = c.Batch.ID, aBatch
	}
	w := same(leaseItem(seen), aFence, condition)
	return become(tableLeases, keyOf(c.KeyID), leaseItem(claimed.Taken()), w,
		aFence, aOwner, aBatch, aBoot, aLease, aUsed, aIdleShard)
}

// held is the condition Batch.Holds.
func held(b store.Batch) when {
	b.State = record.Claimed
	return same(batchItem(b), aState, aFence, aClaim, aKeyFence, aKey)
}

// freeKey is the condition Batch.HoldsKey, and the lease given up.
func freeKey(b store.Batch) change {
	taken := b.Taken()
	w := same(leaseItem(taken), aFence, aBatch)
	return become(tableLeases, keyOf(b.KeyID), leaseItem(taken.Idled()), w, aOwner, aBatch, aBoot, aLease, aIdleShard)
}

// Commit implements store.Leases.
func (s *Store) Commit(ctx context.Context, c store.Commit) error {
	const what = "commit batch"
	segment := segmentKey(c.Batch.ID, partResult)
	segment[aData] = bytesValue(c.Result)
	signed := become(tableBatches, batchKey(c.Batch.ID), batchItem(c.Committed()), held(c.Batch),
		aState, aHistory, aRefused, aReadyShard, aVisible, aCommittedAt, aReceiptBoot, aReceiptLane, aReceiptSeq)
	r, err := s.transact(ctx, what, s.txUpdate(signed), s.txPut(tableSegments, aBatch, segment), s.txUpdate(freeKey(c.Batch)))
	if err != nil || r == nil {
		return err
	}
	now, err := s.batchNow(ctx, what, r[0], c.Batch.ID)
	if err != nil {
		return err
	}
	there, err := s.now(ctx, what, r[1], tableSegments, segmentKey(c.Batch.ID, partResult))
	if err != nil {
		return err
	}
	result := reader{m: there}
	if c.Made(&now) && equal(result.binary(aData), c.Result) {
		return nil
	}
	return fmt.Errorf("%s: %w", what, store.ErrFenced)
}

// Release implements store.Leases.
func (s *Store) Release(ctx context.Context, b store.Batch, e store.End) error {
	const what = "release batch"
	released := become(tableBatches, batchKey(b.ID), batchItem(b.Released(e)), held(b),
		aState, aKey, aAttempts, aHistory, aReadyShard, aVisible)
	r, err := s.transact(ctx, what, s.txUpdate(released), s.txUpdate(freeKey(b)))
	if err != nil || r == nil {
		return err
	}
	now, err := s.batchNow(ctx, what, r[0], b.ID)
	if err != nil {
		return err
	}
	if b.ReleasedAs(e, &now) {
		return nil
	}
	return fmt.Errorf("%s: %w", what, store.ErrFenced)
}

// NoteCrash implements store.Leases. Adding to a set twice is adding once.
func (s *Store) NoteCrash(ctx context.Context, b store.Batch, crashed []uint32) error {
	const what = "note a crash"
	if len(crashed) == 0 { // there is no empty set to add
		now, err := s.Batch(ctx, b.ID)
		if err == nil && b.Holds(&now) {
			return nil
		}
		if err == nil || errors.Is(err, store.ErrNotFound) {
			err = store.ErrFenced
		}
		return fmt.Errorf("%s: %w", what, err)
	}
	var a attempts
	old, err := s.updateNoting(ctx, what, change{
		table: tableBatches, key: batchKey(b.ID), when: held(b),
		expression: "ADD " + aCrashed + " :" + aCrashed,
		values:     item{":" + aCrashed: numbers(distinct(crashed))},
	}, &a)
	if err == nil && old != nil {
		err = a.refuse(what, store.ErrFenced)
	}
	return err
}

// distinct is what a set may be made of.
func distinct(ns []uint32) []uint32 {
	ns = slices.Clone(ns)
	slices.Sort(ns)
	return slices.Compact(ns)
}

// equal compares public bytes: segments, receipts, sealed keys, documents.
func equal(a, b []byte) bool { return bytes.Equal(a, b) } //nolint:forbidigo // nothing secret is stored
