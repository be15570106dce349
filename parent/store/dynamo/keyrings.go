package dynamo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

// keysPerTransaction is half of the 100 items that a transaction may have: each
// key comes with its lease.
const keysPerTransaction = 50

// PutKeyring implements store.Keyrings.
func (s *Store) PutKeyring(ctx context.Context, id string, header []byte) error {
	const what = "put keyring"
	old, err := s.putAbsent(ctx, what, tableKeyrings, aKeyring, item{aKeyring: text(id), aData: bytesValue(header)})
	if err != nil || old == nil {
		return err
	}
	r := reader{m: old}
	if !equal(r.binary(aData), header) {
		return fmt.Errorf("%s: %w", what, store.ErrDiffers)
	}
	return nil
}

// Keyring implements store.Keyrings.
func (s *Store) Keyring(ctx context.Context, id string) ([]byte, error) {
	return s.data(ctx, "read keyring", tableKeyrings, item{aKeyring: text(id)})
}

// PutKeys implements store.Keyrings. A key and its lease are written together;
// fifty keys are a transaction, and many of them run at once. Where one of them
// fails and others may have been written the error is no sentinel; the same call
// again goes on.
func (s *Store) PutKeys(ctx context.Context, keys []store.Key) error {
	const what = "put keys"
	keys, err := distinctKeys(keys)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	var touched atomic.Bool // something was written, or may have been
	chunks := slices.Collect(slices.Chunk(keys, keysPerTransaction))
	err = inParallel(len(chunks), func(i int) error {
		err := s.putChunk(ctx, what, chunks[i])
		if !untouched(err) {
			touched.Store(true)
		}
		return err
	})
	if err != nil && touched.Load() {
		return partly(ctx, what, err)
	}
	return err
}

// untouched reports whether err is a sentinel, which says that nothing was written.
func untouched(err error) bool {
	return errors.Is(err, store.ErrDiffers) || errors.Is(err, store.ErrThrottled) || errors.Is(err, store.ErrNoTables)
}

// distinctKeys drops repetitions, which a transaction must not have.
func distinctKeys(keys []store.Key) ([]store.Key, error) {
	seen := make(map[record.KeyID]int, len(keys))
	once := make([]store.Key, 0, len(keys))
	for i := range keys {
		first, again := seen[keys[i].ID]
		switch {
		case !again:
			seen[keys[i].ID] = i
			once = append(once, keys[i])
		case !keys[i].Same(&keys[first]):
			return nil, store.ErrDiffers
		}
	}
	return once, nil
}

// putChunk writes the keys that are not there. Each round that finds some there
// leaves fewer to write.
func (s *Store) putChunk(ctx context.Context, what string, keys []store.Key) error {
	for len(keys) > 0 {
		items := make([]types.TransactWriteItem, 0, 2*len(keys))
		for _, k := range keys {
			items = append(items,
				s.txPut(tableKeys, aKey, keyItem(k)),
				s.txPut(tableLeases, aKey, leaseItem(store.Lease{KeyID: k.ID, Pool: k.Pool})))
		}
		r, err := s.transact(ctx, what, items...)
		if err != nil || r == nil {
			return err
		}
		if keys, err = missing(keys, r); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
	}
	return nil
}

// missing is the keys whose conditions held. The others must be there as they
// were to be written.
func missing(keys []store.Key, r refused) ([]store.Key, error) {
	var rest []store.Key
	for i := range keys {
		key, lease := r[2*i], r[2*i+1]
		if !key.failed && !lease.failed {
			rest = append(rest, keys[i])
			continue
		}
		there, err := readKey(key.old)
		if err != nil {
			return nil, err
		}
		if !key.failed || !there.Same(&keys[i]) {
			return nil, store.ErrDiffers
		}
	}
	return rest, nil
}

// Key implements store.Keyrings.
func (s *Store) Key(ctx context.Context, id record.KeyID) (store.Key, error) {
	m, err := s.get(ctx, "read key", tableKeys, keyOf(id), "")
	if err != nil {
		return store.Key{}, err
	}
	return readKey(m)
}

// Keys implements store.Keyrings.
func (s *Store) Keys(ctx context.Context, keyring string, f func([]store.Key) error) error {
	const what = "list keys"
	in := &dynamodb.ScanInput{
		TableName:                 s.table(tableKeys),
		FilterExpression:          aws.String(aKeyring + " = :keyring"),
		ExpressionAttributeValues: item{":keyring": text(keyring)},
	}
	return s.scanPages(ctx, what, in, func(page []item) error {
		keys := make([]store.Key, len(page))
		for i, m := range page {
			k, err := readKey(m)
			if err != nil {
				return fmt.Errorf("%s: %w", what, err)
			}
			keys[i] = k
		}
		if len(keys) == 0 {
			return nil
		}
		return f(keys)
	})
}
