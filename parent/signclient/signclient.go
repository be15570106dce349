// Package signclient speaks the wire protocol to one enclave over one
// connection. It refuses every answer that is not the one owed next, and never
// guesses what became of a request whose answer is missing.
package signclient

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

// Dialer opens a connection to an enclave.
type Dialer func(ctx context.Context) (net.Conn, error)

// Default time-outs of Options.
const (
	DefaultTimeout     = 15 * time.Second // a lease of 10 s and some room: a later answer is of no use
	DefaultSlowTimeout = 5 * time.Minute  // 500 new RSA keys on one core; a load that waits for KMS
)

const readBuffer = 64 << 10 // bytes; most answers arrive in one read

// Errors of a client. A refusal by the enclave is none of them: it is a
// refusal.Code, and the client goes on.
var (
	// ErrLost: the connection is gone and the outcome of the request unknown.
	// The client is dead.
	ErrLost = errors.New("signclient: connection lost")
	// ErrNotSent: the connection was gone before any of the request was sent, so
	// nothing came of it. It is an ErrLost too.
	ErrNotSent = fmt.Errorf("%w before the request was sent", ErrLost)
	// ErrProtocol: the enclave sent what no enclave sends. It comes with ErrLost.
	ErrProtocol = errors.New("signclient: answer breaks the protocol")
	// ErrUnknownCode: the enclave refused with a code that this release does not
	// know. It comes with refusal.Internal.
	ErrUnknownCode = errors.New("signclient: refused with an unknown code")

	errClosed = errors.New("closed by its owner")
)

// Options describes a Client. The zero value serves production.
type Options struct {
	// Timeout bounds dialling, each write, and the answer to a request. 0 is
	// DefaultTimeout. A context can be stricter.
	Timeout time.Duration
	// SlowTimeout is the same for configure, create_keyring, load and add_keys,
	// which wait for KMS or make keys. 0 is DefaultSlowTimeout.
	SlowTimeout time.Duration
	// Trace, where set, is called before each request, and what it returns with
	// the outcome. It measures and must not block.
	Trace func(t wire.Type) func(err error)
	// Logger is told when a connection is lost. Nil: nobody is.
	Logger *slog.Logger
	// Now is read for the age of tickets and for deadlines; its monotonic part
	// counts. Nil is time.Now.
	Now func() time.Time
}

func (o Options) withDefaults() Options {
	if o.Timeout <= 0 {
		o.Timeout = DefaultTimeout
	}
	if o.SlowTimeout <= 0 {
		o.SlowTimeout = DefaultSlowTimeout
	}
	if o.Trace == nil {
		o.Trace = func(wire.Type) func(error) { return func(error) {} }
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return o
}

// Client is one connection, which is one lane. Its methods may be called from
// several goroutines; wire.MaxInFlight requests are on their way at once and the
// others wait.
//
// A context that ends while an answer is owed ends the connection: nobody could
// say any more what the next answer belongs to, nor what the request did.
type Client struct {
	conn  net.Conn
	opt   Options
	hello wire.HelloReply
	slots chan struct{} // one for each request in flight

	// sending holds one token while a request is written, which keeps ids, queue and
	// bytes in one order. No mutex: a write waits for the peer.
	sending chan struct{}
	nextID  uint64 // under sending

	mu     sync.Mutex
	queue  []*pending    // answers that are owed, oldest first
	cause  error         // why the client is dead
	dead   chan struct{} // closed with cause
	ticket wire.Ticket   // the newest
	asked  time.Time     // when ticket's request was about to be sent

	reader sync.WaitGroup
}

// pending is a request without its answer.
type pending struct {
	id       uint64
	typ      wire.Type
	deadline time.Time
	done     chan answer // buffered: whoever answers does not wait
}

type answer struct {
	msg *wire.Message
	err error
}

// Connect dials and says hello.
func Connect(ctx context.Context, dial Dialer, opt Options) (*Client, error) {
	opt = opt.withDefaults()
	dctx, cancel := context.WithTimeout(ctx, opt.Timeout)
	defer cancel()
	conn, err := dial(dctx)
	if err != nil {
		return nil, fmt.Errorf("dial enclave: %w: %w", ErrNotSent, err)
	}
	c := &Client{
		conn: conn, opt: opt, slots: make(chan struct{}, wire.MaxInFlight), dead: make(chan struct{}),
		sending: make(chan struct{}, 1),
	}
	c.reader.Go(c.read)
	h, err := do[wire.HelloReply](ctx, c, wire.TypeHello, "hello", opt.Timeout, &wire.Hello{})
	if err != nil {
		c.Close()
		return nil, err
	}
	c.hello = *h
	return c, nil
}

// Close ends the connection and waits for what runs on its behalf. Requests
// without an answer end with ErrLost.
func (c *Client) Close() {
	c.fail(errClosed)
	c.reader.Wait()
}

// Done is closed when the client is dead.
func (c *Client) Done() <-chan struct{} { return c.dead }

// fail makes the client dead, once. Every answer still owed becomes ErrLost.
func (c *Client) fail(cause error) {
	c.mu.Lock()
	if c.cause != nil {
		c.mu.Unlock()
		return
	}
	c.cause = cause
	owed := c.queue
	c.queue = nil
	close(c.dead)
	c.mu.Unlock()

	if err := c.conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		c.opt.Logger.Debug("enclave connection did not close", slog.Any("error", err))
	}
	for _, p := range owed {
		p.done <- answer{err: fmt.Errorf("%w: %w", ErrLost, cause)}
	}
	if !errors.Is(cause, errClosed) {
		c.opt.Logger.Info("enclave connection lost", slog.Any("error", cause), slog.Int("owed", len(owed)))
	}
}

