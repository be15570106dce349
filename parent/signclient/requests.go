package signclient

import (
	"context"
	"fmt"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/wire"
)

// Hello returns what the enclave said when the connection was made. State is as
// it was then.
func (c *Client) Hello() wire.HelloReply { return c.hello }

// BootID names the boot at the other end; it cannot change while the connection
// lives.
func (c *Client) BootID() record.BootID { return c.hello.BootID }

// Lane names the lane of this connection.
func (c *Client) Lane() uint32 { return c.hello.Lane }

// Configure hands over the config.
func (c *Client) Configure(ctx context.Context, req *wire.Configure) (*wire.ConfigureReply, error) {
	return do[wire.ConfigureReply](ctx, c, wire.TypeConfigure, "configure", c.opt.SlowTimeout, req)
}

// CreateKeyring asks for a new, empty keyring.
func (c *Client) CreateKeyring(ctx context.Context) (*wire.CreateKeyringReply, error) {
	return do[wire.CreateKeyringReply](ctx, c, wire.TypeCreateKeyring, "create keyring", c.opt.SlowTimeout, &wire.CreateKeyring{})
}

// Load opens a keyring or adds sealed keys to it.
func (c *Client) Load(ctx context.Context, req *wire.Load) (*wire.LoadReply, error) {
	return do[wire.LoadReply](ctx, c, wire.TypeLoad, "load keys", c.opt.SlowTimeout, req)
}

// AddKeys makes new keys.
func (c *Client) AddKeys(ctx context.Context, req *wire.AddKeys) (*wire.AddKeysReply, error) {
	return do[wire.AddKeysReply](ctx, c, wire.TypeAddKeys, "add keys", c.opt.SlowTimeout, req)
}

// Sign asks for the signatures of one batch.
func (c *Client) Sign(ctx context.Context, req *wire.Sign) (*wire.SignReply, error) {
	return do[wire.SignReply](ctx, c, wire.TypeSign, "sign batch "+string(req.BatchID), c.opt.Timeout, req)
}

// Cancel returns nil once nothing signed under the fence, or an older one, will
// be released any more.
func (c *Client) Cancel(ctx context.Context, req *wire.Cancel) (*wire.FenceReply, error) {
	return do[wire.FenceReply](ctx, c, wire.TypeCancel, "cancel key "+req.KeyID.String(), c.opt.Timeout, req)
}

// Fence returns nil once nothing under a lower fence will be released any more.
func (c *Client) Fence(ctx context.Context, req *wire.Fence) (*wire.FenceReply, error) {
	return do[wire.FenceReply](ctx, c, wire.TypeFence, "fence key "+req.KeyID.String(), c.opt.Timeout, req)
}

// Receipts acknowledges receipts and fetches those that are still to be stored.
func (c *Client) Receipts(ctx context.Context, req *wire.Receipts) (*wire.ReceiptsReply, error) {
	return do[wire.ReceiptsReply](ctx, c, wire.TypeReceipts, "fetch receipts", c.opt.Timeout, req)
}

// Attest asks for a document with that nonce and the heads of all lanes. It
// verifies neither.
func (c *Client) Attest(ctx context.Context, req *wire.Attest) (*wire.AttestReply, error) {
	return do[wire.AttestReply](ctx, c, wire.TypeAttest, "attest", c.opt.Timeout, req)
}

// Status asks for counters.
func (c *Client) Status(ctx context.Context) (*wire.StatusReply, error) {
	return c.Log(ctx, &wire.GetStatus{})
}

// Log asks for counters and for log lines.
func (c *Client) Log(ctx context.Context, req *wire.GetStatus) (*wire.StatusReply, error) {
	return do[wire.StatusReply](ctx, c, wire.TypeStatus, "status", c.opt.Timeout, req)
}

// Ticket returns the newest ticket, or a fresh one where that was asked for
// longer than maxAge ago. With 0 it always asks.
//
// The age counts from before the request that brought the ticket was sent, so a
// ticket is never older inside than it seems here.
func (c *Client) Ticket(ctx context.Context, maxAge time.Duration) (wire.Ticket, error) {
	if t, asked := c.newest(); t != nil && c.opt.Now().Sub(asked) < maxAge {
		return t, nil
	}
	reply, err := do[wire.TicketReply](ctx, c, wire.TypeTicket, "fetch ticket", c.opt.Timeout, &wire.GetTicket{})
	if err != nil {
		return nil, err
	}
	if len(reply.Ticket) != wire.TicketLen {
		err := fmt.Errorf("%w: a ticket reply without ticket", ErrProtocol)
		c.fail(err)
		return nil, fmt.Errorf("fetch ticket: %w: %w", ErrLost, err)
	}
	return reply.Ticket, nil
}

func (c *Client) newest() (wire.Ticket, time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ticket, c.asked
}

// keep remembers t where it was not asked for earlier than the one that is kept. Answers without
// a ticket are normal: an enclave that has no config yet gives none.
func (c *Client) keep(t wire.Ticket, asked time.Time) error {
	switch len(t) {
	case 0:
		return nil
	case wire.TicketLen:
	default:
		return fmt.Errorf("%w: a ticket of another length", ErrProtocol)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ticket == nil || !asked.Before(c.asked) {
		c.ticket, c.asked = t, asked
	}
	return nil
}

// do makes one request and reads its answer. Its errors start with what.
func do[Reply any](ctx context.Context, c *Client, t wire.Type, what string, timeout time.Duration, req any) (reply *Reply, err error) {
	traced := c.opt.Trace(t)
	defer func() { traced(err) }()
	m, asked, err := c.roundTrip(ctx, t, timeout, req)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	reply = new(Reply)
	var code error
	var ticket wire.Ticket
	if m.Type == wire.TypeError {
		code, ticket, err = openError(m)
	} else {
		err = decodeReply(m, reply)
		ticket = ticketIn(reply)
	}
	if err == nil {
		err = c.keep(ticket, asked)
	}
	if err != nil {
		c.fail(err)
		return nil, fmt.Errorf("%s: %w: %w", what, ErrLost, err)
	}
	if code != nil {
		return nil, fmt.Errorf("%s: %w", what, code)
	}
	return reply, nil
}

func decodeReply(m *wire.Message, reply any) error {
	if err := wire.DecodeBody(m, reply); err != nil {
		return fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	return nil
}

// ticketIn returns the ticket that came with a reply.
func ticketIn(reply any) wire.Ticket {
	switch r := reply.(type) {
	case *wire.HelloReply:
		return r.Ticket
	case *wire.TicketReply:
		return r.Ticket
	case *wire.SignReply:
		return r.Ticket
	case *wire.FenceReply:
		return r.Ticket
	case *wire.ReceiptsReply:
		return r.Ticket
	}
	return nil
}
