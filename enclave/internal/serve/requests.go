package serve

import (
	"context"
	"runtime/metrics"

	"github.com/keyhold/keyhold/enclave/internal/sign"
	"github.com/keyhold/keyhold/internal/wire"
)

// action is a decoded request, ready to be executed.
type action func(context.Context, *session) (any, error)

// request decodes the body of one type of message.
type request func(*wire.Message) (action, error)

// requests decode the body of every message that there is.
//
//nolint:gochecknoglobals // a table that is never written
var requests = map[wire.Type]request{
	wire.TypeHello:         body((*session).hello),
	wire.TypeConfigure:     body((*session).configure),
	wire.TypeCreateKeyring: body((*session).createKeyring),
	wire.TypeLoad:          body((*session).load),
	wire.TypeAddKeys:       body((*session).addKeys),
	wire.TypeTicket:        body((*session).ticket),
	wire.TypeSign:          body((*session).sign),
	wire.TypeCancel:        body((*session).cancel),
	wire.TypeFence:         body((*session).fence),
	wire.TypeReceipts:      body((*session).receipts),
	wire.TypeAttest:        body((*session).attest),
	wire.TypeStatus:        body((*session).status),
}

// body decodes a message's body strictly before it is queued.
func body[Req, Reply any](f func(*session, context.Context, *Req) (*Reply, error)) request {
	return func(m *wire.Message) (action, error) {
		req := new(Req)
		if err := wire.DecodeBody(m, req); err != nil {
			return nil, err
		}
		return func(ctx context.Context, c *session) (any, error) {
			reply, err := f(c, ctx, req)
			if err != nil {
				return nil, err
			}
			return reply, nil
		}, nil
	}
}

func (c *session) engine() *sign.Engine { return c.srv.opt.Boot.Engine() }

// hello hands out the lane of this connection; said again, the same one.
func (c *session) hello(context.Context, *wire.Hello) (*wire.HelloReply, error) {
	if c.lane == nil {
		lane, err := c.engine().Connect()
		if err != nil {
			return nil, err
		}
		c.lane = lane
	}
	p := c.srv.opt.Boot.Progress()
	return &wire.HelloReply{
		BootID: c.engine().BootID(), Lane: c.lane.Number(), State: p.State, ConfigHash: p.ConfigHash,
		Document: p.Document, Statement: p.Statement, Ticket: c.engine().Ticket(),
	}, nil
}

func (c *session) configure(ctx context.Context, m *wire.Configure) (*wire.ConfigureReply, error) {
	return c.srv.opt.Boot.Configure(ctx, m)
}

func (c *session) createKeyring(ctx context.Context, _ *wire.CreateKeyring) (*wire.CreateKeyringReply, error) {
	return c.srv.opt.Boot.CreateKeyring(ctx)
}

func (c *session) load(ctx context.Context, m *wire.Load) (*wire.LoadReply, error) {
	return c.srv.opt.Boot.Load(ctx, m)
}

func (c *session) addKeys(ctx context.Context, m *wire.AddKeys) (*wire.AddKeysReply, error) {
	return c.engine().AddKeys(ctx, c.lane, m)
}

func (c *session) ticket(context.Context, *wire.GetTicket) (*wire.TicketReply, error) {
	return &wire.TicketReply{Ticket: c.engine().Ticket()}, nil
}

func (c *session) sign(ctx context.Context, m *wire.Sign) (*wire.SignReply, error) {
	return c.engine().Sign(ctx, c.lane, m)
}

func (c *session) cancel(_ context.Context, m *wire.Cancel) (*wire.FenceReply, error) {
	return c.engine().Cancel(m)
}

func (c *session) fence(_ context.Context, m *wire.Fence) (*wire.FenceReply, error) {
	return c.engine().Fence(m)
}

func (c *session) receipts(_ context.Context, m *wire.Receipts) (*wire.ReceiptsReply, error) {
	return c.engine().Receipts(c.lane, m)
}

func (c *session) attest(_ context.Context, m *wire.Attest) (*wire.AttestReply, error) {
	document, err := c.srv.opt.Boot.Challenge(m.Nonce)
	if err != nil {
		return nil, err
	}
	heads, err := c.engine().Heads(m.Nonce)
	if err != nil {
		return nil, err
	}
	return &wire.AttestReply{Document: document, Heads: heads}, nil
}

// status fills in what the engine does not count.
func (c *session) status(_ context.Context, m *wire.GetStatus) (*wire.StatusReply, error) {
	r := c.engine().Status()
	p := c.srv.opt.Boot.Progress()
	r.State, r.Proofs, r.ProvedMS = p.State, p.Proofs, p.Proved.Milliseconds()
	r.Panics = c.srv.panics.Load()
	r.Connections = uint32(max(0, c.srv.conns.Load()))
	r.RequestRefusals = c.srv.refusals.Counts()
	r.HeapBytes = heapBytes()
	r.Lines = []wire.LogLine{}
	if ring := c.srv.opt.Log; ring != nil {
		r.Lines, r.Newest, r.Dropped = ring.After(m.After, int(min(m.Lines, wire.MaxLogLines)))
	}
	return &r, nil
}

// heapBytes are those of live objects and of such as are not swept yet. Unlike
// runtime.ReadMemStats it stops nobody.
func heapBytes() uint64 {
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(sample)
	if sample[0].Value.Kind() != metrics.KindUint64 {
		return 0
	}
	return sample[0].Value.Uint64()
}
