// Package storetest checks an implementation of store.Store against the sentences
// of package store, one test for each. It refuses nothing itself and needs no
// service; an implementation's own tests call Run.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

// Run checks the stores that open returns. It is called once for each test and
// returns an empty store with its tables.
func Run(t *testing.T, open func(t *testing.T) store.Store) {
	t.Helper()
	for _, part := range []struct {
		name  string
		tests []test
	}{
		{"Queue", queueTests()},
		{"Claim", claimTests()},
		{"TakeOver", takeOverTests()},
		{"Commit", commitTests()},
		{"Release", releaseTests()},
		{"Import", importTests()},
		{"Abort", abortTests()},
		{"Archive", archiveTests()},
		{"Keyrings", keyringTests()},
		{"Races", raceTests()},
	} {
		t.Run(part.name, func(t *testing.T) {
			for _, test := range part.tests {
				t.Run(test.sentence, func(t *testing.T) {
					test.check(&fixture{T: t, Store: open(t)})
				})
			}
		})
	}
}

// test is one sentence and what shows that it holds.
type test struct {
	sentence string
	check    func(*fixture)
}

const (
	pool       = "pool-a"
	importID   = record.ImportID("import-1")
	indexWait  = 10 * time.Second // an index may lag behind its table
	indexRetry = 20 * time.Millisecond
)

// start has nanoseconds, so that a store which drops them is found out.
var start = time.Date(2026, 3, 4, 5, 6, 7, 123456789, time.UTC)

func at(seconds int) time.Time { return start.Add(time.Duration(seconds) * time.Second) }

// fixture is a store with short ways to fill it.
type fixture struct {
	*testing.T
	store.Store
}

func (f *fixture) ctx() context.Context { return f.Context() }

func (f *fixture) noError(err error) {
	f.Helper()
	if err != nil {
		f.Fatal(err)
	}
}

func (f *fixture) wantError(err, want error) {
	f.Helper()
	if !errors.Is(err, want) {
		f.Fatalf("error %v, want %v", err, want)
	}
}

func (f *fixture) same(what string, got, want any) {
	f.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		f.Fatalf("%s differs (-want +got):\n%s", what, diff)
	}
}

// eventually tries until ok, for what is read from an index.
func (f *fixture) eventually(what string, ok func() bool) {
	f.Helper()
	retry := time.NewTicker(indexRetry)
	defer retry.Stop()
	end := time.NewTimer(indexWait)
	defer end.Stop()
	for !ok() {
		select {
		case <-retry.C:
		case <-end.C:
			f.Fatalf("not within %v: %s", indexWait, what)
		case <-f.ctx().Done():
			f.Fatal(f.ctx().Err())
		}
	}
}

func hash(b byte) [32]byte { return [32]byte{0: b, 31: 0xff} }

// octet makes n a byte of an id; the numbers of a test are small.
func octet(n int) byte { return byte(n & 0xff) }

// keyID is key n of idle shard 0.
func keyID(n int) record.KeyID { return record.KeyID{0: 0, 1: octet(n), 31: 1} }

func bootID(n int) record.BootID { return record.BootID{0: octet(n), 31: 2} }

func batchID(n int) record.BatchID { return record.MakeBatchID(importID, n) }

func newImport() store.Import {
	return store.Import{
		ID: importID, InputHash: hash(1), BatchSize: 500, Pool: pool, Kind: record.Message,
		Records: 1000, CreatedAt: at(0),
	}
}

func newBatch(n int) store.Batch {
	return store.Batch{
		ID: batchID(n), ImportID: importID, State: record.Ready, Pool: pool, Kind: record.Message,
		Count: 500, PayloadRoot: hash(octet(n)), VisibleAt: at(n),
	}
}

func newKey(n int) store.Key {
	return store.Key{ID: keyID(n), Keyring: "ring", Pool: pool, Sealed: []byte(fmt.Sprintf("sealed key %d", n))}
}

// open opens the one import of a test.
func (f *fixture) open() store.Import {
	f.Helper()
	i, err := f.OpenImport(f.ctx(), newImport())
	f.noError(err)
	return i
}

