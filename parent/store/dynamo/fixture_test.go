package dynamo_test

import (
	"testing"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

const importID = record.ImportID("import-1")

var start = time.Date(2026, 3, 4, 5, 6, 7, 123456789, time.UTC)

func newImport() store.Import {
	return store.Import{ID: importID, BatchSize: 500, Pool: "default", Kind: record.Message, Records: 500, CreatedAt: start}
}

func newBatch(n int) store.Batch {
	return store.Batch{
		ID: record.MakeBatchID(importID, n), ImportID: importID, State: record.Ready, Pool: "default",
		Kind: record.Message, Count: 500, PayloadRoot: [32]byte{0: byte(n), 31: 1}, VisibleAt: start,
	}
}

func newKey(n int) store.Key {
	return store.Key{ID: record.KeyID{1: byte(n), 31: 1}, Keyring: "ring", Pool: "default", Sealed: []byte{byte(n), 1}}
}

func must[T any](t *testing.T) func(T, error) T {
	t.Helper()
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func noError(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// fill puts batches and keys into a store.
func fill(t *testing.T, s store.Store, batches, keys int) {
	t.Helper()
	must[store.Import](t)(s.OpenImport(t.Context(), newImport()))
	for n := range batches {
		noError(t, s.PutBatch(t.Context(), newBatch(n)))
	}
	for n := range keys {
		noError(t, s.PutKeys(t.Context(), []store.Key{newKey(n)}))
	}
}

// claimOf is a claim of batch n with key n, both untouched.
func claimOf(n int) store.Claim {
	return store.Claim{
		Batch: newBatch(n), KeyID: newKey(n).ID, Owner: "0123456789abcdef0123456789abcdef",
		ClaimID: "fedcba9876543210fedcba9876543210", BootID: record.BootID{0: 9, 31: 9}, Lease: 10 * time.Second,
		Used: 1, Now: start.Add(time.Second), Next: start.Add(11 * time.Second),
	}
}
