package storetest

import (
	"slices"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

func queueTests() []test {
	return []test{
		{"a ready batch is listed in its own shard from the moment it is visible", aReadyBatchIsListed},
		{"a shard is listed in order of visibility on as many pages as it takes", aShardIsListedInOrder},
		{"a malformed page token is an error", aMalformedPageToken},
		{"counting a shard does not look at visibility", countingAShardDoesNotLook},
		{"a batch is read as it was imported", aBatchIsRead},
		{"what is not there is not found", whatIsNotThereIsNot},
		{"a result is not a payload and a payload is no result", aResultIsNotAPayload},
		{"what a caller was given or gave is its own", whatACallerWasGiven},
	}
}

func aReadyBatchIsListed(f *fixture) {
	f.fill(1, 0)
	shard := store.ReadyShard(batchID(0))
	f.eventually("the batch is listed", func() bool { return f.listed(shard, batchID(0)) })
	for other := range store.QuarantinedShard + 1 {
		if got := f.listed(other, batchID(0)); got != (other == shard) {
			f.Errorf("shard %d lists it: %v", other, got)
		}
	}
	f.same("at its moment", f.ready(shard, at(0), 10), []record.BatchID{batchID(0)})
	f.same("before it", f.ready(shard, at(0).Add(-time.Nanosecond), 10), []record.BatchID(nil))
}

func aShardIsListedInOrder(f *fixture) {
	f.open()
	shard, want := f.fillShard(7)
	for _, limit := range []int{1, 2, 3, 7, 100} {
		f.eventually("all are listed", func() bool { return slices.Equal(f.ready(shard, at(1_000), limit), want) })
	}
	f.same("the first three", f.ready(shard, f.visible(want[2]), 2), want[:3])
}

func aMalformedPageToken(f *fixture) {
	if _, err := f.Ready(f.ctx(), 0, at(0), 10, "no token"); err == nil {
		f.Error("no error")
	}
}

func countingAShardDoesNotLook(f *fixture) {
	f.fill(20, 0)
	f.eventually("twenty are counted", func() bool {
		sum := 0
		for shard := range store.ReadyShards {
			n, err := f.CountReady(f.ctx(), shard)
			f.noError(err)
			sum += n
		}
		return sum == 20
	})
}

func aBatchIsRead(f *fixture) {
	f.fill(1, 0)
	f.same("batch", f.batch(0), newBatch(0))
	got, err := f.Payload(f.ctx(), batchID(0))
	f.noError(err)
	f.same("payload", got, payload(0))
}

func whatIsNotThereIsNot(f *fixture) {
	for name, read := range map[string]func() error{
		"batch":   func() error { _, err := f.Batch(f.ctx(), batchID(0)); return err },
		"payload": func() error { _, err := f.Payload(f.ctx(), batchID(0)); return err },
		"result":  func() error { _, err := f.Result(f.ctx(), batchID(0)); return err },
		"lease":   func() error { _, err := f.Lease(f.ctx(), keyID(0)); return err },
		"import":  func() error { _, err := f.Import(f.ctx(), importID); return err },
		"record":  func() error { _, err := f.Record(f.ctx(), "a"); return err },
		"receipt": func() error { _, err := f.Receipt(f.ctx(), store.ReceiptRef{Seq: 1}); return err },
		"boot":    func() error { _, err := f.Boot(f.ctx(), bootID(1)); return err },
		"keyring": func() error { _, err := f.Keyring(f.ctx(), "ring"); return err },
		"key":     func() error { _, err := f.Key(f.ctx(), keyID(0)); return err },
	} {
		f.Log(name)
		f.wantError(read(), store.ErrNotFound)
	}
}

func aResultIsNotAPayload(f *fixture) {
	f.fill(1, 0)
	_, err := f.Result(f.ctx(), batchID(0))
	f.wantError(err, store.ErrNotFound)
}

func whatACallerWasGiven(f *fixture) {
	f.fill(1, 1)
	given := payload(7)
	got, err := f.PutPayload(f.ctx(), batchID(7), given)
	f.noError(err)
	given[0], got[0] = 'x', 'y'
	b := f.claim(0, 0, "p1")
	b.History[0].Owner = "nobody"
	got, err = f.Payload(f.ctx(), batchID(7))
	f.noError(err)
	f.same("payload", got, payload(7))
	f.same("owner", f.batch(0).History[0].Owner, "p1")
}

// fillShard puts n batches into one shard and returns them by visibility, which
// is not the order in which they were put.
func (f *fixture) fillShard(n int) (int, []record.BatchID) {
	f.Helper()
	shard := store.ReadyShard(batchID(0))
	var ids []record.BatchID
	for i := 0; len(ids) < n; i++ {
		if store.ReadyShard(batchID(i)) != shard {
			continue
		}
		b := newBatch(i)
		b.VisibleAt = at(500 - i)
		f.noError(f.PutBatch(f.ctx(), b))
		ids = append(ids, b.ID)
	}
	slices.Reverse(ids)
	return shard, ids
}

func (f *fixture) visible(id record.BatchID) time.Time {
	f.Helper()
	b, err := f.Batch(f.ctx(), id)
	f.noError(err)
	return b.VisibleAt
}
