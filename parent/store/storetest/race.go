package storetest

import (
	"errors"
	"fmt"
	"sync"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

const racers = 8

// race runs racers at once and returns their errors.
func race(run func(racer int) error) []error {
	errs := make([]error, racers)
	var start, done sync.WaitGroup
	start.Add(1)
	for n := range racers {
		done.Go(func() {
			start.Wait()
			errs[n] = run(n)
		})
	}
	start.Done()
	done.Wait()
	return errs
}

// oneWinner checks that one error is nil and that the others are want.
func (f *fixture) oneWinner(errs []error, want error) int {
	f.Helper()
	winner := -1
	for n, err := range errs {
		switch {
		case err == nil && winner >= 0:
			f.Fatalf("%d and %d both won", winner, n)
		case err == nil:
			winner = n
		case !errors.Is(err, want):
			f.Fatalf("racer %d: error %v, want %v", n, err, want)
		}
	}
	if winner < 0 {
		f.Fatal("nobody won")
	}
	return winner
}

func raceTests() []test {
	return []test{
		{"of many claims of one batch one wins, and the others take no key", ofManyClaimsOfOneBatch},
		{"one claim made many times at once is one claim", oneClaimMadeManyTimes},
		{"of many claims of one key one wins, and the others take no batch", ofManyClaimsOfOneKey},
		{"of many take-overs one wins", ofManyTakeOversOneWins},
		{"a commit and a take-over exclude each other", aCommitAndATakeOver},
		{"of many reservations of one id all name one holder", ofManyReservationsOfOneId},
		{"of many payloads of one batch all return one", ofManyPayloadsOfOneBatch},
		{"many can put the batches of one import", manyCanPutTheBatches},
		{"an abort beside puts leaves no batch that nobody claimed", anAbortBesidePutsLeavesNo},
		{"of many different receipts of one number one is kept", ofManyDifferentReceiptsOfOne},
		{"many can put the same keys", manyCanPutTheSameKeys},
		{"many workers sign every batch once and share no fence of a key", shareKeys},
	}
}

func ofManyClaimsOfOneBatch(f *fixture) {
	f.fill(1, racers)
	claims := make([]store.Claim, racers)
	for n := range racers {
		claims[n] = f.claimOf(0, n, fmt.Sprintf("p%d", n))
	}
	winner := f.oneWinner(race(func(n int) error { _, err := f.Claim(f.ctx(), claims[n]); return err }), store.ErrTaken)
	f.same("owner", f.batch(0).Owner, claims[winner].Owner)
	for n := range racers {
		l := f.lease(n)
		f.same("idle", l.Idle(), n != winner)
	}
}

func ofManyClaimsOfOneKey(f *fixture) {
	f.fill(racers, 1)
	claims := make([]store.Claim, racers)
	for n := range racers {
		claims[n] = f.claimOf(n, 0, fmt.Sprintf("p%d", n))
	}
	winner := f.oneWinner(race(func(n int) error { _, err := f.Claim(f.ctx(), claims[n]); return err }), store.ErrTaken)
	f.same("holder", f.lease(0).BatchID, batchID(winner))
	for n := range racers {
		f.same("claimed", f.batch(n).State == record.Claimed, n == winner)
	}
}

func ofManyTakeOversOneWins(f *fixture) {
	f.fill(1, 1)
	f.claim(0, 0, "p")
	claims := make([]store.Claim, racers)
	for n := range racers {
		claims[n] = f.takeOverOf(0, fmt.Sprintf("p%d", n))
	}
	winner := f.oneWinner(race(func(n int) error { _, err := f.Claim(f.ctx(), claims[n]); return err }), store.ErrTaken)
	f.same("owner", f.lease(0).Owner, claims[winner].Owner)
	f.same("fence", f.batch(0).Fence, record.Fence(2))
}

func aCommitAndATakeOver(f *fixture) {
	f.fill(racers, racers)
	for n := range racers {
		b := f.claim(n, n, "p1")
		take := f.takeOverOf(n, "p2")
		errs := race(func(racer int) error {
			switch racer {
			case 0:
				return f.Commit(f.ctx(), commitOf(b, n))
			case 1:
				_, err := f.Claim(f.ctx(), take)
				return err
			}
			return nil
		})
		if committed, taken := errs[0] == nil, errs[1] == nil; committed == taken {
			f.Fatalf("commit: %v, take-over: %v", errs[0], errs[1])
		}
		_, err := f.Result(f.ctx(), batchID(n))
		f.same("a result is there", err == nil, errs[0] == nil)
	}
}

func ofManyReservationsOfOneId(f *fixture) {
	holders := make([]store.RecordRef, racers)
	for _, err := range race(func(n int) (err error) {
		holders[n], err = f.ReserveRecord(f.ctx(), newRef(n, n), nil)
		return err
	}) {
		f.noError(err)
	}
	for _, h := range holders {
		f.same("holder", h, holders[0])
	}
}

func ofManyPayloadsOfOneBatch(f *fixture) {
	got := make([][]byte, racers)
	for _, err := range race(func(n int) (err error) {
		got[n], err = f.PutPayload(f.ctx(), batchID(0), payload(n))
		return err
	}) {
		f.noError(err)
	}
	for _, p := range got {
		f.same("payload", p, got[0])
	}
}

func manyCanPutTheBatches(f *fixture) {
	f.open()
	for _, err := range race(func(n int) error {
		return errors.Join(f.PutBatch(f.ctx(), newBatch(n)), f.PutBatch(f.ctx(), newBatch(100)))
	}) {
		f.noError(err)
	}
	for n := range racers {
		f.same("batch", f.batch(n), newBatch(n))
	}
}

func anAbortBesidePutsLeavesNo(f *fixture) {
	f.fill(racers, 0)
	errs := race(func(n int) error {
		if n == 0 {
			_, err := f.AbortImport(f.ctx(), importID)
			return err
		}
		return f.PutBatch(f.ctx(), newBatch(racers+n-1))
	})
	f.noError(errs[0])
	for n, err := range errs[1:] {
		if err != nil {
			f.wantError(err, store.ErrAborted)
		}
		_, err := f.Batch(f.ctx(), batchID(racers+n))
		f.wantError(err, store.ErrNotFound)
	}
}

func ofManyDifferentReceiptsOfOne(f *fixture) {
	winner := f.oneWinner(race(func(n int) error {
		r := newReceipt(1, 1)
		r.Signed = result(n)
		return f.PutReceipt(f.ctx(), r)
	}), store.ErrDiffers)
	got, err := f.Receipt(f.ctx(), newReceipt(1, 1).Ref)
	f.noError(err)
	f.same("receipt", got.Signed, result(winner))
}

func manyCanPutTheSameKeys(f *fixture) {
	var keys []store.Key
	for n := range 70 {
		keys = append(keys, newKey(n))
	}
	for _, err := range race(func(int) error { return f.PutKeys(f.ctx(), keys) }) {
		f.noError(err)
	}
	f.same("lease", f.lease(69), store.Lease{KeyID: keyID(69), Pool: pool})
}

func oneClaimMadeManyTimes(f *fixture) {
	f.fill(1, 1)
	c := f.claimOf(0, 0, "p1")
	claimed := make([]store.Batch, racers)
	for _, err := range race(func(n int) (err error) { claimed[n], err = f.Claim(f.ctx(), c); return err }) {
		f.noError(err)
	}
	for _, b := range claimed {
		f.same("batch", b, f.batch(0))
	}
	f.same("fence", f.batch(0).Fence, record.Fence(1))
}

// shareKeys runs workers that claim whatever they can until all is signed.
func shareKeys(f *fixture) {
	const batches, keys = 24, 3
	f.fill(batches, keys)
	for _, err := range race(func(n int) error { return work(f, n, batches, keys) }) {
		f.noError(err)
	}
	type use struct {
		key   record.KeyID
		fence record.Fence
	}
	uses := map[use]bool{}
	stamps := map[record.KeyID]uint64{}
	for n := range batches {
		b := f.batch(n)
		f.same("state", b.State, record.Signed)
		u := use{b.KeyID, b.KeyFence}
		if uses[u] {
			f.Errorf("two batches have the fence %d of one key", b.KeyFence)
		}
		uses[u] = true
		stamps[b.KeyID] = max(stamps[b.KeyID], b.Used)
		got, err := f.Result(f.ctx(), batchID(n))
		f.noError(err)
		f.same("result", string(got), b.Owner)
	}
	for n := range keys {
		l := f.lease(n)
		f.same("idle", l.Idle(), true)
		f.same("stamp", l.Used, stamps[l.KeyID])
	}
}

func work(f *fixture, worker, batches, keys int) error {
	for round := 0; ; round++ {
		signed := 0
		for n := range batches {
			b, err := f.Batch(f.ctx(), batchID((n+worker)%batches))
			if err != nil {
				return err
			}
			switch b.State {
			case record.Signed:
				signed++
			case record.Ready:
				if err := signOne(f, b, worker, (round+worker)%keys); err != nil {
					return err
				}
			case record.Claimed, record.Quarantined, record.Refused:
			}
		}
		if signed == batches {
			return nil
		}
	}
}

func signOne(f *fixture, b store.Batch, worker, key int) error {
	l, err := f.Lease(f.ctx(), keyID(key))
	if err != nil || !l.Idle() {
		return err
	}
	owner := fmt.Sprintf("p%d", worker)
	claimed, err := f.Claim(f.ctx(), store.Claim{
		Batch: b, KeyID: l.KeyID, KeySeen: l.Fence, Owner: owner, ClaimID: fmt.Sprintf("%s-%s-%d", owner, b.ID, l.Fence),
		BootID: bootID(1), Used: l.Used + 1, Now: at(1), Next: at(2),
	})
	if errors.Is(err, store.ErrTaken) {
		return nil
	}
	if err != nil {
		return err
	}
	return f.Commit(f.ctx(), store.Commit{Batch: claimed, Result: []byte(owner), Now: at(3)})
}
