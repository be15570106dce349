// Package pipeline carries batches from READY to SIGNED: it claims a batch with
// a key, has an enclave sign it, stores the receipt and commits the result. It
// gives nothing back that an enclave could still release, and never guesses what
// became of a write.
package pipeline

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/signclient"
	"github.com/keyhold/keyhold/parent/store"
)

// Attempts that a batch has behind it when it is handled with more care.
const (
	aloneFrom    = 1 // it runs alone on its enclave
	probeFrom    = 3 // record by record first
	quarantineAt = 5
)

// spent reports whether a batch has no attempt left. Those that found a record
// which takes the enclave down got it further and do not count, so a batch with
// many of them still ends SIGNED.
func spent(b *store.Batch) bool { return b.Attempts-len(b.Crashed) >= quarantineAt }

// Reasons in Attempt.End that are no refusal codes.
const (
	reasonShutdown  = "shutdown"
	reasonNotSent   = "not_sent"
	reasonCancelled = "connection_lost" // and then cancelled
	reasonNoPayload = "payload_missing"
)

// worker is one connection to one enclave, and the two slots on it.
type worker struct {
	p          *pipeline
	enclave    Enclave
	gate       *semaphore.Weighted // of the enclave: a suspect takes all of it, so that only it can go down
	connecting chan struct{}       // held while now is looked at or made
	now        *session
}

// carry brings one claim to its end: sign, receipt, commit. It reports whether
// the batch is signed or refused for good.
func (w *worker) carry(ctx, work context.Context, s *session, c *claim) bool {
	defer w.p.claim.leave(c)
	payload, err := w.payload(work, c)
	if err != nil {
		return w.giveBack(work, c, errors.Is(err, store.ErrNotFound), reasonNoPayload)
	}
	leave, err := s.enter(work)
	if err != nil {
		return w.drop(work, c)
	}
	if ctx.Err() != nil {
		leave()
		return w.giveBack(work, c, false, reasonShutdown)
	}
	reply, err := w.sign(work, s, c, payload)
	var r *receipt.Receipt
	if err == nil {
		r, err = s.deliver(work, reply.Receipt)
	}
	leave()
	if err != nil {
		return w.without(work, s, c, err)
	}
	refused, err := check(c, reply, r)
	if err != nil {
		return w.without(work, s, c, err)
	}
	ref := store.ReceiptRef{BootID: r.BootID, Lane: r.Lane, Seq: r.Seq}
	return w.commit(work, c, store.Commit{Batch: c.Batch, Result: reply.Result, Refused: refused, Receipt: ref})
}

// payload reads what is to be signed, while others claim.
func (w *worker) payload(ctx context.Context, c *claim) (payload []byte, err error) {
	err = w.p.insist(ctx, "read payload", func(ctx context.Context) error {
		payload, err = w.p.Store.Payload(ctx, c.ID)
		return err
	})
	return payload, err
}

// sign has the batch signed. A suspect has the enclave for itself, and one that
// came here often is tried record by record before.
func (w *worker) sign(ctx context.Context, s *session, c *claim, payload []byte) (*wire.SignReply, error) {
	behind, share := c.Attempts-1, int64(1)
	if behind >= aloneFrom {
		share = int64(w.p.Workers * inFlight)
	}
	if err := w.gate.Acquire(ctx, share); err != nil {
		return nil, fmt.Errorf("wait for the enclave: %w", err)
	}
	defer w.gate.Release(share)
	req := &wire.Sign{
		Ticket: c.ticket, BatchID: c.ID, ImportID: c.ImportID, BatchFence: c.Fence, KeyID: c.KeyID, KeyFence: c.KeyFence,
		LeaseMS: c.Lease.Milliseconds(), Kind: c.Kind, Payload: payload, Refuse: append([]uint32{}, c.Crashed...),
		Alone: behind >= aloneFrom, Probe: wire.NoProbe,
	}
	if behind >= probeFrom {
		if err := w.try(ctx, s, c, req); err != nil {
			return nil, err
		}
	}
	return w.request(ctx, s, c, req)
}

// try has each record signed alone, with nothing released. One that makes the
// enclave fail is refused from then on; the one that takes it down is noted when
// the next boot answers, see lost.
func (w *worker) try(ctx context.Context, s *session, c *claim, req *wire.Sign) error {
	for i := range c.Count {
		if slices.Contains(c.Crashed, uint32(i)) {
			continue
		}
		req.Probe = i
		_, err := w.request(ctx, s, c, req)
		if errors.Is(err, refusal.Internal) && !errors.Is(err, signclient.ErrLost) {
			err = w.noteCrash(ctx, c, i)
		}
		if err != nil {
			return err
		}
	}
	req.Probe = wire.NoProbe
	req.Refuse = append(req.Refuse[:0], c.Crashed...)
	return nil
}

