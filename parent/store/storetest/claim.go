package storetest

import (
	"fmt"
	"slices"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

func claimTests() []test {
	return []test{
		{"a claim writes batch and key together", aClaimWritesBatchAndKey},
		{"a claimed key is not listed as idle, and its batch is until its lease should be looked at", aClaimedKeyIsNotListed},
		{"a claim whose key is taken leaves its batch as it was", aClaimWhoseKeyIsTaken},
		{"a claim whose batch is taken leaves its key as it was", aClaimWhoseBatchIsTaken},
		{"a claim of what is not there is taken", aClaimOfWhatIsNot},
		{"a claim again is recognised as the same", aClaimAgainIsRecognised},
		{"a claim that was given up is not recognised", aClaimThatWasGivenUp},
		{"a pinned batch takes no key but its own", aPinnedBatchTakesNoKey},
		{"a batch takes no key of another pool", aBatchTakesNoKey},
		{"a signed batch cannot be claimed", aSignedBatchCannotBeClaimed},
		{"a quarantined batch cannot be claimed", aQuarantinedBatchCannotBeClaimed},
		{"idle keys come least recently used first", idleKeysComeLeastRecentlyUsed},
		{"an idle list holds one shard of one pool", anIdleListHoldsOneShard},
		{"the key keeps the higher stamp and the batch remembers both", theKeyKeepsTheHigherStamp},
		{"the history keeps the newest five attempts", theHistoryKeepsTheNewestFive},
	}
}

func aClaimWritesBatchAndKey(f *fixture) {
	f.fill(1, 1)
	c := f.claimOf(0, 0, "p1")
	got, err := f.Claim(f.ctx(), c)
	f.noError(err)
	want := newBatch(0)
	want.State, want.Fence, want.Attempts = record.Claimed, 1, 1
	want.KeyID, want.KeyFence = keyID(0), 1
	want.Owner, want.ClaimID, want.BootID, want.Lease = "p1", c.ClaimID, bootID(1), 10*time.Second
	want.History = []store.Attempt{{Owner: "p1", KeyFence: 1}}
	want.Used, want.VisibleAt, want.ClaimedAt = 1, at(110), at(100)
	f.same("returned batch", got, want)
	f.same("stored batch", f.batch(0), want)
	f.same("lease", f.lease(0), store.Lease{
		KeyID: keyID(0), Pool: pool, Fence: 1, Owner: "p1", BatchID: batchID(0),
		BootID: bootID(1), Lease: 10 * time.Second, Used: 1,
	})
}

func aClaimedKeyIsNotListed(f *fixture) {
	f.fill(1, 2)
	f.claim(0, 0, "p1")
	f.eventually("one key is idle", func() bool { return slices.Equal(f.idle(10), []int{1}) })
	shard := store.ReadyShard(batchID(0))
	f.eventually("the batch has moved", func() bool { return len(f.ready(shard, at(109), 10)) == 0 })
	f.same("later", f.ready(shard, at(110), 10), []record.BatchID{batchID(0)})
}

func aClaimWhoseKeyIsTaken(f *fixture) {
	f.fill(2, 1)
	late := f.claimOf(1, 0, "p2")
	f.claim(0, 0, "p1")
	_, err := f.Claim(f.ctx(), late)
	f.wantError(err, store.ErrTaken)
	f.same("batch", f.batch(1), newBatch(1))
	f.same("holder", f.lease(0).BatchID, batchID(0))
}

func aClaimWhoseBatchIsTaken(f *fixture) {
	f.fill(1, 2)
	late := f.claimOf(0, 1, "p2")
	f.claim(0, 0, "p1")
	_, err := f.Claim(f.ctx(), late)
	f.wantError(err, store.ErrTaken)
	f.same("lease", f.lease(1), store.Lease{KeyID: keyID(1), Pool: pool})
}

func aClaimOfWhatIsNot(f *fixture) {
	f.fill(1, 1)
	c := f.claimOf(0, 0, "p1")
	noBatch, noKey := c, c
	noBatch.Batch.ID, noKey.KeyID = batchID(9), keyID(9)
	_, err := f.Claim(f.ctx(), noBatch)
	f.wantError(err, store.ErrTaken)
	_, err = f.Claim(f.ctx(), noKey)
	f.wantError(err, store.ErrTaken)
	f.same("batch", f.batch(0), newBatch(0))
	f.same("lease", f.lease(0), store.Lease{KeyID: keyID(0), Pool: pool})
}

func aClaimAgainIsRecognised(f *fixture) {
	f.fill(1, 1)
	c := f.claimOf(0, 0, "p1")
	first, err := f.Claim(f.ctx(), c)
	f.noError(err)
	c.Now, c.Next = at(101), at(111) // a caller may not remember when it first tried
	again, err := f.Claim(f.ctx(), c)
	f.noError(err)
	f.same("batch", again, first)
}

func aClaimThatWasGivenUp(f *fixture) {
	f.fill(1, 1)
	c := f.claimOf(0, 0, "p1")
	b, err := f.Claim(f.ctx(), c)
	f.noError(err)
	f.noError(f.Release(f.ctx(), b, giveBack()))
	_, err = f.Claim(f.ctx(), c)
	f.wantError(err, store.ErrTaken)
}

func aPinnedBatchTakesNoKey(f *fixture) {
	f.fill(0, 2)
	b := newBatch(0)
	b.KeyID, b.Pinned = keyID(1), true
	f.noError(f.PutBatch(f.ctx(), b))
	_, err := f.Claim(f.ctx(), f.claimOf(0, 0, "p1"))
	f.wantError(err, store.ErrTaken)
	f.same("key", f.claim(0, 1, "p1").KeyID, keyID(1))
}

func aBatchTakesNoKey(f *fixture) {
	f.fill(1, 0)
	k := newKey(0)
	k.Pool = "pool-b"
	f.noError(f.PutKeys(f.ctx(), []store.Key{k}))
	_, err := f.Claim(f.ctx(), f.claimOf(0, 0, "p1"))
	f.wantError(err, store.ErrTaken)
}

func aSignedBatchCannotBeClaimed(f *fixture) {
	f.fill(1, 2)
	f.commit(f.claim(0, 0, "p1"), 0)
	for key := range 2 {
		_, err := f.Claim(f.ctx(), f.claimOf(0, key, "p2"))
		f.wantError(err, store.ErrTaken)
	}
	f.same("state", f.batch(0).State, record.Signed)
}

func aQuarantinedBatchCannotBeClaimed(f *fixture) {
	f.fill(1, 1)
	f.noError(f.Release(f.ctx(), f.claim(0, 0, "p1"), quarantine()))
	_, err := f.Claim(f.ctx(), f.claimOf(0, 0, "p2"))
	f.wantError(err, store.ErrTaken)
}

func idleKeysComeLeastRecentlyUsed(f *fixture) {
	f.fill(3, 3)
	for n, key := range []int{2, 0, 1} {
		c := f.claimOf(n, key, "p1")
		c.Used = uint64(10 + n)
		b, err := f.Claim(f.ctx(), c)
		f.noError(err)
		f.commit(b, n)
	}
	f.eventually("the order is that of use", func() bool { return slices.Equal(f.idle(10), []int{2, 0, 1}) })
	f.same("a window", f.idle(2), []int{2, 0})
	keys, err := f.Idle(f.ctx(), pool, 0, 1)
	f.noError(err)
	f.same("entry", keys, []store.IdleKey{{KeyID: keyID(2), Fence: 1, Used: 10}})
}

func anIdleListHoldsOneShard(f *fixture) {
	f.fill(0, 1)
	other, elsewhere := newKey(1), newKey(2)
	other.ID[0] = 1
	elsewhere.Pool = "pool-b"
	f.noError(f.PutKeys(f.ctx(), []store.Key{other, elsewhere}))
	f.eventually("the key is listed", func() bool { return slices.Equal(f.idle(10), []int{0}) })
	keys, err := f.Idle(f.ctx(), pool, 1, 10)
	f.noError(err)
	f.same("shard 1", keys, []store.IdleKey{{KeyID: other.ID}})
}

func theKeyKeepsTheHigherStamp(f *fixture) {
	f.fill(3, 1)
	for n, c := range []struct{ used, want, before uint64 }{{7, 7, 0}, {3, 7, 7}, {8, 8, 7}} {
		claim := f.claimOf(n, 0, "p1")
		claim.Used = c.used
		b, err := f.Claim(f.ctx(), claim)
		f.noError(err)
		f.same("stamps", [3]uint64{b.Used, b.UsedBefore, f.lease(0).Used}, [3]uint64{c.want, c.before, c.want})
		f.commit(b, n)
	}
}

func theHistoryKeepsTheNewestFive(f *fixture) {
	f.fill(1, 1)
	var want []store.Attempt
	for n := range 7 {
		owner, reason := fmt.Sprintf("p%d", n), fmt.Sprintf("reason_%d", n)
		f.noError(f.Release(f.ctx(), f.claim(0, 0, owner), failed(reason)))
		want = append(want, store.Attempt{Owner: owner, KeyFence: record.Fence(n + 1), End: reason})
	}
	f.same("history", f.batch(0).History, want[2:])
	f.same("attempts", f.batch(0).Attempts, 7)
}

func takeOverTests() []test {
	return []test{
		{"a take-over raises both fences and keeps the key", aTakeOverRaisesBothFences},
		{"a take-over needs the fence that was seen", aTakeOverNeedsTheFence},
		{"a take-over needs a key that is held for this very batch", aTakeOverNeedsAKey},
		{"a held batch is not claimed with another key", aHeldBatchIsNotClaimed},
		{"a held key is not claimed as if it were idle", aHeldKeyIsNotClaimed},
		{"a take-over that has not seen the newest crash is taken", aTakeOverThatHasNot},
		{"whoever was taken over can write nothing any more", whoeverWasTakenOverCanWrite},
	}
}

func aTakeOverRaisesBothFences(f *fixture) {
	f.fill(1, 1)
	f.claim(0, 0, "p1")
	b, err := f.Claim(f.ctx(), f.takeOverOf(0, "p2"))
	f.noError(err)
	f.same("fences", [2]record.Fence{b.Fence, b.KeyFence}, [2]record.Fence{2, 2})
	f.same("history", b.History, []store.Attempt{{Owner: "p1", KeyFence: 1, End: store.EndLost}, {Owner: "p2", KeyFence: 2}})
	f.same("attempts", b.Attempts, 2)
	f.same("lease", f.lease(0), store.Lease{
		KeyID: keyID(0), Pool: pool, Fence: 2, Owner: "p2", BatchID: batchID(0),
		BootID: bootID(2), Lease: 20 * time.Second, Used: 2,
	})
}

func aTakeOverNeedsTheFence(f *fixture) {
	f.fill(1, 1)
	f.claim(0, 0, "p1")
	late := f.takeOverOf(0, "p3")
	_, err := f.Claim(f.ctx(), f.takeOverOf(0, "p2"))
	f.noError(err)
	_, err = f.Claim(f.ctx(), late)
	f.wantError(err, store.ErrTaken)
	f.same("owner", f.batch(0).Owner, "p2")
}

func aTakeOverNeedsAKey(f *fixture) {
	f.fill(2, 2)
	f.claim(0, 0, "p1")
	c := f.claimOf(1, 0, "p2")
	c.TakeOver = true
	_, err := f.Claim(f.ctx(), c)
	f.wantError(err, store.ErrTaken)
	idle := f.claimOf(1, 1, "p2")
	idle.TakeOver = true
	_, err = f.Claim(f.ctx(), idle)
	f.wantError(err, store.ErrTaken)
}

func aHeldBatchIsNotClaimed(f *fixture) {
	f.fill(1, 2)
	f.claim(0, 0, "p1")
	_, err := f.Claim(f.ctx(), f.claimOf(0, 1, "p2"))
	f.wantError(err, store.ErrTaken)
}

func aHeldKeyIsNotClaimed(f *fixture) {
	f.fill(1, 1)
	f.claim(0, 0, "p1")
	_, err := f.Claim(f.ctx(), f.claimOf(0, 0, "p2"))
	f.wantError(err, store.ErrTaken)
}

func aTakeOverThatHasNot(f *fixture) {
	f.fill(1, 1)
	b := f.claim(0, 0, "p1")
	late := f.takeOverOf(0, "p2")
	f.noError(f.NoteCrash(f.ctx(), b, []uint32{7}))
	_, err := f.Claim(f.ctx(), late)
	f.wantError(err, store.ErrTaken)
	again, err := f.Claim(f.ctx(), f.takeOverOf(0, "p2"))
	f.noError(err)
	f.same("crashed", again.Crashed, []uint32{7})
}

func whoeverWasTakenOverCanWrite(f *fixture) {
	f.fill(1, 1)
	b := f.claim(0, 0, "p1")
	_, err := f.Claim(f.ctx(), f.takeOverOf(0, "p2"))
	f.noError(err)
	want, wantLease := f.batch(0), f.lease(0)
	f.wantError(f.Commit(f.ctx(), commitOf(b, 0)), store.ErrFenced)
	f.wantError(f.Release(f.ctx(), b, giveBack()), store.ErrFenced)
	f.wantError(f.Release(f.ctx(), b, quarantine()), store.ErrFenced)
	f.wantError(f.NoteCrash(f.ctx(), b, []uint32{1}), store.ErrFenced)
	f.wantError(f.NoteCrash(f.ctx(), b, nil), store.ErrFenced)
	f.same("batch", f.batch(0), want)
	f.same("lease", f.lease(0), wantLease)
	_, err = f.Result(f.ctx(), batchID(0))
	f.wantError(err, store.ErrNotFound)
}
