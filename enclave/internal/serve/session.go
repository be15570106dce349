package serve

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"time"

	"github.com/keyhold/keyhold/enclave/internal/sign"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

const readBuffer = 16 << 10 // bytes; longer frames go past the buffer

// session is one connection. One goroutine reads and decodes, another executes
// and answers, so the next request is ready while this one is signed.
type session struct {
	srv    *Server
	conn   net.Conn
	in     *bufio.Reader
	lane   *sign.Lane // set by hello; the executor's
	opened time.Time
	greets bool // hello was read; the reader's
}

// job is a request that was read. Exactly one of do and code is set.
type job struct {
	id   uint64
	typ  wire.Type
	do   action
	code refusal.Code
	last bool // the connection ends after the answer
}

func newSession(s *Server, conn net.Conn) *session {
	return &session{srv: s, conn: conn, in: bufio.NewReaderSize(conn, readBuffer), opened: time.Now()}
}

// run ends when the peer has gone, broke the protocol, or ctx ended.
func (c *session) run(ctx context.Context) {
	// Unbuffered: one request is executed, one is held by the reader, which makes
	// wire.MaxInFlight; the rest stays with the peer.
	jobs := make(chan job)
	gone := make(chan struct{}) // closed when nothing more is executed
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		defer close(jobs)
		c.read(ctx, jobs, gone)
	}()
	c.execute(ctx, jobs)
	close(gone)
	c.srv.close(ctx, c.conn) // ends the reader
	<-finished
	if c.lane != nil {
		c.srv.opt.Boot.Engine().Disconnect(c.lane)
	}
}

// read turns frames into jobs.
func (c *session) read(ctx context.Context, jobs chan<- job, gone <-chan struct{}) {
	for {
		frame, err := c.readFrame()
		if err != nil && !errors.Is(err, refusal.BadFrame) {
			c.srv.opt.Logger.DebugContext(ctx, "connection ended", slog.Any("error", err))
			return
		}
		j := job{code: refusal.BadFrame, last: true}
		if err == nil {
			j = c.decode(ctx, frame)
		}
		select {
		case jobs <- j:
		case <-gone:
			return
		}
		if j.last {
			return
		}
	}
}

// readFrame waits long for a frame to begin, and not long for it to end.
func (c *session) readFrame() ([]byte, error) {
	begin := time.Now().Add(idleTimeout)
	if !c.greets {
		begin = c.opened.Add(helloTimeout)
	}
	if err := c.conn.SetReadDeadline(begin); err != nil {
		return nil, fmt.Errorf("set read deadline: %w", err)
	}
	if _, err := c.in.Peek(1); err != nil {
		return nil, fmt.Errorf("wait for a frame: %w", err)
	}
	if err := c.conn.SetReadDeadline(time.Now().Add(frameTimeout)); err != nil {
		return nil, fmt.Errorf("set read deadline: %w", err)
	}
	frame, err := wire.ReadFrame(c.in)
	if errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read frame: %w", err)
	}
	return frame, err
}

// decode makes a job of a frame. A message whose id cannot be read ends the
// connection, since its answer could not be told from others.
func (c *session) decode(ctx context.Context, frame []byte) (j job) {
	defer func() {
		if v := recover(); v != nil {
			c.panicked(ctx, j.typ)
			j = job{code: refusal.Internal, last: true}
		}
	}()
	m, err := wire.Decode(frame)
	if err != nil {
		return job{code: refusal.Of(err), last: true}
	}
	j = job{id: m.ID, typ: m.Type}
	if !c.greets && m.Type != wire.TypeHello {
		j.code, j.last = refusal.BadMessage, true
		return j
	}
	decode, ok := requests[m.Type]
	if !ok {
		j.code = refusal.UnknownType
		return j
	}
	if j.do, err = decode(m); err != nil {
		j.code = refusal.Of(err)
		return j
	}
	c.greets = true
	return j
}

// execute answers jobs in order.
func (c *session) execute(ctx context.Context, jobs <-chan job) {
	for j := range jobs {
		if err := c.srv.write(c.conn, c.answer(ctx, j), writeTimeout); err != nil {
			c.srv.opt.Logger.DebugContext(ctx, "answer not delivered", slog.Any("error", err))
			return
		}
		if j.last || c.lane == nil { // without a lane hello was refused
			return
		}
	}
}

// answer does what j asks and encodes what became of it.
func (c *session) answer(ctx context.Context, j job) []byte {
	if j.code != "" {
		c.srv.refusals.Add(j.code)
		return c.srv.errorFrame(j.id, j.code)
	}
	body, err := c.do(ctx, j)
	if err == nil {
		var frame []byte
		if frame, err = wire.Encode(j.id, j.typ, body); err == nil {
			return frame
		}
	}
	code := refusal.Of(err)
	c.srv.refusals.Add(code)
	c.srv.opt.Logger.InfoContext(ctx, "request refused", slog.String("type", string(j.typ)), slog.String("code", string(code)))
	return c.srv.errorFrame(j.id, code)
}

// do keeps a panic inside the request that caused it.
func (c *session) do(ctx context.Context, j job) (body any, err error) {
	defer func() {
		if v := recover(); v != nil { // v may hold parts of a payload: it is not looked at
			c.panicked(ctx, j.typ)
			body, err = nil, refusal.Internal
		}
	}()
	return j.do(ctx, c)
}

// panicked tells where it happened, by function and line only: a stack trace
// with arguments could hold bytes of a payload.
func (c *session) panicked(ctx context.Context, t wire.Type) {
	c.srv.panics.Add(1)
	pcs := make([]uintptr, 32)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(3, pcs)])
	var where []string
	for {
		f, more := frames.Next()
		where = append(where, fmt.Sprintf("%s:%d", f.Function, f.Line))
		if !more {
			break
		}
	}
	c.srv.opt.Logger.ErrorContext(ctx, "request panicked",
		slog.String("type", string(t)), slog.String("stack", strings.Join(where, " ")))
}
