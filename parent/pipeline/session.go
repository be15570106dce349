package pipeline

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/signclient"
	"github.com/keyhold/keyhold/parent/store"
)

// session is one connection and so one lane of receipts. Two slots share it. A
// slot signs again only when its own receipt is stored, so the lane never has
// more than inFlight = wire.MaxUnacked of them open.
type session struct {
	p      *pipeline
	client *signclient.Client
	boot   record.BootID
	lane   uint32
	first  chan struct{} // held by the one batch whose receipt tells where the lane stands

	mu      sync.Mutex
	stored  uint64        // every receipt of this lane up to it is durable
	known   bool          // stored means something
	changed chan struct{} // closed when stored changes
}

// session returns the worker's connection, and makes a new one where it is dead.
func (w *worker) session(ctx context.Context) (*session, error) {
	select { // no mutex: connecting takes time
	case w.connecting <- struct{}{}:
		defer func() { <-w.connecting }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	for failures := 1; ; failures++ {
		if w.now != nil && w.now.alive() {
			return w.now, nil
		}
		s, err := w.connect(ctx)
		if err == nil {
			w.now = s
			return s, nil
		}
		w.p.Logger.InfoContext(ctx, "enclave not connected", slog.String("enclave", w.enclave.Name), slog.Any("error", err))
		if err := w.p.pause(ctx, failures); err != nil {
			return nil, err
		}
	}
}

// connect makes sure that the boot document and every receipt that waits in the
// enclave are durable before anything new is asked of it.
func (w *worker) connect(ctx context.Context) (*session, error) {
	if w.now != nil {
		w.now.client.Close()
		w.now = nil
		w.p.Observer.Disconnected(w.enclave.Name)
	}
	client, err := w.enclave.Connect(ctx)
	if err != nil {
		return nil, err
	}
	hello := client.Hello()
	s := &session{
		p: w.p, client: client, boot: hello.BootID, lane: hello.Lane,
		first: make(chan struct{}, 1), changed: make(chan struct{}),
	}
	err = w.p.keepBoot(ctx, &hello)
	if err == nil {
		err = s.redeliver(ctx)
	}
	if err != nil {
		client.Close()
		return nil, err
	}
	w.p.Observer.Connected(w.enclave.Name)
	return s, nil
}

func (p *pipeline) keepBoot(ctx context.Context, h *wire.HelloReply) error {
	if h.State != wire.StateReady {
		return refusal.NoKeyring
	}
	p.mu.Lock()
	kept := p.boots[h.BootID]
	p.mu.Unlock()
	if kept {
		return nil
	}
	b := store.Boot{ID: h.BootID, Document: h.Document, Statement: h.Statement, SeenAt: p.Now()}
	err := p.insist(ctx, "put boot", func(ctx context.Context) error { return p.Store.PutBoot(ctx, b) })
	if err != nil {
		return fmt.Errorf("put boot: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.boots[h.BootID] = true
	return nil
}

func (s *session) alive() bool {
	select {
	case <-s.client.Done():
		return false
	default:
		return true
	}
}

// hangUp tells the enclave what is stored, so that the lane can be handed on.
func (w *worker) hangUp(ctx context.Context) {
	if w.now == nil {
		return
	}
	if s := w.now; s.alive() {
		if err := s.redeliver(ctx); err != nil {
			w.p.Logger.InfoContext(ctx, "receipts left in the enclave", slog.String("enclave", w.enclave.Name), slog.Any("error", err))
		}
	}
	w.now.client.Close()
	w.p.Observer.Disconnected(w.enclave.Name)
}

// redeliver stores what waits in lanes without a connection, and in this one,
// and acknowledges it, until nothing more comes.
func (s *session) redeliver(ctx context.Context) error {
	ack := []wire.LaneSeq{}
	if n := s.ack(); n > 0 {
		ack = append(ack, wire.LaneSeq{Lane: s.lane, Seq: n})
	}
	for {
		reply, err := s.client.Receipts(ctx, &wire.Receipts{Ack: ack})
		if err != nil {
			return err
		}
		ack = ack[:0]
		for _, raw := range reply.Receipts {
			r, err := s.read(raw)
			if err != nil {
				return err
			}
			err = s.put(ctx, r, raw)
			if errors.Is(err, refusal.ReceiptInvalid) && r.Lane != s.lane {
				continue // that lane stays as it is; the others go on
			}
			if err != nil {
				return err
			}
			ack = append(ack, wire.LaneSeq{Lane: r.Lane, Seq: r.Seq})
		}
		if len(ack) == 0 {
			return nil
		}
	}
}

// deliver stores the receipt of a signed batch once every older one of its lane
// is stored.
func (s *session) deliver(ctx context.Context, raw []byte) (*receipt.Receipt, error) {
	r, err := s.read(raw)
	if err == nil && r.Lane != s.lane {
		err = refusal.ReceiptInvalid
	}
	if err != nil {
		s.client.Close() // the other slot must not wait for this one's place
		return nil, err
	}
	for !s.turn(r.Seq) {
		s.mu.Lock()
		changed := s.changed
		s.mu.Unlock()
		if s.turn(r.Seq) {
			break
		}
		select {
		case <-changed:
		case <-s.client.Done():
			return nil, fmt.Errorf("wait for the receipt before: %w", signclient.ErrLost)
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	if err := s.put(ctx, r, raw); err != nil {
		s.client.Close()
		return nil, err
	}
	return r, nil
}

// turn reports whether the receipt seq may be stored. Where nothing is known of
// the lane, first has made sure that there is no other.
func (s *session) turn(seq uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.known || seq <= s.stored+1
}

// read takes a receipt apart. The parent is nobody who has to be convinced:
// verifying signatures is for those who read the archive.
func (s *session) read(raw []byte) (*receipt.Receipt, error) {
	signed, err := receipt.Decode[receipt.Signed](raw)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", refusal.ReceiptInvalid, err)
	}
	r, err := receipt.Decode[receipt.Receipt](signed.Body)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", refusal.ReceiptInvalid, err)
	}
	if r.BootID != s.boot || r.Seq == 0 {
		return nil, refusal.ReceiptInvalid
	}
	return r, nil
}

func (s *session) put(ctx context.Context, r *receipt.Receipt, raw []byte) error {
	item := store.Receipt{Ref: store.ReceiptRef{BootID: r.BootID, Lane: r.Lane, Seq: r.Seq}, Signed: raw}
	err := s.p.insist(ctx, "put receipt", func(ctx context.Context) error { return s.p.Store.PutReceipt(ctx, item) })
	if errors.Is(err, store.ErrDiffers) {
		s.p.Logger.ErrorContext(ctx, "another receipt is stored under this number",
			slog.String("boot_id", r.BootID.String()), slog.Uint64("lane", uint64(r.Lane)), slog.Uint64("seq", r.Seq))
		err = refusal.ReceiptInvalid
	}
	if err != nil {
		return fmt.Errorf("put receipt: %w", err)
	}
	if r.Lane != s.lane {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stored, s.known = max(s.stored, r.Seq), true
	close(s.changed)
	s.changed = make(chan struct{})
	return nil
}

// ack is the highest seq of this lane that is stored, 0 where that is not known.
func (s *session) ack() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stored
}

// enter lets the first batch of a lane through alone: until its receipt is there
// nobody knows which receipt of the lane is the next.
func (s *session) enter(ctx context.Context) (leave func(), err error) {
	select {
	case s.first <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known {
		<-s.first
		return func() {}, nil
	}
	return func() { <-s.first }, nil
}