// fill puts batches 0 to n-1 with their payloads, and as many keys.
func (f *fixture) fill(batches, keys int) {
	f.Helper()
	f.open()
	for n := range batches {
		_, err := f.PutPayload(f.ctx(), batchID(n), payload(n))
		f.noError(err)
		f.noError(f.PutBatch(f.ctx(), newBatch(n)))
	}
	var all []store.Key
	for n := range keys {
		all = append(all, newKey(n))
	}
	f.noError(f.PutKeys(f.ctx(), all))
}

func payload(n int) []byte { return []byte(fmt.Sprintf("payload %d", n)) }
func result(n int) []byte  { return []byte(fmt.Sprintf("result %d", n)) }

func (f *fixture) batch(n int) store.Batch {
	f.Helper()
	b, err := f.Batch(f.ctx(), batchID(n))
	f.noError(err)
	return b
}

func (f *fixture) lease(n int) store.Lease {
	f.Helper()
	l, err := f.Lease(f.ctx(), keyID(n))
	f.noError(err)
	return l
}

// claimOf is a claim of a batch with an idle key, as both are now.
func (f *fixture) claimOf(batch, key int, owner string) store.Claim {
	f.Helper()
	b, l := f.batch(batch), f.lease(key)
	return store.Claim{
		Batch: b, KeyID: l.KeyID, KeySeen: l.Fence, Owner: owner,
		ClaimID: fmt.Sprintf("claim-%s-%d-%d", owner, batch, b.Fence), BootID: bootID(1),
		Lease: 10 * time.Second, Used: l.Used + 1, Now: at(100), Next: at(110),
	}
}

// takeOverOf is a claim of a batch that another one holds.
func (f *fixture) takeOverOf(batch int, owner string) store.Claim {
	f.Helper()
	b := f.batch(batch)
	l, err := f.Lease(f.ctx(), b.KeyID)
	f.noError(err)
	return store.Claim{
		Batch: b, KeyID: l.KeyID, KeySeen: l.Fence, TakeOver: true, Owner: owner,
		ClaimID: fmt.Sprintf("claim-%s-%d-%d", owner, batch, b.Fence), BootID: bootID(2),
		Lease: 20 * time.Second, Used: l.Used + 1, Now: at(200), Next: at(220),
	}
}

func (f *fixture) claim(batch, key int, owner string) store.Batch {
	f.Helper()
	b, err := f.Claim(f.ctx(), f.claimOf(batch, key, owner))
	f.noError(err)
	return b
}

func commitOf(b store.Batch, n int) store.Commit {
	return store.Commit{
		Batch: b, Result: result(n), Refused: 3,
		Receipt: store.ReceiptRef{BootID: b.BootID, Lane: 4, Seq: 5}, Now: at(105),
	}
}

func (f *fixture) commit(b store.Batch, n int) {
	f.Helper()
	f.noError(f.Commit(f.ctx(), commitOf(b, n)))
}

func giveBack() store.End { return store.End{State: record.Ready, Now: at(150)} }

func failed(reason string) store.End {
	return store.End{State: record.Ready, Reason: reason, Attempt: true, KeepKey: true, Now: at(150)}
}

func quarantine() store.End {
	return store.End{State: record.Quarantined, Reason: "quarantined", Attempt: true, KeepKey: true, Now: at(160)}
}

// listed is whether a shard of the ready index shows a batch.
func (f *fixture) listed(shard int, id record.BatchID) bool {
	f.Helper()
	for _, listed := range f.ready(shard, at(1_000_000), 100) {
		if listed == id {
			return true
		}
	}
	return false
}

// ready reads all pages of a shard.
func (f *fixture) ready(shard int, until time.Time, limit int) []record.BatchID {
	f.Helper()
	var all []record.BatchID
	for page := ""; ; {
		p, err := f.Ready(f.ctx(), shard, until, limit, page)
		f.noError(err)
		if len(p.Batches) > limit {
			f.Fatalf("a page of %d, want at most %d", len(p.Batches), limit)
		}
		all = append(all, p.Batches...)
		if p.Next == "" {
			return all
		}
		page = p.Next
	}
}

// idle is the numbers of the idle keys of shard 0, in the order of the index.
func (f *fixture) idle(limit int) []int {
	f.Helper()
	keys, err := f.Idle(f.ctx(), pool, 0, limit)
	f.noError(err)
	ns := []int{}
	for _, k := range keys {
		ns = append(ns, int(k.KeyID[1]))
	}
	return ns
}
