package storetest

import (
	"slices"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

func commitTests() []test {
	return []test{
		{"a commit stores the result, ends the batch and frees the key", aCommitStoresTheResultEnds},
		{"a commit without an enclave has no receipt", aCommitWithoutAnEnclave},
		{"no index shows a signed batch", noIndexShowsASignedBatch},
		{"a commit again is recognised as the same", aCommitAgainIsRecognised},
		{"a result is written once", aResultIsWrittenOnce},
		{"a commit needs every part of its claim", aCommitNeedsEveryPart},
		{"a commit after the claim was given up is fenced", aCommitAfterTheClaim},
		{"a commit after the key went to another batch is fenced", aCommitAfterTheKeyWent},
	}
}

func aCommitStoresTheResultEnds(f *fixture) {
	f.fill(1, 1)
	b := f.claim(0, 0, "p1")
	f.commit(b, 0)
	got, err := f.Result(f.ctx(), batchID(0))
	f.noError(err)
	f.same("result", got, result(0))
	want := b.Clone()
	want.State, want.Refused = record.Signed, 3
	want.Receipt = store.ReceiptRef{BootID: bootID(1), Lane: 4, Seq: 5}
	want.VisibleAt, want.CommittedAt = store.Batch{}.VisibleAt, at(105)
	want.History[0].End = store.EndSigned
	f.same("batch", f.batch(0), want)
	f.same("lease", f.lease(0), store.Lease{KeyID: keyID(0), Pool: pool, Fence: 1, Used: 1})
	f.eventually("the key is idle", func() bool { return slices.Equal(f.idle(10), []int{0}) })
}

func aCommitWithoutAnEnclave(f *fixture) {
	f.fill(1, 1)
	c := commitOf(f.claim(0, 0, "p1"), 0)
	c.Receipt, c.Refused = store.ReceiptRef{}, 500
	f.noError(f.Commit(f.ctx(), c))
	f.same("receipt", f.batch(0).Receipt, store.ReceiptRef{})
	f.same("refused", f.batch(0).Refused, 500)
}

func noIndexShowsASignedBatch(f *fixture) {
	f.fill(1, 1)
	f.commit(f.claim(0, 0, "p1"), 0)
	f.eventually("no shard lists or counts it", func() bool {
		for shard := range store.QuarantinedShard + 1 {
			n, err := f.CountReady(f.ctx(), shard)
			f.noError(err)
			if n != 0 || f.listed(shard, batchID(0)) {
				return false
			}
		}
		return true
	})
}

func aCommitAgainIsRecognised(f *fixture) {
	f.fill(2, 1)
	b := f.claim(0, 0, "p1")
	f.commit(b, 0)
	want := f.batch(0)
	f.commit(b, 0)
	f.claim(1, 0, "p2") // the key goes on
	f.commit(b, 0)
	f.same("batch", f.batch(0), want)
	f.same("holder", f.lease(0).Owner, "p2")
}

func aResultIsWrittenOnce(f *fixture) {
	f.fill(1, 1)
	b := f.claim(0, 0, "p1")
	f.commit(b, 0)
	f.wantError(f.Commit(f.ctx(), commitOf(b, 1)), store.ErrFenced)
	other := commitOf(b, 0)
	other.Receipt.Seq++
	f.wantError(f.Commit(f.ctx(), other), store.ErrFenced)
	got, err := f.Result(f.ctx(), batchID(0))
	f.noError(err)
	f.same("result", got, result(0))
}

func aCommitNeedsEveryPart(f *fixture) {
	f.fill(1, 2)
	b := f.claim(0, 0, "p1")
	for name, change := range map[string]func(*store.Batch){
		"batch fence": func(b *store.Batch) { b.Fence-- },
		"key fence":   func(b *store.Batch) { b.KeyFence++ },
		"claim id":    func(b *store.Batch) { b.ClaimID = "another" },
		"key":         func(b *store.Batch) { b.KeyID = keyID(1) },
		"batch":       func(b *store.Batch) { b.ID = batchID(5) },
	} {
		f.Log(name)
		other := b.Clone()
		change(&other)
		f.wantError(f.Commit(f.ctx(), commitOf(other, 0)), store.ErrFenced)
		f.wantError(f.Release(f.ctx(), other, giveBack()), store.ErrFenced)
		f.wantError(f.NoteCrash(f.ctx(), other, []uint32{1}), store.ErrFenced)
	}
	f.same("batch", f.batch(0), b)
	f.commit(b, 0)
}

func aCommitAfterTheClaim(f *fixture) {
	f.fill(1, 1)
	b := f.claim(0, 0, "p1")
	f.noError(f.Release(f.ctx(), b, failed("reason")))
	f.wantError(f.Commit(f.ctx(), commitOf(b, 0)), store.ErrFenced)
	f.claim(0, 0, "p1")
	f.wantError(f.Commit(f.ctx(), commitOf(b, 0)), store.ErrFenced)
}

func aCommitAfterTheKeyWent(f *fixture) {
	f.fill(2, 1)
	b := f.claim(0, 0, "p1")
	f.noError(f.Release(f.ctx(), b, giveBack()))
	f.claim(1, 0, "p2")
	f.wantError(f.Commit(f.ctx(), commitOf(b, 0)), store.ErrFenced)
	f.same("holder", f.lease(0).BatchID, batchID(1))
}

func releaseTests() []test {
	return []test{
		{"a claim given back before anything was sent leaves no trace but its fences", aClaimGivenBackBeforeAnything},
		{"an attempt that counts is remembered with its reason and keeps its key", anAttemptThatCountsIsRemembered},
		{"a batch whose records were sent once stays with that key when a later claim is given back", aBatchWhoseRecordsWereSent},
		{"a pinned batch keeps its key", aPinnedBatchKeepsItsKey},
		{"quarantine moves a batch out of the way and frees its key", quarantineMovesABatchOut},
		{"a release again is recognised as the same", aReleaseAgainIsRecognised},
		{"a release after another claim of the batch is fenced", aReleaseAfterAnotherClaim},
		{"a release of a signed batch is fenced", aReleaseOfASignedBatch},
		{"crashes are added up in order and leave claim and lease alone", crashesAreAddedUpInOrder},
		{"crashes outlive the claim that noted them", crashesOutliveTheClaimThatNoted},
		{"a requeued batch starts again with its key and its history", aRequeuedBatchStartsAgain},
		{"only a quarantined batch is requeued", onlyAQuarantinedBatchIsRequeued},
	}
}

func aClaimGivenBackBeforeAnything(f *fixture) {
	f.fill(1, 1)
	b := f.claim(0, 0, "p1")
	f.noError(f.Release(f.ctx(), b, giveBack()))
	got := f.batch(0)
	f.same("state", got.State, record.Ready)
	f.same("key", got.KeyID, record.KeyID{})
	f.same("attempts", got.Attempts, 0)
	f.same("history", got.History, []store.Attempt(nil))
	f.same("fence", got.Fence, b.Fence)
	f.same("visible", got.VisibleAt, at(150))
	f.same("lease", f.lease(0), store.Lease{KeyID: keyID(0), Pool: pool, Fence: 1, Used: 1})
	shard := store.ReadyShard(batchID(0))
	f.eventually("it is listed at its new moment", func() bool {
		return len(f.ready(shard, at(149), 10)) == 0 && len(f.ready(shard, at(150), 10)) == 1
	})
	f.eventually("the key is idle", func() bool { return slices.Equal(f.idle(10), []int{0}) })
}

func anAttemptThatCountsIsRemembered(f *fixture) {
	f.fill(1, 2)
	f.noError(f.Release(f.ctx(), f.claim(0, 0, "p1"), failed("deadline")))
	got := f.batch(0)
	f.same("key", got.KeyID, keyID(0))
	f.same("attempts", got.Attempts, 1)
	f.same("history", got.History, []store.Attempt{{Owner: "p1", KeyFence: 1, End: "deadline"}})
	_, err := f.Claim(f.ctx(), f.claimOf(0, 1, "p2"))
	f.wantError(err, store.ErrTaken)
	f.same("fence", f.claim(0, 0, "p2").Fence, record.Fence(2))
}

func aBatchWhoseRecordsWereSent(f *fixture) {
	f.fill(1, 1)
	f.claim(0, 0, "p1")
	b, err := f.Claim(f.ctx(), f.takeOverOf(0, "p2"))
	f.noError(err)
	f.noError(f.Release(f.ctx(), b, giveBack()))
	f.same("key", f.batch(0).KeyID, keyID(0))
	f.same("attempts", f.batch(0).Attempts, 1)
}

func aPinnedBatchKeepsItsKey(f *fixture) {
	f.fill(0, 1)
	b := newBatch(0)
	b.KeyID, b.Pinned = keyID(0), true
	f.noError(f.PutBatch(f.ctx(), b))
	f.noError(f.Release(f.ctx(), f.claim(0, 0, "p1"), giveBack()))
	f.same("key", f.batch(0).KeyID, keyID(0))
}

func quarantineMovesABatchOut(f *fixture) {
	f.fill(1, 1)
	f.noError(f.Release(f.ctx(), f.claim(0, 0, "p1"), quarantine()))
	f.same("state", f.batch(0).State, record.Quarantined)
	f.same("history", f.batch(0).History, []store.Attempt{{Owner: "p1", KeyFence: 1, End: "quarantined"}})
	l := f.lease(0)
	f.same("idle", l.Idle(), true)
	f.eventually("it is in the last shard alone", func() bool {
		return f.listed(store.QuarantinedShard, batchID(0)) && !f.listed(store.ReadyShard(batchID(0)), batchID(0))
	})
	n, err := f.CountReady(f.ctx(), store.QuarantinedShard)
	f.noError(err)
	f.same("count", n, 1)
}

func aReleaseAgainIsRecognised(f *fixture) {
	f.fill(2, 1)
	b := f.claim(0, 0, "p1")
	f.noError(f.Release(f.ctx(), b, failed("reason")))
	f.claim(1, 0, "p2")
	f.noError(f.Release(f.ctx(), b, failed("reason")))
	f.same("attempts", f.batch(0).Attempts, 1)
	f.same("holder", f.lease(0).Owner, "p2")
}

func aReleaseAfterAnotherClaim(f *fixture) {
	f.fill(1, 1)
	b := f.claim(0, 0, "p1")
	f.noError(f.Release(f.ctx(), b, giveBack()))
	f.claim(0, 0, "p2")
	f.wantError(f.Release(f.ctx(), b, giveBack()), store.ErrFenced)
	f.same("owner", f.batch(0).Owner, "p2")
}

func aReleaseOfASignedBatch(f *fixture) {
	f.fill(1, 1)
	b := f.claim(0, 0, "p1")
	f.commit(b, 0)
	f.wantError(f.Release(f.ctx(), b, giveBack()), store.ErrFenced)
	f.same("state", f.batch(0).State, record.Signed)
}

func crashesAreAddedUpInOrder(f *fixture) {
	f.fill(1, 1)
	b := f.claim(0, 0, "p1")
	lease := f.lease(0)
	f.noError(f.NoteCrash(f.ctx(), b, []uint32{300, 7}))
	f.noError(f.NoteCrash(f.ctx(), b, []uint32{7, 25, 25}))
	f.noError(f.NoteCrash(f.ctx(), b, nil))
	want := b.Clone()
	want.Crashed = []uint32{7, 25, 300}
	f.same("batch", f.batch(0), want)
	f.same("lease", f.lease(0), lease)
}

func crashesOutliveTheClaimThatNoted(f *fixture) {
	f.fill(1, 1)
	b := f.claim(0, 0, "p1")
	f.noError(f.NoteCrash(f.ctx(), b, []uint32{7}))
	f.noError(f.Release(f.ctx(), b, failed("enclave_crash")))
	b = f.claim(0, 0, "p2")
	f.same("crashed", b.Crashed, []uint32{7})
	f.noError(f.NoteCrash(f.ctx(), b, []uint32{2}))
	f.commit(b, 0)
	f.same("crashed", f.batch(0).Crashed, []uint32{2, 7})
}

func aRequeuedBatchStartsAgain(f *fixture) {
	f.fill(1, 1)
	b := f.claim(0, 0, "p1")
	f.noError(f.NoteCrash(f.ctx(), b, []uint32{7}))
	f.noError(f.Release(f.ctx(), b, quarantine()))
	f.noError(f.Requeue(f.ctx(), batchID(0), at(300)))
	got := f.batch(0)
	f.same("state", got.State, record.Ready)
	f.same("attempts", got.Attempts, 0)
	f.same("crashed", got.Crashed, []uint32(nil))
	f.same("key", got.KeyID, keyID(0))
	f.same("history", len(got.History), 1)
	f.same("visible", got.VisibleAt, at(300))
	f.eventually("it is listed in its own shard", func() bool {
		return f.listed(store.ReadyShard(batchID(0)), batchID(0)) && !f.listed(store.QuarantinedShard, batchID(0))
	})
	f.noError(f.Requeue(f.ctx(), batchID(0), at(300)))
	f.noError(f.Release(f.ctx(), b, quarantine())) // its answer came very late
	f.same("fence", f.claim(0, 0, "p2").Fence, record.Fence(2))
}

func onlyAQuarantinedBatchIsRequeued(f *fixture) {
	f.fill(1, 1)
	f.wantError(f.Requeue(f.ctx(), batchID(9), at(300)), store.ErrNotFound)
	f.wantError(f.Requeue(f.ctx(), batchID(0), at(300)), store.ErrTaken)
	b := f.claim(0, 0, "p1")
	f.wantError(f.Requeue(f.ctx(), batchID(0), at(300)), store.ErrTaken)
	f.commit(b, 0)
	f.wantError(f.Requeue(f.ctx(), batchID(0), at(300)), store.ErrTaken)
}
