package storetest

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/anishathalye/porcupine"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

// CheckLeases checks what the history says of each key by itself: it is held for
// one batch at a time, under fences that grow by one, and whoever was taken over
// gives nothing back. It needs no cells, so production code may have made it.
func (h *History) CheckLeases(t *testing.T) Verdict {
	t.Helper()
	part := func(call any) string {
		switch c := call.(type) {
		case claimCall:
			return c.KeyID.String()
		case commitCall:
			return c.Batch.KeyID.String()
		case releaseCall:
			return c.KeyID.String()
		case leaseCall:
			return c.id.String()
		}
		return ""
	}
	return h.check(t, "key", part, func(string) porcupine.Model { return keyModel() })
}

type keyState struct {
	fence  record.Fence
	holder record.BatchID
	lost   string // fences that were taken over
}

func (k keyState) isLost(f record.Fence) bool {
	return strings.Contains(k.lost, fmt.Sprintf(" %d ", f))
}

func (k keyState) heldBy(b *store.Batch) bool { return k.holder == b.ID && k.fence == b.KeyFence }

func keyModel() porcupine.Model {
	return porcupine.Model{
		Init: func() any { return keyState{} },
		Step: func(state, input, output any) (bool, any) {
			k, _ := state.(keyState)
			out, _ := output.(answer)
			switch in := input.(type) {
			case claimCall:
				return k.claim(&in.Claim, out)
			case commitCall:
				return k.giveUp(&in.Batch, out)
			case releaseCall:
				return k.giveUp(&in.Batch, out)
			case leaseCall:
				want := leaseState{fence: k.fence, holder: nobody}
				if k.holder != "" {
					want.holder = batchNumber(k.holder) % cellSize
				}
				return settle(k, k, answer{value: want}, out)
			}
			return false, k
		},
		DescribeOperation: describe,
		DescribeState:     func(state any) string { return fmt.Sprintf("%+v", state) },
	}
}

// claim may be refused for its batch, of which this model knows nothing.
func (k keyState) claim(c *store.Claim, out answer) (bool, any) {
	if out.refused != nil {
		return errors.Is(out.refused, store.ErrTaken), k
	}
	free := k.holder == "" && !c.TakeOver || k.holder == c.Batch.ID && c.TakeOver
	if k.fence != c.KeySeen || !free {
		again := k.fence == c.KeySeen+1 && k.holder == c.Batch.ID
		return out.unknown || again, k
	}
	if c.TakeOver {
		k.lost += fmt.Sprintf(" %d ", k.fence)
	}
	k.fence, k.holder = k.fence+1, c.Batch.ID
	return true, k
}

// giveUp is a commit or a release. Control and lease change together, so who
// holds the key is not refused.
func (k keyState) giveUp(b *store.Batch, out answer) (bool, any) {
	held := k.heldBy(b)
	switch {
	case out.refused != nil:
		return !held && errors.Is(out.refused, store.ErrFenced), k
	case held:
		k.holder = ""
		return true, k
	}
	again := b.KeyFence <= k.fence && !k.isLost(b.KeyFence)
	return out.unknown || again, k
}