// noteCrash remembers the record that is being tried for whoever claims next.
func (w *worker) noteCrash(ctx context.Context, c *claim, record int) error {
	i := uint32(record) //nolint:gosec // below record.MaxBatchSize
	err := w.p.insist(ctx, "note a crash", func(ctx context.Context) error {
		return w.p.Store.NoteCrash(ctx, c.Batch, []uint32{i})
	})
	w.p.Logger.WarnContext(ctx, "a record made the enclave fail", slog.String("batch_id", string(c.ID)),
		slog.Int("index", record), slog.Bool("noted", err == nil))
	if err != nil {
		return fmt.Errorf("note a crash: %w", err)
	}
	c.Crashed = append(c.Crashed, i)
	slices.Sort(c.Crashed)
	return nil
}

// request sends one sign and removes what the enclave says is in the way, once.
func (w *worker) request(ctx context.Context, s *session, c *claim, req *wire.Sign) (*wire.SignReply, error) {
	loaded, delivered := false, false
	for {
		req.Ack = s.ack()
		if !c.sent {
			c.sentAt = w.p.Elapsed()
		}
		reply, err := s.client.Sign(ctx, req)
		c.sent = c.sent || !errors.Is(err, signclient.ErrNotSent)
		if errors.Is(err, signclient.ErrLost) && !errors.Is(err, signclient.ErrNotSent) {
			c.probe = req.Probe
		}
		switch {
		case errors.Is(err, refusal.KeyUnknown) && !loaded:
			loaded = true
			err = w.load(ctx, s, c.KeyID)
		case errors.Is(err, refusal.LaneFull) && !delivered:
			delivered = true
			err = s.redeliver(ctx)
		default:
			return reply, err
		}
		if err != nil {
			return nil, err
		}
	}
}

// load hands the sealed key to an enclave that does not know it. Where that
// cannot be, the error is refusal.KeyUnavailable.
func (w *worker) load(ctx context.Context, s *session, id record.KeyID) error {
	var key store.Key
	var header []byte
	err := w.p.insist(ctx, "read sealed key", func(ctx context.Context) (err error) {
		if key, err = w.p.Store.Key(ctx, id); err == nil {
			header, err = w.p.Store.Keyring(ctx, key.Keyring)
		}
		return err
	})
	if errors.Is(err, store.ErrNotFound) {
		return refusal.KeyUnavailable
	}
	if err != nil {
		return err
	}
	reply, err := s.client.Load(ctx, &wire.Load{Header: header, Keys: [][]byte{key.Sealed}})
	if err == nil && len(reply.Refused) > 0 {
		err = refusal.KeyUnavailable
	}
	return err
}

// check compares the answer with what was asked for, and its receipt with both.
func check(c *claim, reply *wire.SignReply, r *receipt.Receipt) (refused int, err error) {
	_, out, err := record.DecodeResult(reply.Result)
	if err != nil || len(out) != c.Count || receipt.ResultRoot(out) != r.ResultRoot || r.PayloadRoot != c.PayloadRoot ||
		r.BatchID != c.ID || r.KeyID != c.KeyID || r.BatchFence != c.Fence || r.KeyFence != c.KeyFence {
		return 0, fmt.Errorf("compare answer and receipt: %w", refusal.ReceiptInvalid)
	}
	for _, o := range out {
		if o.Refusal != "" {
			refused++
		}
	}
	return refused, nil
}

// without a signature, what the enclave said decides about the claim. Its word
// is enough to give the claim back: after an answer it releases nothing more.
func (w *worker) without(ctx context.Context, s *session, c *claim, err error) bool {
	var code refusal.Code
	switch {
	case !c.sent:
		return w.giveBack(ctx, c, false, reasonNotSent)
	case errors.Is(err, signclient.ErrLost) || !errors.As(err, &code):
		return w.lost(ctx, s, c)
	}
	w.p.Logger.InfoContext(ctx, "sign refused", slog.String("batch_id", string(c.ID)), slog.String("code", string(code)))
	switch code { //nolint:exhaustive // every other code counts as an attempt
	case refusal.KeyDenied, refusal.KeyUnavailable:
		return w.refuse(ctx, c, refusal.KeyUnavailable)
	case refusal.PolicyDenied, refusal.PayloadInvalid:
		return w.refuse(ctx, c, code)
	case refusal.FenceStale, refusal.FenceConflict:
		return w.drop(ctx, c) // somebody newer has it
	case refusal.TicketInvalid, refusal.Busy, refusal.NotConfigured, refusal.NoKeyring, refusal.LaneFull,
		refusal.KMSUnreachable, refusal.KMSThrottled, refusal.KMSCredentials:
		return w.giveBack(ctx, c, false, string(code)) // the batch is not to blame
	case refusal.Deadline:
		late := c.sentAt-c.at > c.Lease/2 // we were slow, not the enclave
		return w.giveBack(ctx, c, !late, string(code))
	}
	return w.giveBack(ctx, c, true, string(code))
}

