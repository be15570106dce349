package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/parent/store"
)

// pageLen is how many batches of the ready index are read at a time.
const pageLen = 100

// farAhead passes every moment at which a batch may be looked at again.
const farAhead = 100 * 365 * 24 * time.Hour

func isNotFound(err error) bool { return errors.Is(err, store.ErrNotFound) }

func must(err error) {
	if err != nil {
		panic("keyhold: " + err.Error())
	}
}

func keyText(id record.KeyID) *string {
	if id.IsZero() {
		return nil
	}
	s := id.String()
	return &s
}

// publicKey is what can be known of a key without opening it.
type publicKey struct {
	id        record.KeyID
	pool      string
	algorithm record.Algorithm
}

func readKey(ctx context.Context, s store.Keyrings, id record.KeyID) (publicKey, error) {
	k, err := s.Key(ctx, id)
	if isNotFound(err) {
		return publicKey{}, cli.Errorf(refusal.KeyUnknown, "there is no key %s: see keyhold keys list", id)
	}
	if err != nil {
		return publicKey{}, fmt.Errorf("read key %s: %w", id, err)
	}
	e, err := sealed.DecodeEntry(k.Sealed)
	if err != nil {
		return publicKey{}, fmt.Errorf("key %s: %w", id, err)
	}
	return publicKey{id: id, pool: k.Pool, algorithm: e.Public.Algorithm}, nil
}

// anyKey returns some key of a pool, which has one algorithm. Only idle keys are
// in an index; where all are at work, one is found in the batch that it signs.
// Between both looks a key may change sides, so they are taken more than once.
func anyKey(ctx context.Context, s store.Store, pool string) (publicKey, error) {
	const looks = 3
	for range looks {
		for shard := range store.IdleShards {
			idle, err := s.Idle(ctx, pool, shard, 1)
			if err != nil {
				return publicKey{}, fmt.Errorf("look for a key of pool %s: %w", pool, err)
			}
			if len(idle) > 0 {
				return readKey(ctx, s, idle[0].KeyID)
			}
		}
		id, err := busyKey(ctx, s, pool)
		if err != nil {
			return publicKey{}, err
		}
		if !id.IsZero() {
			return readKey(ctx, s, id)
		}
	}
	return publicKey{}, cli.Errorf(refusal.KeyUnknown, "pool %s has no keys: make some with keyhold keyring create --pool %s, or choose a pool of keyhold keys list", pool, pool)
}

var errEnough = errors.New("enough")

// busyKey returns a key that a batch of the pool is being signed with, zero
// where there is none.
func busyKey(ctx context.Context, s store.Queue, pool string) (id record.KeyID, err error) {
	err = openBatches(ctx, s, func(b *store.Batch) error {
		if b.Pool == pool && b.State == record.Claimed {
			id = b.KeyID
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		err = nil
	}
	return id, err
}

// openBatches calls f for every batch that is in no final state, by the index of
// them: those that are READY, CLAIMED or QUARANTINED. It reads no payload.
func openBatches(ctx context.Context, s store.Queue, f func(b *store.Batch) error) error {
	for shard := range store.QuarantinedShard + 1 {
		if err := shardBatches(ctx, s, shard, f); err != nil {
			return err
		}
	}
	return nil
}

func shardBatches(ctx context.Context, s store.Queue, shard int, f func(b *store.Batch) error) error {
	for page := ""; ; {
		p, err := s.Ready(ctx, shard, time.Now().Add(farAhead), pageLen, page)
		if err != nil {
			return fmt.Errorf("list the open batches: %w", err)
		}
		for _, id := range p.Batches {
			b, err := s.Batch(ctx, id)
			if isNotFound(err) { // the index is behind
				continue
			}
			if err != nil {
				return fmt.Errorf("read batch %s: %w", id, err)
			}
			if err := f(&b); err != nil {
				return err
			}
		}
		if page = p.Next; page == "" {
			return nil
		}
	}
}
