package storetest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strconv"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

// workload is what clients do at random, and what their histories are held against.
type workload struct {
	name  string
	fill  func(*fixture)
	act   func(context.Context, *actor)
	part  func(call any) string
	model func(part string) porcupine.Model
}

// actor is one client. Errors are no concern of it: the history has them.
type actor struct {
	store.Store
	name string
	r    *rand.Rand
	step int
	held []store.Batch // claims it made; older ones are those of a zombie
	last *store.Claim  // made again where its answer was lost
}

const cells = 3

func queueWorkload() workload {
	return workload{
		name: "queue",
		fill: func(f *fixture) { f.fill(cells*cellSize, cells*cellSize) },
		act:  actOnQueue,
		part: func(call any) string { return strconv.Itoa(cellOf(call)) },
		model: func(part string) porcupine.Model {
			n, _ := strconv.Atoi(part) // as Itoa made it
			return queueModel(n)
		},
	}
}

func actOnQueue(ctx context.Context, a *actor) {
	n := a.r.IntN(cells * cellSize)
	id := batchID(n)
	switch x := a.r.IntN(10); {
	case x < 4 && len(a.held) > 0:
		a.end(ctx)
	case x == 4:
		_, _ = a.Result(ctx, id)
	case x == 5 && a.last != nil:
		a.claim(ctx, *a.last)
	default:
		b, err := a.Batch(ctx, id)
		if err != nil {
			return
		}
		switch b.State {
		case record.Ready, record.Claimed:
			a.take(ctx, n, b)
		case record.Quarantined:
			_ = a.Requeue(ctx, id, a.moment())
		case record.Signed, record.Refused:
			_, _ = a.Result(ctx, id)
		}
	}
}

// moment differs from every other.
func (a *actor) moment() time.Time { return at(1000 + a.step*100 + int(a.name[1])) }

func (a *actor) take(ctx context.Context, n int, b store.Batch) {
	key := b.KeyID
	if key.IsZero() || a.r.IntN(8) == 0 {
		key = keyID(n/cellSize*cellSize + a.r.IntN(cellSize))
	}
	l, err := a.Lease(ctx, key)
	if err != nil {
		return
	}
	a.claim(ctx, store.Claim{
		Batch: b, KeyID: key, KeySeen: l.Fence, TakeOver: b.State == record.Claimed, Owner: a.name,
		ClaimID: fmt.Sprintf("%s-%d", a.name, a.step), BootID: bootID(1), Used: l.Used + 1, Now: a.moment(), Next: a.moment(),
	})
}

func (a *actor) claim(ctx context.Context, c store.Claim) {
	b, err := a.Claim(ctx, c)
	a.last = &c
	if err == nil {
		a.held = append(a.held, b)
	}
}

// end a claim, mostly the newest, and sometimes again.
func (a *actor) end(ctx context.Context) {
	i := len(a.held) - 1
	if a.r.IntN(3) == 0 {
		i = a.r.IntN(len(a.held))
	}
	b := a.held[i]
	switch a.r.IntN(8) {
	case 0:
		_ = a.Commit(ctx, store.Commit{
			Batch: b, Result: []byte(b.ClaimID), Refused: 1, Now: at(1),
			Receipt: store.ReceiptRef{BootID: bootID(1), Lane: 1, Seq: uint64(b.Fence)},
		})
	case 1, 2:
		_ = a.NoteCrash(ctx, b, []uint32{uint32(a.r.IntN(8))}) //nolint:gosec // small
	case 3:
		_ = a.Release(ctx, b, store.End{State: record.Quarantined, Reason: "quarantined", Attempt: true, KeepKey: true, Now: a.moment()})
	default:
		_ = a.Release(ctx, b, store.End{
			State: record.Ready, Reason: "reason", Attempt: a.r.IntN(2) == 0, KeepKey: a.r.IntN(2) == 0, Now: a.moment(),
		})
	}
}

