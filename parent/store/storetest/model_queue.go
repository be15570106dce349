package storetest

import (
	"errors"
	"fmt"

	"github.com/anishathalye/porcupine"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

// A cell is two batches and two keys that are claimed with each other only, so
// that its history can be checked apart from all others. This model says in its
// own words what package store promises of them: it shares no code with step.go.
const cellSize = 2

const nobody = -1 // no key, or no batch, of the cell

type batchState struct {
	state    record.State
	key      int // of the cell
	fence    record.Fence
	keyFence record.Fence
	claim    string
	owner    string
	attempts int
	history  int    // attempts that are kept
	crashed  uint64 // a bit for each record
	visible  int64  // Unix nanoseconds, 0 once signed
	result   string
	refused  int
	receipt  uint64 // seq
}

type leaseState struct {
	fence  record.Fence
	holder int // batch of the cell
}

type cell struct {
	batches [cellSize]batchState
	leases  [cellSize]leaseState
}

// newCell is a cell as fill makes it; batch n becomes visible at(n).
func newCell(n int) cell {
	var c cell
	for i := range cellSize {
		c.batches[i] = batchState{state: record.Ready, key: nobody, visible: at(n*cellSize + i).UnixNano()}
		c.leases[i] = leaseState{holder: nobody}
	}
	return c
}

func batchNumber(id record.BatchID) int {
	_, n, err := id.Split()
	if err != nil {
		return nobody
	}
	return n
}

func keyNumber(id record.KeyID) int {
	if id.IsZero() {
		return nobody
	}
	return int(id[1])
}

func placeOfKey(id record.KeyID) int {
	if n := keyNumber(id); n != nobody {
		return n % cellSize
	}
	return nobody
}

func mask(crashed []uint32) (m uint64) {
	for _, i := range crashed {
		m |= 1 << i
	}
	return m
}

// seen is what a control item shows of a batch; the result is another item.
func seen(b *store.Batch) batchState {
	v := batchState{
		state: b.State, key: placeOfKey(b.KeyID), fence: b.Fence, keyFence: b.KeyFence, claim: b.ClaimID, owner: b.Owner,
		attempts: b.Attempts, history: len(b.History), crashed: mask(b.Crashed), refused: b.Refused, receipt: b.Receipt.Seq,
	}
	if !b.VisibleAt.IsZero() {
		v.visible = b.VisibleAt.UnixNano()
	}
	return v
}

func (b batchState) shown() batchState {
	b.result = ""
	return b
}

// cellOf is the cell that a call is about.
func cellOf(call any) int {
	switch c := call.(type) {
	case claimCall:
		return batchNumber(c.Batch.ID) / cellSize
	case commitCall:
		return batchNumber(c.Batch.ID) / cellSize
	case releaseCall:
		return batchNumber(c.ID) / cellSize
	case crashCall:
		return batchNumber(c.ID) / cellSize
	case requeueCall:
		return batchNumber(c.id) / cellSize
	case batchCall:
		return batchNumber(c.id) / cellSize
	case resultCall:
		return batchNumber(c.id) / cellSize
	case leaseCall:
		return keyNumber(c.id) / cellSize
	}
	return nobody
}

// queueModel is one cell.
func queueModel(n int) porcupine.Model {
	return porcupine.Model{
		Init: func() any { return newCell(n) },
		Step: func(state, input, output any) (bool, any) {
			before, _ := state.(cell)
			out, _ := output.(answer)
			after, want := before.step(input)
			return settle(before, after, want, out)
		},
		DescribeOperation: describe,
		DescribeState:     func(state any) string { return fmt.Sprintf("%+v", state) },
	}
}

// settle compares an answer with what the model wants. Of an unknown outcome
// only the effect is taken: its place in time is anywhere, also after the last
// read, which is as if it never came to pass.
func settle[S any](before, after S, want, out answer) (bool, any) {
	switch {
	case out.unknown && want.refused != nil:
		return true, before
	case out.unknown:
		return true, after
	case want.refused != nil:
		return errors.Is(out.refused, want.refused), before
	}
	return out.refused == nil && out.value == want.value, after
}

// step is what one call makes of a cell, and what it answers.
func (c cell) step(call any) (cell, answer) {
	switch in := call.(type) {
	case claimCall:
		return c.claim(&in.Claim)
	case commitCall:
		return c.commit(&in.Commit)
	case releaseCall:
		return c.release(&in.Batch, &in.end)
	case crashCall:
		i := batchNumber(in.ID) % cellSize
		if !c.batches[i].heldUnder(&in.Batch) {
			return c, answer{refused: store.ErrFenced}
		}
		c.batches[i].crashed |= mask(in.crashed)
		return c, answer{}
	case requeueCall:
		return c.requeue(&in)
	case batchCall:
		return c, answer{value: c.batches[batchNumber(in.id)%cellSize].shown()}
	case leaseCall:
		return c, answer{value: c.leases[placeOfKey(in.id)]}
	case resultCall:
		if r := c.batches[batchNumber(in.id)%cellSize].result; r != "" {
			return c, answer{value: r}
		}
		return c, answer{refused: store.ErrNotFound}
	}
	return c, answer{refused: errUnmodelled}
}

var errUnmodelled = errors.New("storetest: no such call in this model")

func (c cell) claim(in *store.Claim) (cell, answer) {
	i, k := batchNumber(in.Batch.ID)%cellSize, placeOfKey(in.KeyID)
	b, l := &c.batches[i], &c.leases[k]
	if b.state == record.Claimed && b.fence == in.Batch.Fence+1 && b.claim == in.ClaimID && b.key == k {
		return c, answer{value: b.shown()} // the same claim again
	}
	free := l.holder == nobody
	if in.TakeOver {
		free = l.holder == i
	}
	open := b.state == record.Ready || b.state == record.Claimed
	if !open || b.state != in.Batch.State || b.fence != in.Batch.Fence || b.crashed != mask(in.Batch.Crashed) ||
		b.key != nobody && b.key != k || l.fence != in.KeySeen || !free {
		return c, answer{refused: store.ErrTaken}
	}
	l.fence++
	l.holder = i
	b.fence++
	b.state, b.key, b.keyFence, b.claim, b.owner = record.Claimed, k, l.fence, in.ClaimID, in.Owner
	b.attempts++
	b.history = min(b.history+1, store.KeptAttempts)
	b.visible = in.Next.UnixNano()
	return c, answer{value: b.shown()}
}

// newestClaim reports whether held is the newest claim there was of b.
func (b *batchState) newestClaim(held *store.Batch) bool {
	return b.fence == held.Fence && b.claim == held.ClaimID
}

func (b *batchState) heldUnder(held *store.Batch) bool {
	return b.state == record.Claimed && b.newestClaim(held) && b.keyFence == held.KeyFence && b.key == placeOfKey(held.KeyID)
}

func (c cell) commit(in *store.Commit) (cell, answer) {
	i := batchNumber(in.Batch.ID) % cellSize
	b := &c.batches[i]
	again := b.state == record.Signed && b.newestClaim(&in.Batch) && b.result == string(in.Result) &&
		b.refused == in.Refused && b.receipt == in.Receipt.Seq
	if again {
		return c, answer{}
	}
	if !b.heldUnder(&in.Batch) || b.result != "" {
		return c, answer{refused: store.ErrFenced}
	}
	c.leases[b.key].holder = nobody
	b.state, b.visible = record.Signed, 0
	b.result, b.refused, b.receipt = string(in.Result), in.Refused, in.Receipt.Seq
	return c, answer{}
}

func (c cell) release(held *store.Batch, e *store.End) (cell, answer) {
	b := &c.batches[batchNumber(held.ID)%cellSize]
	requeued := e.State == record.Quarantined && b.state == record.Ready && b.attempts == 0
	if b.newestClaim(held) && (b.state == e.State || requeued) {
		return c, answer{} // given up before
	}
	if !b.heldUnder(held) {
		return c, answer{refused: store.ErrFenced}
	}
	c.leases[b.key].holder = nobody
	first := b.history <= 1
	if !e.Attempt {
		b.attempts--
		b.history--
	}
	if !e.KeepKey && first {
		b.key = nobody
	}
	b.state, b.visible = e.State, e.Now.UnixNano()
	return c, answer{}
}

func (c cell) requeue(in *requeueCall) (cell, answer) {
	b := &c.batches[batchNumber(in.id)%cellSize]
	switch {
	case b.state == record.Ready && b.fence > 0 && b.attempts == 0 && b.visible == in.now.UnixNano():
		return c, answer{}
	case b.state != record.Quarantined:
		return c, answer{refused: store.ErrTaken}
	}
	b.state, b.attempts, b.crashed, b.visible = record.Ready, 0, 0, in.now.UnixNano()
	return c, answer{}
}

// shownTo turns what a store returned into what the models compare.
func shownTo(out answer) answer {
	switch v := out.value.(type) {
	case store.Batch:
		out.value = seen(&v)
	case store.Lease:
		l := leaseState{fence: v.Fence, holder: nobody}
		if !v.Idle() {
			l.holder = batchNumber(v.BatchID) % cellSize
		}
		out.value = l
	case store.Import:
		out.value = importView(&v)
	case []byte:
		out.value = string(v)
	case int:
		out.value = nil // how many batches an abort left: none of them was ever claimed
	}
	return out
}
