package storetest

import (
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

func newRef(batch, index int) store.RecordRef {
	return store.RecordRef{ID: "record-a", BatchID: batchID(batch), Index: index, PayloadHash: hash(9)}
}

func importTests() []test {
	return []test{
		{"an import is opened once and read as it was opened", anImportIsOpenedOnce},
		{"a rerun with other values is refused", aRerunWithOtherValues},
		{"imports are listed by id", importsAreListedById},
		{"an import is finished with its totals", anImportIsFinished},
		{"an import that is not there is not finished", anImportThatIsNotThere},
		{"a record id belongs to whoever reserved it first", aRecordIdBelongsToWhoever},
		{"a record id is taken over from the holder that was seen and from no other", aRecordIdIsTakenOver},
		{"the payload that is there decides", thePayloadThatIsThereDecides},
		{"a batch is put ready whatever else it says", aBatchIsPutReady},
		{"an equal batch is no error in whatever state it is", anEqualBatchIsNoError},
		{"a batch of the same name with other content is refused", aBatchOfTheSameName},
		{"no batch is added to an import that is not open", noBatchIsAdded},
	}
}

func anImportIsOpenedOnce(f *fixture) {
	want := newImport()
	want.State = store.ImportOpen
	f.same("opened", f.open(), want)
	rerun := newImport()
	rerun.CreatedAt = at(50)
	got, err := f.OpenImport(f.ctx(), rerun)
	f.noError(err)
	f.same("opened again", got, want)
	got, err = f.Import(f.ctx(), importID)
	f.noError(err)
	f.same("read", got, want)
}

func aRerunWithOtherValues(f *fixture) {
	f.open()
	for name, change := range map[string]func(*store.Import){
		"input":      func(i *store.Import) { i.InputHash = hash(2) },
		"batch size": func(i *store.Import) { i.BatchSize = 100 },
		"pool":       func(i *store.Import) { i.Pool = "pool-b" },
		"kind":       func(i *store.Import) { i.Kind = record.Digest },
		"key":        func(i *store.Import) { i.KeyID = keyID(1) },
	} {
		f.Log(name)
		i := newImport()
		change(&i)
		_, err := f.OpenImport(f.ctx(), i)
		f.wantError(err, store.ErrDiffers)
	}
}

func importsAreListedById(f *fixture) {
	for _, id := range []record.ImportID{"c", "a", "b"} {
		i := newImport()
		i.ID = id
		_, err := f.OpenImport(f.ctx(), i)
		f.noError(err)
	}
	all, err := f.Imports(f.ctx())
	f.noError(err)
	var ids []record.ImportID
	for _, i := range all {
		ids = append(ids, i.ID)
	}
	f.same("ids", ids, []record.ImportID{"a", "b", "c"})
}

func anImportIsFinished(f *fixture) {
	i := f.open()
	i.Records, i.Duplicates, i.Batches, i.DoneAt = 1000, 10, 2, at(60)
	f.noError(f.FinishImport(f.ctx(), i))
	i.State = store.ImportDone
	got, err := f.Import(f.ctx(), importID)
	f.noError(err)
	f.same("import", got, i)
	i.DoneAt = at(61)
	f.noError(f.FinishImport(f.ctx(), i))
	i.Duplicates++
	f.wantError(f.FinishImport(f.ctx(), i), store.ErrDiffers)
	got, err = f.OpenImport(f.ctx(), newImport())
	f.noError(err)
	f.same("a rerun sees that it is done", got.State, store.ImportDone)
}

func anImportThatIsNotThere(f *fixture) {
	f.wantError(f.FinishImport(f.ctx(), newImport()), store.ErrNotFound)
}

func aRecordIdBelongsToWhoever(f *fixture) {
	first, second := newRef(0, 3), newRef(1, 4)
	for _, want := range []store.RecordRef{first, first} {
		holder, err := f.ReserveRecord(f.ctx(), want, nil)
		f.noError(err)
		f.same("holder", holder, want)
	}
	holder, err := f.ReserveRecord(f.ctx(), second, nil)
	f.noError(err)
	f.same("holder", holder, first)
	got, err := f.Record(f.ctx(), "record-a")
	f.noError(err)
	f.same("record", got, first)
}

func aRecordIdIsTakenOver(f *fixture) {
	first, second, third := newRef(0, 0), newRef(1, 1), newRef(2, 2)
	holder, err := f.ReserveRecord(f.ctx(), second, &first) // absent: nothing to take over
	f.noError(err)
	f.same("holder", holder, second)
	holder, err = f.ReserveRecord(f.ctx(), third, &first)
	f.noError(err)
	f.same("holder", holder, second)
	holder, err = f.ReserveRecord(f.ctx(), third, &second)
	f.noError(err)
	f.same("holder", holder, third)
	holder, err = f.ReserveRecord(f.ctx(), third, &second)
	f.noError(err)
	f.same("again", holder, third)
}

func thePayloadThatIsThereDecides(f *fixture) {
	for range 2 {
		got, err := f.PutPayload(f.ctx(), batchID(0), payload(0))
		f.noError(err)
		f.same("payload", got, payload(0))
	}
	got, err := f.PutPayload(f.ctx(), batchID(0), payload(1))
	f.noError(err)
	f.same("payload", got, payload(0))
}

func aBatchIsPutReady(f *fixture) {
	f.open()
	b := newBatch(0)
	b.State, b.Fence, b.Owner, b.Attempts, b.Refused = record.Signed, 7, "p1", 3, 4
	b.KeyID = keyID(1)
	f.noError(f.PutBatch(f.ctx(), b))
	want := newBatch(0)
	want.KeyID = keyID(1)
	f.same("batch", f.batch(0), want)
}

func anEqualBatchIsNoError(f *fixture) {
	f.fill(1, 1)
	later := newBatch(0)
	later.VisibleAt = at(77)
	f.noError(f.PutBatch(f.ctx(), later))
	b := f.claim(0, 0, "p1")
	f.noError(f.PutBatch(f.ctx(), later))
	f.commit(b, 0)
	f.noError(f.PutBatch(f.ctx(), later))
	f.same("state", f.batch(0).State, record.Signed)
	i := newImport()
	i.Batches = 1
	f.noError(f.FinishImport(f.ctx(), i))
	f.noError(f.PutBatch(f.ctx(), later))
}

func aBatchOfTheSameName(f *fixture) {
	f.fill(1, 0)
	for name, change := range map[string]func(*store.Batch){
		"payload root": func(b *store.Batch) { b.PayloadRoot = hash(99) },
		"pool":         func(b *store.Batch) { b.Pool = "pool-b" },
		"kind":         func(b *store.Batch) { b.Kind = record.Raw },
		"pinned key":   func(b *store.Batch) { b.Pinned, b.KeyID = true, keyID(1) },
	} {
		f.Log(name)
		b := newBatch(0)
		change(&b)
		f.wantError(f.PutBatch(f.ctx(), b), store.ErrDiffers)
	}
	f.same("batch", f.batch(0), newBatch(0))
}

func noBatchIsAdded(f *fixture) {
	f.wantError(f.PutBatch(f.ctx(), newBatch(0)), store.ErrNotFound)
	i := f.open()
	f.noError(f.FinishImport(f.ctx(), i))
	f.wantError(f.PutBatch(f.ctx(), newBatch(0)), store.ErrTaken)
	_, err := f.Batch(f.ctx(), batchID(0))
	f.wantError(err, store.ErrNotFound)
}

func abortTests() []test {
	return []test{
		{"an abort deletes what was never claimed and keeps the rest", anAbortDeletesWhatWasNever},
		{"an abort finds batches that were written out of order and payloads without a batch", anAbortFindsBatchesThatWere},
		{"an aborted import takes nothing more", anAbortedImportTakesNothingMore},
		{"a batch that was kept is signed", aBatchThatWasKept},
		{"an abort of one import leaves others alone", anAbortOfOneImportLeaves},
		{"a finished import is not aborted", aFinishedImportIsNotAborted},
		{"an import that is not there is not aborted", anImportThatIsNotThereIsNot},
	}
}

func anAbortDeletesWhatWasNever(f *fixture) {
	f.fill(9, 4)
	f.commit(f.claim(1, 0, "p1"), 1)
	f.claim(3, 0, "p1")
	f.noError(f.Release(f.ctx(), f.claim(5, 1, "p1"), giveBack()))
	f.noError(f.Release(f.ctx(), f.claim(7, 2, "p1"), quarantine()))
	for range 2 { // and again
		kept, err := f.AbortImport(f.ctx(), importID)
		f.noError(err)
		f.same("kept", kept, 4)
	}
	for n := range 9 {
		var want error
		if n%2 == 0 {
			want = store.ErrNotFound
		}
		_, err := f.Batch(f.ctx(), batchID(n))
		f.wantError(err, want)
		_, err = f.Payload(f.ctx(), batchID(n))
		f.wantError(err, want)
	}
	i, err := f.Import(f.ctx(), importID)
	f.noError(err)
	f.same("state", i.State, store.ImportAborted)
	f.eventually("no index shows a deleted batch", func() bool {
		return !f.listed(store.ReadyShard(batchID(0)), batchID(0))
	})
}

func anAbortFindsBatchesThatWere(f *fixture) {
	f.open()
	last := store.ImportWindow - 1
	f.noError(f.PutBatch(f.ctx(), newBatch(last)))
	_, err := f.PutPayload(f.ctx(), batchID(last+store.ImportWindow), payload(0))
	f.noError(err)
	kept, err := f.AbortImport(f.ctx(), importID)
	f.noError(err)
	f.same("kept", kept, 0)
	_, err = f.Batch(f.ctx(), batchID(last))
	f.wantError(err, store.ErrNotFound)
	_, err = f.Payload(f.ctx(), batchID(last+store.ImportWindow))
	f.wantError(err, store.ErrNotFound)
}

func anAbortedImportTakesNothingMore(f *fixture) {
	f.fill(1, 1)
	f.claim(0, 0, "p1")
	_, err := f.AbortImport(f.ctx(), importID)
	f.noError(err)
	_, err = f.OpenImport(f.ctx(), newImport())
	f.wantError(err, store.ErrAborted)
	f.wantError(f.PutBatch(f.ctx(), newBatch(0)), store.ErrAborted) // although an equal one is kept
	f.wantError(f.PutBatch(f.ctx(), newBatch(1)), store.ErrAborted)
	f.wantError(f.FinishImport(f.ctx(), newImport()), store.ErrAborted)
	_, err = f.Batch(f.ctx(), batchID(1))
	f.wantError(err, store.ErrNotFound)
}

func aBatchThatWasKept(f *fixture) {
	f.fill(1, 1)
	b := f.claim(0, 0, "p1")
	_, err := f.AbortImport(f.ctx(), importID)
	f.noError(err)
	f.commit(b, 0)
	f.same("state", f.batch(0).State, record.Signed)
}

func anAbortOfOneImportLeaves(f *fixture) {
	f.fill(1, 0)
	other := newImport()
	other.ID = importID + "-b0000000"
	_, err := f.OpenImport(f.ctx(), other)
	f.noError(err)
	b := newBatch(0)
	b.ImportID, b.ID = other.ID, record.MakeBatchID(other.ID, 0)
	f.noError(f.PutBatch(f.ctx(), b))
	_, err = f.AbortImport(f.ctx(), importID)
	f.noError(err)
	_, err = f.Batch(f.ctx(), b.ID)
	f.noError(err)
}

func aFinishedImportIsNotAborted(f *fixture) {
	f.fill(1, 0)
	f.noError(f.FinishImport(f.ctx(), newImport()))
	_, err := f.AbortImport(f.ctx(), importID)
	f.wantError(err, store.ErrTaken)
	f.same("batch", f.batch(0), newBatch(0))
}

func anImportThatIsNotThereIsNot(f *fixture) {
	_, err := f.AbortImport(f.ctx(), importID)
	f.wantError(err, store.ErrNotFound)
}
