package storetest

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

func newReceipt(lane uint32, seq uint64) store.Receipt {
	return store.Receipt{
		Ref:    store.ReceiptRef{BootID: bootID(1), Lane: lane, Seq: seq},
		Signed: []byte(fmt.Sprintf("receipt %d/%d", lane, seq)),
	}
}

var errStop = errors.New("stop")

func archiveTests() []test {
	return []test{
		{"a receipt is written once", aReceiptIsWrittenOnce},
		{"the receipts of one lane come in order from the one asked for", theReceiptsOfOneLaneCome},
		{"a list of receipts stops where its reader stops", aListOfReceiptsStopsWhere},
		{"a boot is written once, and when it was seen does not matter", aBootIsWrittenOnce},
		{"boots are listed in the order they were seen", bootsAreListedInTheOrder},
		{"a result as large as a segment may be is kept", aResultAsLarge},
	}
}

func aReceiptIsWrittenOnce(f *fixture) {
	r := newReceipt(1, 1)
	f.noError(f.PutReceipt(f.ctx(), r))
	f.noError(f.PutReceipt(f.ctx(), r))
	other := r
	other.Signed = []byte("forged")
	f.wantError(f.PutReceipt(f.ctx(), other), store.ErrDiffers)
	got, err := f.Receipt(f.ctx(), r.Ref)
	f.noError(err)
	f.same("receipt", got, r)
}

func theReceiptsOfOneLaneCome(f *fixture) {
	for _, seq := range []uint64{3, 1, 12, 2, 4} {
		f.noError(f.PutReceipt(f.ctx(), newReceipt(7, seq)))
	}
	f.noError(f.PutReceipt(f.ctx(), newReceipt(8, 5)))
	elsewhere := newReceipt(7, 6)
	elsewhere.Ref.BootID = bootID(2)
	f.noError(f.PutReceipt(f.ctx(), elsewhere))
	var got []store.Receipt
	f.noError(f.Receipts(f.ctx(), bootID(1), 7, 2, func(r store.Receipt) error {
		got = append(got, r)
		return nil
	}))
	f.same("receipts", got, []store.Receipt{newReceipt(7, 2), newReceipt(7, 3), newReceipt(7, 4), newReceipt(7, 12)})
}

func aListOfReceiptsStopsWhere(f *fixture) {
	f.noError(f.PutReceipt(f.ctx(), newReceipt(1, 1)))
	f.noError(f.PutReceipt(f.ctx(), newReceipt(1, 2)))
	calls := 0
	err := f.Receipts(f.ctx(), bootID(1), 1, 0, func(store.Receipt) error { calls++; return errStop })
	f.wantError(err, errStop)
	f.same("calls", calls, 1)
}

func aBootIsWrittenOnce(f *fixture) {
	b := store.Boot{ID: bootID(1), Document: []byte("document"), Statement: []byte("statement"), SeenAt: at(1)}
	f.noError(f.PutBoot(f.ctx(), b))
	again := b
	again.SeenAt = at(2)
	f.noError(f.PutBoot(f.ctx(), again))
	for _, change := range []func(*store.Boot){
		func(b *store.Boot) { b.Document = []byte("forged") },
		func(b *store.Boot) { b.Statement = []byte("forged") },
	} {
		other := b
		change(&other)
		f.wantError(f.PutBoot(f.ctx(), other), store.ErrDiffers)
	}
	got, err := f.Boot(f.ctx(), b.ID)
	f.noError(err)
	f.same("boot", got, b)
}

func bootsAreListedInTheOrder(f *fixture) {
	var want []store.Boot
	for n, id := range []int{3, 1, 2} {
		want = append(want, store.Boot{ID: bootID(id), Document: []byte{1}, Statement: []byte{2}, SeenAt: at(n)})
		f.noError(f.PutBoot(f.ctx(), want[n]))
	}
	got, err := f.Boots(f.ctx())
	f.noError(err)
	f.same("boots", got, want)
}

