package sim_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/memory"
)

// errUnknown is what the SDK says when it does not know.
var errUnknown = errors.New("sim: no answer")

// view is the tables as one parent reaches them: calls take time, fail in every
// way that there is, and have their effect at one moment of their own.
type view struct {
	*memory.Store
	p *parent
}

// weights make more of those calls fail that are rare or decide something.
var weights = map[string]float64{
	"ready": 0.2, "idle": 0.2, "batch": 2, "lease": 2, "payload": 1.5, "claim": 4, "commit": 4, "release": 8, "note_crash": 40,
	"key": 4, "keyring": 4, "put_receipt": 2, "open_import": 2, "finish_import": 3, "put_payload": 2,
	"ticket": 3, "sign": 7, "probe": 10, "cancel": 10, "fence": 10, "load": 6,
}

// duelFaults happen in two of five of those calls of a duel: a parent stands still
// with a new claim in its hands, a connection ends while the enclave signs.
var duelFaults = map[string]fault{"claim": stopsAfter, "sign": cutMidway}

// draw decides about one call.
func (p *parent) draw(r *rand.Rand, step string, possible []fault) fault {
	rate := p.w.plan.rate
	if m := weights[step]; m > 0 {
		rate = min(m*rate, 0.35)
	}
	if duelFaults[step] != fine && p.w.plan.duel {
		rate = 0.4
	}
	if r.Float64() >= rate || p.w.isCalm() {
		return fine
	}
	f := possible[r.IntN(len(possible))]
	if d := duelFaults[step]; p.w.plan.duel && d != fine {
		f = d
	}
	if p.w.plan.calm && f != throttled && f != failed && f != answerLost && f != conflict {
		return fine
	}
	p.w.cover.add(f, step, 1)
	return f
}

// faultsOf lists what may happen at a call of the tables.
func faultsOf(step string) []fault {
	for _, s := range transaction {
		if s == step {
			return append([]fault{conflict}, storeFaults...)
		}
	}
	return storeFaults
}

// through makes one call. Its effect, with what the judge sees of it, is atomic.
func through[T any](ctx context.Context, v *view, step, about string, do func() (T, error)) (T, error) {
	var none T
	p := v.p
	r := p.w.dice.of(p.name + " " + step + " " + about)
	before, after := upTo(r, 10*time.Millisecond), upTo(r, 10*time.Millisecond)
	f := p.draw(r, step, faultsOf(step))
	p.suffer(r, f, diesBefore, stopsBefore)
	if err := p.travel(ctx, before); err != nil {
		return none, fmt.Errorf("%s: %w", step, err)
	}
	switch f { //nolint:exhaustive // the others come later
	case throttled:
		return none, fmt.Errorf("%s: %w", step, store.ErrThrottled)
	case conflict, failed:
		return none, fmt.Errorf("%s: %w", step, errUnknown)
	}
	p.w.mu.Lock()
	value, err := do()
	p.w.trace.add(p.w.start, p.name, step, about, outcome(err))
	p.w.mu.Unlock()
	p.suffer(r, f, diesAfter, stopsAfter)
	if err := p.travel(ctx, after); err != nil {
		return none, fmt.Errorf("%s: %w", step, err)
	}
	if f == answerLost {
		return none, fmt.Errorf("%s: %w", step, errUnknown)
	}
	return value, err
}

// suffer makes the parent die or stand still where f is that.
func (p *parent) suffer(r *rand.Rand, f, death, halt fault) {
	switch f { //nolint:exhaustive // the others are no business of the parent
	case death:
		p.die()
	case halt:
		most := []time.Duration{longLease, 3 * longLease}[r.IntN(2)]
		if p.w.plan.duel {
			most = longLease
		}
		p.standStill(upTo(r, most))
	}
}

func through0(ctx context.Context, v *view, step, about string, do func() error) error {
	_, err := through(ctx, v, step, about, func() (struct{}, error) { return struct{}{}, do() })
	return err
}

// outcome is a word for the trace: no text with random bytes.
func outcome(err error) string {
	for _, e := range []error{store.ErrNotFound, store.ErrFenced, store.ErrTaken, store.ErrDiffers, store.ErrAborted} {
		if errors.Is(err, e) {
			return e.Error()
		}
	}
	if err != nil {
		return "error"
	}
	return "ok"
}

func (v *view) Ready(ctx context.Context, shard int, until time.Time, limit int, page string) (store.ReadyPage, error) {
	return through(ctx, v, "ready", fmt.Sprint(shard, page), func() (store.ReadyPage, error) {
		v.p.w.noteLag("ready")
		return v.Store.Ready(ctx, shard, until, limit, page)
	})
}

func (v *view) Idle(ctx context.Context, pool string, shard, limit int) ([]store.IdleKey, error) {
	return through(ctx, v, "idle", fmt.Sprint(shard), func() ([]store.IdleKey, error) {
		v.p.w.noteLag("idle")
		return v.Store.Idle(ctx, pool, shard, limit)
	})
}