const imports = 3

func importWorkload() workload {
	return workload{
		name: "import",
		fill: func(*fixture) {},
		act:  actOnImport,
		part: func(call any) string {
			switch c := call.(type) {
			case openCall:
				return string(c.ID)
			case finishCall:
				return string(c.ID)
			case putCall:
				return string(c.ImportID)
			case abortCall:
				return string(c.id)
			case sweepCall:
				return string(c.id)
			case importCall:
				return string(c.id)
			case batchCall:
				id, _, _ := c.id.Split() // of MakeBatchID
				return string(id)
			}
			return ""
		},
		model: func(string) porcupine.Model { return importModel() },
	}
}

func actOnImport(ctx context.Context, a *actor) {
	i := newImport()
	i.ID = record.ImportID(fmt.Sprintf("import-%d", a.r.IntN(imports)))
	i.InputHash = hash(octet(1 + a.r.IntN(8)/7)) // mostly the same
	n := a.r.IntN(importBatches)
	b := newBatch(n)
	b.ImportID, b.ID, b.PayloadRoot = i.ID, record.MakeBatchID(i.ID, n), hash(octet(1+a.r.IntN(8)/7))
	switch x := a.r.IntN(24); {
	case x < 4 || a.step == 0:
		_, _ = a.OpenImport(ctx, i)
	case x < 13:
		_ = a.PutBatch(ctx, b)
	case x < 18:
		_, _ = a.Batch(ctx, b.ID)
	case x < 22:
		_, _ = a.Import(ctx, i.ID)
	case x < 23 && a.step > 4:
		i.Batches = 1 + a.r.IntN(8)/7
		_ = a.FinishImport(ctx, i)
	case a.step > 4:
		_, _ = a.AbortImport(ctx, i.ID)
	}
}

func reserveWorkload() workload {
	return workload{
		name: "reserve",
		fill: func(*fixture) {},
		act: func(ctx context.Context, a *actor) {
			id := fmt.Sprintf("record-%d", a.r.IntN(cells))
			if a.r.IntN(3) == 0 {
				_, _ = a.Record(ctx, id)
				return
			}
			ref := newRef(0, 1+a.step*10+int(a.name[1]-'0')) // later ones are larger
			ref.ID = id
			holder, err := a.ReserveRecord(ctx, ref, nil)
			if err == nil && holder.Index < ref.Index && a.r.IntN(2) == 0 {
				_, _ = a.ReserveRecord(ctx, ref, &holder)
			}
		},
		part: func(call any) string {
			switch c := call.(type) {
			case reserveCall:
				return c.ref.ID
			case recordCall:
				return c.id
			}
			return ""
		},
		model: func(string) porcupine.Model { return recordModel() },
	}
}

func onceWorkload() workload {
	return workload{
		name: "once",
		fill: func(*fixture) {},
		act:  actOnce,
		part: func(call any) string {
			switch c := call.(type) {
			case onceCall:
				return c.name
			case lookCall:
				return c.name
			}
			return ""
		},
		model: func(string) porcupine.Model { return onceModel() },
	}
}

func actOnce(ctx context.Context, a *actor) {
	n, content := a.r.IntN(cells), fmt.Appendf(nil, "by %s", a.name)
	r := newReceipt(uint32(n), 1) //nolint:gosec // small
	r.Signed = content
	ring := fmt.Sprintf("ring-%d", n)
	switch a.r.IntN(6) {
	case 0:
		_, _ = a.PutPayload(ctx, batchID(n), content)
	case 1:
		_, _ = a.Payload(ctx, batchID(n))
	case 2:
		_ = a.PutReceipt(ctx, r)
	case 3:
		_, _ = a.Receipt(ctx, r.Ref)
	case 4:
		_ = a.PutKeyring(ctx, ring, content)
	default:
		_, _ = a.Keyring(ctx, ring)
	}
}
