package memory_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/memory"
	"github.com/keyhold/keyhold/parent/store/storetest"
)

func TestMemoryKeepsTheContracts(t *testing.T) {
	storetest.Run(t, func(*testing.T) store.Store { return memory.New() })
}

func TestIndexesLagBehindByTheNumberOfWritesThatWasSet(t *testing.T) {
	ctx := t.Context()
	s := memory.New()
	s.SetIndexLag(1)
	put := func(n byte) {
		t.Helper()
		if err := s.PutKeys(ctx, []store.Key{{ID: record.KeyID{1: n}, Pool: "p"}}); err != nil {
			t.Fatal(err)
		}
	}
	idle := func() []byte {
		t.Helper()
		keys, err := s.Idle(ctx, "p", 0, 10)
		if err != nil {
			t.Fatal(err)
		}
		var ns []byte
		for _, k := range keys {
			ns = append(ns, k.KeyID[1])
		}
		return ns
	}
	put(1)
	if got := idle(); len(got) != 0 {
		t.Errorf("idle keys %v after one write, want none yet", got)
	}
	put(2)
	if got := idle(); !slices.Equal(got, []byte{1}) {
		t.Errorf("idle keys %v after two writes, want the first", got)
	}
	s.SetIndexLag(0)
	if got := idle(); !slices.Equal(got, []byte{1, 2}) {
		t.Errorf("idle keys %v without lag, want both", got)
	}
}

func TestALargePoolIsListedLeastRecentlyUsedFirst(t *testing.T) {
	ctx := t.Context()
	s := memory.New()
	const n = 200_000
	keys := make([]store.Key, n)
	for i := range keys { // all in one shard, in falling order
		keys[i] = store.Key{ID: record.KeyID{1: byte(i >> 16), 2: byte(i >> 8), 3: byte(i)}, Pool: "p"}
	}
	slices.Reverse(keys)
	if err := s.PutKeys(ctx, keys); err != nil {
		t.Fatal(err)
	}
	got, err := s.Idle(ctx, "p", 0, 3)
	if err != nil {
		t.Fatal(err)
	}
	want := []store.IdleKey{{KeyID: record.KeyID{3: 0}}, {KeyID: record.KeyID{3: 1}}, {KeyID: record.KeyID{3: 2}}}
	if !slices.Equal(got, want) {
		t.Errorf("idle keys %v, want %v", got, want)
	}
}

func TestACanceledCallWritesNothing(t *testing.T) {
	s := memory.New()
	ctx := t.Context()
	i := store.Import{ID: "a", CreatedAt: time.Unix(1, 0)}
	if _, err := s.OpenImport(canceled(t), i); err == nil {
		t.Error("a canceled call gave no error")
	}
	all, err := s.Imports(ctx)
	if err != nil || len(all) != 0 {
		t.Errorf("imports %v, error %v, want none", all, err)
	}
}

func canceled(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}