// lost: nobody knows what the enclave did. The same boot can confirm that it
// releases nothing. From another nothing follows for sure about the old one, so
// the lease runs out; a record that was being tried then is the one that crashed.
func (w *worker) lost(ctx context.Context, s *session, c *claim) bool {
	w.p.claim.leave(c) // other enclaves may have it meanwhile
	s.client.Close()
	now, err := w.session(ctx)
	if err != nil {
		return w.drop(ctx, c)
	}
	if now.boot == c.BootID {
		_, err := now.client.Cancel(ctx, &wire.Cancel{KeyID: c.KeyID, KeyFence: c.KeyFence})
		if err == nil {
			return w.giveBack(ctx, c, true, reasonCancelled)
		}
	} else if c.probe != wire.NoProbe {
		_ = w.noteCrash(ctx, c, c.probe) // where that failed, another attempt finds it again
	}
	return w.drop(ctx, c)
}

// refuse commits the batch with the same reason for every record.
func (w *worker) refuse(ctx context.Context, c *claim, code refusal.Code) bool {
	out := make([]record.Outcome, c.Count)
	for i := range out {
		out[i].Refusal = string(code)
	}
	anyLen := record.Secp256k1.SignatureLen() // no signature follows
	return w.commit(ctx, c, store.Commit{Batch: c.Batch, Result: record.EncodeResult(anyLen, out), Refused: len(out)})
}

// commit makes the result durable, the batch SIGNED and the key idle.
func (w *worker) commit(ctx context.Context, c *claim, out store.Commit) bool {
	out.Now = w.p.Now()
	err := w.p.settle(ctx, "commit", &c.Batch, record.Signed, func(ctx context.Context) error {
		return w.p.Store.Commit(ctx, out)
	})
	if err != nil {
		return w.drop(ctx, c)
	}
	w.p.claim.leave(c)
	w.p.claim.keyIsBack(&c.Batch)
	took := w.p.Elapsed() - c.at
	w.p.Observer.Committed(&c.Batch, out.Refused, took)
	w.p.Logger.DebugContext(ctx, "batch committed", slog.String("batch_id", string(c.ID)), slog.Int("records", c.Count),
		slog.Int("refused", out.Refused), slog.Duration("took", took.Round(time.Millisecond)))
	return true
}

// giveBack makes the batch READY and its key idle; with the last attempt that
// counts it is QUARANTINED instead.
func (w *worker) giveBack(ctx context.Context, c *claim, counts bool, reason string) bool {
	end := store.End{State: record.Ready, Reason: reason, Attempt: counts, KeepKey: c.sent, Now: w.p.Now()}
	if counts && spent(&c.Batch) {
		end.State = record.Quarantined
	}
	err := w.p.settle(ctx, "release", &c.Batch, end.State, func(ctx context.Context) error {
		return w.p.Store.Release(ctx, c.Batch, end)
	})
	if err != nil {
		return w.drop(ctx, c)
	}
	w.p.claim.leave(c)
	w.p.gaveBack(ctx, &c.Batch, end.State, reason)
	w.p.claim.keyIsBack(&c.Batch)
	return false
}

// drop leaves the claim as it is: somebody newer has it, or its lease runs out.
func (w *worker) drop(ctx context.Context, c *claim) bool {
	w.p.Observer.Dropped(&c.Batch)
	w.p.Logger.InfoContext(ctx, "claim dropped", slog.String("batch_id", string(c.ID)), slog.Uint64("fence", uint64(c.Fence)))
	return false
}

// settle repeats a write that ends b's claim until it is known what became of
// it. Nil: the batch is, or was, in state to by our hand. An unknown outcome is
// read again before anything else.
func (p *pipeline) settle(ctx context.Context, op string, b *store.Batch, to record.State, write func(context.Context) error) error {
	for failures := 1; ; failures++ {
		err := write(ctx)
		if err == nil || errors.Is(err, store.ErrFenced) || ctx.Err() != nil {
			return err
		}
		p.storeFailed(ctx, op, err)
		if err := p.pause(ctx, failures); err != nil {
			return err
		}
		now, err := p.batch(ctx, b.ID)
		switch {
		case err != nil:
			return err
		case b.Holds(&now): // not applied: again
		case now.State == to && now.Fence == b.Fence && now.ClaimID == b.ClaimID:
			return nil
		default:
			return store.ErrFenced
		}
	}
}
