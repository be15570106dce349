package memory

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

const keysPerPage = 256

// Result implements store.Archive.
func (s *Store) Result(ctx context.Context, id record.BatchID) ([]byte, error) {
	b, err := get(ctx, s, s.results, id, "result")
	return bytes.Clone(b), err
}

// PutReceipt implements store.Archive.
func (s *Store) PutReceipt(ctx context.Context, r store.Receipt) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("put receipt: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	in := lane{r.Ref.BootID, r.Ref.Lane}
	i, found := s.seek(in, r.Ref.Seq)
	switch {
	case !found:
		r.Signed = bytes.Clone(r.Signed)
		s.receipts[in] = slices.Insert(s.receipts[in], i, r)
		return nil
	case !equal(s.receipts[in][i].Signed, r.Signed):
		return fmt.Errorf("put receipt: %w", store.ErrDiffers)
	}
	return nil
}

func (s *Store) seek(in lane, seq uint64) (int, bool) {
	return slices.BinarySearchFunc(s.receipts[in], seq, func(r store.Receipt, seq uint64) int {
		return cmp.Compare(r.Ref.Seq, seq)
	})
}

// Receipt implements store.Archive.
func (s *Store) Receipt(ctx context.Context, ref store.ReceiptRef) (store.Receipt, error) {
	if err := ctx.Err(); err != nil {
		return store.Receipt{}, fmt.Errorf("read receipt: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	in := lane{ref.BootID, ref.Lane}
	i, found := s.seek(in, ref.Seq)
	if !found {
		return store.Receipt{}, fmt.Errorf("read receipt: %w", store.ErrNotFound)
	}
	return cloneReceipt(s.receipts[in][i]), nil
}

func cloneReceipt(r store.Receipt) store.Receipt {
	r.Signed = bytes.Clone(r.Signed)
	return r
}

// Receipts implements store.Archive.
func (s *Store) Receipts(ctx context.Context, boot record.BootID, n uint32, from uint64, f func(store.Receipt) error) error {
	s.mu.Lock()
	in := lane{boot, n}
	i, _ := s.seek(in, from)
	rest := slices.Clone(s.receipts[in][i:])
	s.mu.Unlock()
	for _, r := range rest {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("list receipts: %w", err)
		}
		if err := f(cloneReceipt(r)); err != nil {
			return err
		}
	}
	return nil
}

// PutBoot implements store.Archive.
func (s *Store) PutBoot(ctx context.Context, b store.Boot) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("put boot: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old, found := s.boots[b.ID]
	switch {
	case !found:
		b = cloneBoot(b)
		b.SeenAt = plain(b.SeenAt)
		s.boots[b.ID] = b
		return nil
	case !equal(old.Document, b.Document) || !equal(old.Statement, b.Statement):
		return fmt.Errorf("put boot: %w", store.ErrDiffers)
	}
	return nil
}

func cloneBoot(b store.Boot) store.Boot {
	b.Document, b.Statement = bytes.Clone(b.Document), bytes.Clone(b.Statement)
	return b
}

// Boot implements store.Archive.
func (s *Store) Boot(ctx context.Context, id record.BootID) (store.Boot, error) {
	b, err := get(ctx, s, s.boots, id, "boot")
	return cloneBoot(b), err
}

// Boots implements store.Archive.
func (s *Store) Boots(ctx context.Context) ([]store.Boot, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("list boots: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []store.Boot
	for _, b := range s.boots {
		all = append(all, cloneBoot(b))
	}
	slices.SortFunc(all, func(a, b store.Boot) int {
		return cmp.Or(a.SeenAt.Compare(b.SeenAt), slices.Compare(a.ID[:], b.ID[:]))
	})
	return all, nil
}

// PutKeyring implements store.Keyrings.
func (s *Store) PutKeyring(ctx context.Context, id string, header []byte) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("put keyring: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old, found := s.keyrings[id]
	switch {
	case !found:
		s.keyrings[id] = bytes.Clone(header)
		return nil
	case !equal(old, header):
		return fmt.Errorf("put keyring: %w", store.ErrDiffers)
	}
	return nil
}

// Keyring implements store.Keyrings.
func (s *Store) Keyring(ctx context.Context, id string) ([]byte, error) {
	b, err := get(ctx, s, s.keyrings, id, "keyring")
	return bytes.Clone(b), err
}

// PutKeys implements store.Keyrings.
func (s *Store) PutKeys(ctx context.Context, keys []store.Key) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("put keys: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	fresh := map[record.KeyID]store.Key{}
	for _, k := range keys {
		old, found := s.keys[k.ID]
		if !found {
			old, found = fresh[k.ID]
		}
		if found && !k.Same(&old) {
			return fmt.Errorf("put keys: %w", store.ErrDiffers)
		}
		if !found {
			fresh[k.ID] = k
		}
	}
	for _, k := range keys {
		if _, isFresh := fresh[k.ID]; !isFresh {
			continue
		}
		delete(fresh, k.ID)
		k.Sealed = bytes.Clone(k.Sealed)
		s.keys[k.ID] = k
		if _, found := s.leases[k.ID]; !found {
			s.write(nil, &store.Lease{KeyID: k.ID, Pool: k.Pool})
		}
	}
	return nil
}

// Key implements store.Keyrings.
func (s *Store) Key(ctx context.Context, id record.KeyID) (store.Key, error) {
	k, err := get(ctx, s, s.keys, id, "key")
	k.Sealed = bytes.Clone(k.Sealed)
	return k, err
}

// Keys implements store.Keyrings.
func (s *Store) Keys(ctx context.Context, keyring string, f func([]store.Key) error) error {
	s.mu.Lock()
	var ids []record.KeyID
	for _, id := range slices.SortedFunc(maps.Keys(s.keys), func(a, b record.KeyID) int { return slices.Compare(a[:], b[:]) }) {
		if s.keys[id].Keyring == keyring {
			ids = append(ids, id)
		}
	}
	s.mu.Unlock()
	for page := range slices.Chunk(ids, keysPerPage) {
		keys := make([]store.Key, len(page))
		for i, id := range page {
			k, err := s.Key(ctx, id)
			if err != nil {
				return err
			}
			keys[i] = k
		}
		if err := f(keys); err != nil {
			return err
		}
	}
	return nil
}