func aResultAsLarge(f *fixture) {
	f.fill(1, 1)
	c := commitOf(f.claim(0, 0, "p1"), 0)
	c.Result = bytes.Repeat([]byte{0xa5}, record.MaxSegmentLen)
	f.noError(f.Commit(f.ctx(), c))
	got, err := f.Result(f.ctx(), batchID(0))
	f.noError(err)
	f.same("length", len(got), record.MaxSegmentLen)
	f.noError(f.Commit(f.ctx(), c))
}

func keyringTests() []test {
	return []test{
		{"a keyring is written once", aKeyringIsWrittenOnce},
		{"a key comes with its idle lease", aKeyComesWithItsIdle},
		{"keys are put again from the middle, and a held lease stays as it is", keysArePutAgain},
		{"a key of the same name with other content is refused", aKeyOfTheSameName},
		{"no keys are no error", noKeysAreNoError},
		{"every key of a keyring is listed once, and none of another", everyKeyOfAKeyring},
	}
}

func aKeyringIsWrittenOnce(f *fixture) {
	f.noError(f.PutKeyring(f.ctx(), "ring", []byte("header")))
	f.noError(f.PutKeyring(f.ctx(), "ring", []byte("header")))
	f.wantError(f.PutKeyring(f.ctx(), "ring", []byte("other")), store.ErrDiffers)
	got, err := f.Keyring(f.ctx(), "ring")
	f.noError(err)
	f.same("header", got, []byte("header"))
}

func aKeyComesWithItsIdle(f *fixture) {
	f.fill(0, 1)
	got, err := f.Key(f.ctx(), keyID(0))
	f.noError(err)
	f.same("key", got, newKey(0))
	f.same("lease", f.lease(0), store.Lease{KeyID: keyID(0), Pool: pool})
	f.eventually("it is listed", func() bool {
		keys, err := f.Idle(f.ctx(), pool, 0, 10)
		f.noError(err)
		return len(keys) == 1 && keys[0] == store.IdleKey{KeyID: keyID(0)}
	})
}

func keysArePutAgain(f *fixture) {
	f.fill(1, 60)
	f.claim(0, 3, "p1")
	var keys []store.Key
	for n := range 130 {
		keys = append(keys, newKey(n))
	}
	keys = append(keys, newKey(5)) // once more in one call
	for range 2 {
		f.noError(f.PutKeys(f.ctx(), keys))
	}
	f.same("owner", f.lease(3).Owner, "p1")
	for _, n := range []int{0, 59, 60, 129} {
		got, err := f.Key(f.ctx(), keyID(n))
		f.noError(err)
		f.same("key", got, newKey(n))
		f.lease(n)
	}
}

func aKeyOfTheSameName(f *fixture) {
	f.fill(0, 1)
	other := newKey(0)
	other.Sealed = []byte("forged")
	f.wantError(f.PutKeys(f.ctx(), []store.Key{newKey(1), other}), store.ErrDiffers)
	_, err := f.Key(f.ctx(), keyID(1))
	f.wantError(err, store.ErrNotFound)
	f.wantError(f.PutKeys(f.ctx(), []store.Key{newKey(2), {ID: keyID(2)}}), store.ErrDiffers)
	got, err := f.Key(f.ctx(), keyID(0))
	f.noError(err)
	f.same("key", got, newKey(0))
}

func noKeysAreNoError(f *fixture) {
	f.noError(f.PutKeys(f.ctx(), nil))
}

func everyKeyOfAKeyring(f *fixture) {
	f.fill(0, 120)
	other := newKey(200)
	other.Keyring = "other"
	f.noError(f.PutKeys(f.ctx(), []store.Key{other}))
	got := map[record.KeyID]int{}
	f.noError(f.Keys(f.ctx(), "ring", func(page []store.Key) error {
		for _, k := range page {
			f.same("key", k, newKey(int(k.ID[1])))
			got[k.ID]++
		}
		return nil
	}))
	f.same("keys", len(got), 120)
	for id, n := range got {
		if n != 1 {
			f.Errorf("%v is listed %d times", id, n)
		}
	}
	f.wantError(f.Keys(f.ctx(), "ring", func([]store.Key) error { return errStop }), errStop)
}