// read takes answers off the connection until it ends.
func (c *Client) read() {
	r := bufio.NewReaderSize(c.conn, readBuffer)
	for {
		frame, err := wire.ReadFrame(r)
		if err != nil {
			c.fail(fmt.Errorf("read answer: %w", err))
			return
		}
		m, err := wire.Decode(frame)
		if err != nil {
			c.fail(fmt.Errorf("%w: %w", ErrProtocol, err))
			return
		}
		p, err := c.match(m)
		if p != nil {
			p.done <- answer{msg: m}
		}
		if err != nil {
			c.fail(err)
			return
		}
	}
}

// match takes the request that m answers off the queue: always the oldest.
func (c *Client) match(m *wire.Message) (*pending, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if m.ID == 0 && m.Type == wire.TypeError {
		code, _, err := openError(m) // of the connection, not of a request
		return nil, errors.Join(code, err)
	}
	if len(c.queue) == 0 || c.queue[0].id != m.ID || (m.Type != c.queue[0].typ && m.Type != wire.TypeError) {
		return nil, fmt.Errorf("%w: not the answer that is owed next", ErrProtocol)
	}
	p := c.queue[0]
	c.queue = c.queue[1:]
	return p, c.setReadDeadline()
}

// setReadDeadline to that of the oldest request; an idle connection has none.
// The caller holds mu.
func (c *Client) setReadDeadline() error {
	var t time.Time
	if len(c.queue) > 0 {
		t = c.queue[0].deadline
	}
	if err := c.conn.SetReadDeadline(t); err != nil {
		return fmt.Errorf("set read deadline: %w", err)
	}
	return nil
}

// roundTrip sends one request and waits for its answer. It also returns when the
// request was about to be sent.
func (c *Client) roundTrip(ctx context.Context, t wire.Type, timeout time.Duration, body any) (*wire.Message, time.Time, error) {
	select {
	case c.slots <- struct{}{}:
		defer func() { <-c.slots }()
	case <-c.dead:
		return nil, time.Time{}, c.notSent()
	case <-ctx.Done():
		return nil, time.Time{}, fmt.Errorf("wait for the connection: %w", context.Cause(ctx))
	}
	if err := ctx.Err(); err != nil {
		return nil, time.Time{}, err
	}
	stop := context.AfterFunc(ctx, func() { c.fail(context.Cause(ctx)) })
	defer stop()
	asked := c.opt.Now()
	p, err := c.send(t, asked.Add(timeout), body)
	if err != nil {
		return nil, asked, err
	}
	a := <-p.done
	return a.msg, asked, a.err
}

// send queues the request and writes it. A request that was queued gets its
// answer through done, whatever becomes of the write.
func (c *Client) send(t wire.Type, deadline time.Time, body any) (*pending, error) {
	c.sending <- struct{}{} // whoever has it ends with its write deadline at the latest
	defer func() { <-c.sending }()
	c.nextID++
	frame, err := wire.Encode(c.nextID, t, body)
	if err != nil {
		return nil, err
	}
	p := &pending{id: c.nextID, typ: t, deadline: deadline, done: make(chan answer, 1)}
	if err := c.enqueue(p); err != nil {
		return nil, err
	}
	if err := c.conn.SetWriteDeadline(deadline); err != nil {
		c.fail(fmt.Errorf("set write deadline: %w", err))
		return p, nil
	}
	if err := wire.WriteFrame(c.conn, frame); err != nil {
		c.fail(err)
	}
	return p, nil
}

func (c *Client) enqueue(p *pending) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cause != nil {
		return fmt.Errorf("%w: %w", ErrNotSent, c.cause)
	}
	c.queue = append(c.queue, p)
	if len(c.queue) > 1 {
		return nil
	}
	if err := c.setReadDeadline(); err != nil {
		c.queue = nil
		return fmt.Errorf("%w: %w", ErrNotSent, err)
	}
	return nil
}

func (c *Client) notSent() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return fmt.Errorf("%w: %w", ErrNotSent, c.cause)
}

// openError reads an error answer. Its text is not repeated: it came from
// outside, and the table of codes has the same one.
func openError(m *wire.Message) (code error, t wire.Ticket, err error) {
	var e wire.Error
	if err := wire.DecodeBody(m, &e); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	c := refusal.Code(e.Code)
	if _, ok := refusal.Lookup(c); !ok {
		return fmt.Errorf("%w: %w", ErrUnknownCode, refusal.Internal), e.Ticket, nil
	}
	return c, e.Ticket, nil
}