// noteLag counts queries that may have been answered from the past.
func (w *world) noteLag(step string) {
	if w.plan.lag > 0 && !w.calm {
		w.cover.add(staleIndex, step, 1)
	}
}

func (v *view) Batch(ctx context.Context, id record.BatchID) (store.Batch, error) {
	return through(ctx, v, "batch", string(id), func() (store.Batch, error) { return v.Store.Batch(ctx, id) })
}

func (v *view) Payload(ctx context.Context, id record.BatchID) ([]byte, error) {
	v.p.w.dice.worksOn(v.p.name + " works on " + string(id))
	return through(ctx, v, "payload", string(id), func() ([]byte, error) { return v.Store.Payload(ctx, id) })
}

func (v *view) Lease(ctx context.Context, id record.KeyID) (store.Lease, error) {
	return through(ctx, v, "lease", id.String(), func() (store.Lease, error) { return v.Store.Lease(ctx, id) })
}

func (v *view) Claim(ctx context.Context, c store.Claim) (store.Batch, error) {
	about := fmt.Sprintf("%s %s fence %d", c.Batch.ID, c.KeyID, c.KeySeen+1)
	chosen := time.Now()
	return through(ctx, v, "claim", about, func() (store.Batch, error) {
		return v.p.w.judge.claim(v.p, c, chosen, func() (store.Batch, error) { return v.Store.Claim(ctx, c) })
	})
}

func (v *view) Commit(ctx context.Context, c store.Commit) (err error) {
	about := fmt.Sprintf("%s %s fence %d", c.Batch.ID, c.Batch.KeyID, c.Batch.KeyFence)
	defer v.p.w.judge.freeing(c.Batch.KeyID)(&err)
	return through0(ctx, v, "commit", about, func() error {
		return v.p.w.judge.commit(c, func() error { return v.Store.Commit(ctx, c) })
	})
}

func (v *view) Release(ctx context.Context, b store.Batch, e store.End) (err error) {
	about := fmt.Sprintf("%s fence %d to %s: %s", b.ID, b.KeyFence, e.State, e.Reason)
	defer v.p.w.judge.freeing(b.KeyID)(&err)
	return through0(ctx, v, "release", about, func() error { return v.Store.Release(ctx, b, e) })
}

func (v *view) NoteCrash(ctx context.Context, b store.Batch, crashed []uint32) error {
	return through0(ctx, v, "note_crash", fmt.Sprint(b.ID, crashed), func() error { return v.Store.NoteCrash(ctx, b, crashed) })
}

func (v *view) PutReceipt(ctx context.Context, r store.Receipt) error {
	about := fmt.Sprintf("%s lane %d seq %d", v.p.w.trace.boot(r.Ref.BootID), r.Ref.Lane, r.Ref.Seq)
	return through0(ctx, v, "put_receipt", about, func() error { return v.Store.PutReceipt(ctx, r) })
}

func (v *view) PutBoot(ctx context.Context, b store.Boot) error {
	return through0(ctx, v, "put_boot", v.p.w.trace.boot(b.ID), func() error { return v.Store.PutBoot(ctx, b) })
}

func (v *view) Key(ctx context.Context, id record.KeyID) (store.Key, error) {
	return through(ctx, v, "key", id.String(), func() (store.Key, error) { return v.Store.Key(ctx, id) })
}

func (v *view) Keyring(ctx context.Context, id string) ([]byte, error) {
	return through(ctx, v, "keyring", "", func() ([]byte, error) { return v.Store.Keyring(ctx, id) })
}

func (v *view) OpenImport(ctx context.Context, i store.Import) (store.Import, error) {
	return through(ctx, v, "open_import", string(i.ID), func() (store.Import, error) { return v.Store.OpenImport(ctx, i) })
}

func (v *view) ReserveRecord(ctx context.Context, ref store.RecordRef, over *store.RecordRef) (store.RecordRef, error) {
	return through(ctx, v, "reserve", ref.ID, func() (store.RecordRef, error) { return v.Store.ReserveRecord(ctx, ref, over) })
}

func (v *view) PutPayload(ctx context.Context, id record.BatchID, payload []byte) ([]byte, error) {
	return through(ctx, v, "put_payload", string(id), func() ([]byte, error) { return v.Store.PutPayload(ctx, id, payload) })
}

func (v *view) PutBatch(ctx context.Context, b store.Batch) error {
	return through0(ctx, v, "put_batch", string(b.ID), func() error { return v.Store.PutBatch(ctx, b) })
}

func (v *view) FinishImport(ctx context.Context, i store.Import) error {
	return through0(ctx, v, "finish_import", string(i.ID), func() error { return v.Store.FinishImport(ctx, i) })
}
