package sign

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

// Sign signs one batch and releases its outcomes with a receipt, or tries one
// record of it and releases nothing.
//
// Deadline and fence are checked on entry, while signing, and once more between
// the last signature and the receipt; passing that last check is the release.
// The deadline counts from the ticket, which is older than the claim, so it
// holds through any pause of the parent.
func (e *Engine) Sign(ctx context.Context, lane *Lane, m *wire.Sign) (*wire.SignReply, error) {
	o := e.open.Load()
	if o == nil {
		return nil, refusal.NoKeyring
	}
	if err := e.lanes.ackOwn(lane, m.Ack); err != nil {
		return nil, err
	}
	deadline, err := e.deadline(o.cfg.Lease, m)
	if err != nil {
		return nil, err
	}
	if e.lanes.full(lane) {
		return nil, refusal.LaneFull
	}
	b, err := newBatch(o, m)
	if err != nil {
		return nil, err
	}
	leave, err := e.gates.enter(ctx, m.KeyID, m.KeyFence, b.use(), deadline-e.clock.Mono())
	if err != nil {
		return nil, fmt.Errorf("use key: %w", err)
	}
	defer leave()
	together, err := e.alone.enter(ctx, m.Alone, deadline-e.clock.Mono())
	if err != nil {
		return nil, fmt.Errorf("wait for other batches: %w", err)
	}
	defer together()

	current := func() error {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("sign batch: %w", err)
		}
		if e.clock.Mono() >= deadline {
			return refusal.Deadline
		}
		return e.gates.check(m.KeyID, m.KeyFence)
	}
	if m.Probe != wire.NoProbe {
		if err := e.probe(b, m.Probe, current); err != nil {
			return nil, err
		}
		return &wire.SignReply{Result: []byte{}, Receipt: []byte{}, Ticket: e.Ticket()}, nil
	}
	outcomes, err := e.signAll(b, current)
	if err != nil {
		return nil, err
	}
	return e.release(ctx, lane, b, outcomes, current)
}

// deadline is the moment on Clock.Mono after which nothing of m is released.
func (e *Engine) deadline(limit config.LeaseLimit, m *wire.Sign) (time.Duration, error) {
	issued, err := e.tickets.open(m.Ticket)
	if err != nil {
		return 0, err
	}
	lease := time.Duration(max(0, min(m.LeaseMS, limit.MaxMS))) * time.Millisecond
	deadline := issued + lease - limit.Margin()
	if e.clock.Mono() >= deadline {
		return 0, refusal.Deadline
	}
	return deadline, nil
}

// release passes the last check and makes the receipt.
func (e *Engine) release(ctx context.Context, lane *Lane, b *batch, out []record.Outcome, current func() error) (*wire.SignReply, error) {
	m := b.request
	r := receipt.Receipt{
		Subject: receipt.SubjectBatch, BatchID: m.BatchID, ImportID: m.ImportID,
		KeyID: m.KeyID, Algorithm: b.key.Algorithm(), PublicKey: b.key.PublicKey(), PolicyHash: b.key.PolicyHash(),
		BatchFence: m.BatchFence, KeyFence: m.KeyFence, Count: uint32(len(out)), //nolint:gosec // up to record.MaxBatchSize
		PayloadRoot: b.root, ResultRoot: resultRoot(out),
	}
	result := record.EncodeResult(b.key.Algorithm().SignatureLen(), out)
	signed, err := e.lanes.release(lane, &r, func() (time.Time, error) { return e.clock.Wall(), current() })
	if err != nil {
		return nil, fmt.Errorf("release batch: %w", err)
	}
	refused := 0
	for _, o := range out {
		if o.Refusal != "" {
			refused++
			e.refusals.Add(refusal.Code(o.Refusal))
		}
	}
	e.batches.Add(1)
	e.refused.Add(uint64(refused))
	e.signed.Add(uint64(len(out) - refused))
	e.log.DebugContext(ctx, "batch signed", slog.String("batch_id", string(m.BatchID)),
		slog.Int("records", len(out)), slog.Int("refused", refused))
	return &wire.SignReply{Result: result, Receipt: signed, Ticket: e.Ticket()}, nil
}
