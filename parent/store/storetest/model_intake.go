package storetest

import (
	"errors"
	"fmt"
	"testing"

	"github.com/anishathalye/porcupine"

	"github.com/keyhold/keyhold/parent/store"
)

// importBatches is how many batches an import of these histories may have.
const importBatches = 3

// importState is an import and its batches.
type importState struct {
	state   store.ImportState // empty: there is none
	input   byte              // first of the hash
	batches int               // total, once DONE
	swept   bool              // an abort has come to its end
	roots   [importBatches]byte
}

// importView is what the model compares of an imports item.
func importView(i *store.Import) importState {
	return importState{state: i.State, input: i.InputHash[0], batches: i.Batches}
}

func (i importState) shown() importState {
	return importState{state: i.state, input: i.input, batches: i.batches}
}

func importModel() porcupine.Model {
	return porcupine.Model{
		Init: func() any { return importState{} },
		Step: func(state, input, output any) (bool, any) {
			before, _ := state.(importState)
			out, _ := output.(answer)
			if look, ok := input.(batchCall); ok {
				return before.look(batchNumber(look.id), out)
			}
			after, want := before.step(input)
			if open, ok := input.(openCall); ok && open.lost {
				return true, after
			}
			if _, sweep := input.(sweepCall); sweep && out.unknown {
				return true, before // some batches are gone, which look allows for
			}
			return settle(before, after, want, out)
		},
		DescribeOperation: describe,
		DescribeState:     func(state any) string { return fmt.Sprintf("%+v", state) },
	}
}

// CheckImports checks what the history says of each import by itself.
func (h *History) CheckImports(t *testing.T) Verdict {
	t.Helper()
	w := importWorkload()
	return h.check(t, w.name, w.part, w.model)
}

// look at a batch. Between the tombstone and the end of an abort each batch may
// be there still; one that is gone does not come back.
func (i importState) look(n int, out answer) (bool, any) {
	missing := errors.Is(out.refused, store.ErrNotFound)
	if i.roots[n] == 0 || i.state == store.ImportAborted && i.swept {
		return missing, i
	}
	if i.state == store.ImportAborted && missing {
		i.roots[n] = 0
		return true, i
	}
	shown, ok := out.value.(batchState)
	return ok && shown.fence == 0, i
}

func (i importState) step(call any) (importState, answer) {
	switch in := call.(type) {
	case openCall:
		return i.open(&in.Import)
	case putCall:
		return i.put(&in.Batch)
	case finishCall:
		return i.finish(&in.Import)
	case abortCall:
		switch i.state {
		case "":
			return i, answer{refused: store.ErrNotFound}
		case store.ImportDone:
			return i, answer{refused: store.ErrTaken}
		case store.ImportOpen, store.ImportAborted:
		}
		i.state = store.ImportAborted
		return i, answer{}
	case sweepCall:
		switch i.state {
		case "":
			return i, answer{refused: store.ErrNotFound}
		case store.ImportDone:
			return i, answer{refused: store.ErrTaken}
		case store.ImportOpen:
			return i, answer{refused: errUnmodelled} // the tombstone comes first
		case store.ImportAborted:
		}
		i.swept = true
		return i, answer{}
	case importCall:
		if i.state == "" {
			return i, answer{refused: store.ErrNotFound}
		}
		return i, answer{value: i.shown()}
	}
	return i, answer{refused: errUnmodelled}
}

func (i importState) open(in *store.Import) (importState, answer) {
	switch {
	case i.state == "":
		i.state, i.input = store.ImportOpen, in.InputHash[0]
	case i.state == store.ImportAborted:
		return i, answer{refused: store.ErrAborted}
	case i.input != in.InputHash[0]:
		return i, answer{refused: store.ErrDiffers}
	}
	return i, answer{value: i.shown()}
}

func (i importState) put(in *store.Batch) (importState, answer) {
	n, root := batchNumber(in.ID), in.PayloadRoot[0]
	switch {
	case i.state == "":
		return i, answer{refused: store.ErrNotFound}
	case i.state == store.ImportAborted:
		return i, answer{refused: store.ErrAborted}
	case i.roots[n] == root:
		return i, answer{}
	case i.roots[n] != 0:
		return i, answer{refused: store.ErrDiffers}
	case i.state == store.ImportDone:
		return i, answer{refused: store.ErrTaken}
	}
	i.roots[n] = root
	return i, answer{}
}

func (i importState) finish(in *store.Import) (importState, answer) {
	switch {
	case i.state == "":
		return i, answer{refused: store.ErrNotFound}
	case i.state == store.ImportAborted:
		return i, answer{refused: store.ErrAborted}
	case i.state == store.ImportDone && i.batches != in.Batches:
		return i, answer{refused: store.ErrDiffers}
	}
	i.state, i.batches = store.ImportDone, in.Batches
	return i, answer{}
}

// recordModel is the reservation of one record id. An id never goes back to a
// holder that lost it: only an aborted import loses ids, and it stays aborted.
func recordModel() porcupine.Model {
	return porcupine.Model{
		Init: func() any { return store.RecordRef{} },
		Step: func(state, input, output any) (bool, any) {
			holder, _ := state.(store.RecordRef)
			out, _ := output.(answer)
			switch in := input.(type) {
			case reserveCall:
				after := holder
				if holder.ID == "" || in.over != nil && holder == *in.over {
					after = in.ref
				}
				if in.lost {
					return true, after
				}
				return settle(holder, after, answer{value: after}, out)
			case recordCall:
				want := answer{value: holder}
				if holder.ID == "" {
					want = answer{refused: store.ErrNotFound}
				}
				return settle(holder, holder, want, out)
			}
			return false, state
		},
		DescribeOperation: describe,
	}
}

// onceModel is one item that is written where it is absent: a payload, a receipt,
// a keyring's header.
func onceModel() porcupine.Model {
	return porcupine.Model{
		Init: func() any { return "" },
		Step: func(state, input, output any) (bool, any) {
			content, _ := state.(string)
			out, _ := output.(answer)
			switch in := input.(type) {
			case onceCall:
				after := content
				if content == "" {
					after = in.content
				}
				switch {
				case in.returns:
					return settle(content, after, answer{value: after}, out)
				case after != in.content:
					return settle(content, content, answer{refused: store.ErrDiffers}, out)
				}
				return settle(content, after, answer{}, out)
			case lookCall:
				want := answer{value: content}
				if content == "" {
					want = answer{refused: store.ErrNotFound}
				}
				return settle(content, content, want, out)
			}
			return false, state
		},
		DescribeOperation: describe,
	}
}
