package sim_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/signclient"
	"github.com/keyhold/keyhold/parent/store"
)

// conn is one connection of a parent to an enclave: requests and answers take
// time, are lost, and are looked at by the judge where they enter and leave the
// enclave.
type conn struct {
	p    *parent
	e    *enclave
	name string
	boot int                // of the enclave when the connection was made
	owes []store.ReceiptRef // to be stored before the first sign; the judge's

	mu   sync.Mutex
	owed []*request // not answered, oldest first
}

// request is one that the enclave has or had.
type request struct {
	id     uint64
	step   string
	sign   *wire.Sign
	revoke *revocation
	fault  fault
}

// dialer opens connections to e, and says what the next one is called.
func (p *parent) dialer(e *enclave) (signclient.Dialer, string) {
	p.mu.Lock()
	p.dials[e.name]++
	name := fmt.Sprintf("%s %s %d", p.name, e.name, p.dials[e.name])
	p.mu.Unlock()
	return func(context.Context) (net.Conn, error) {
		near, far := net.Pipe()
		c := &conn{p: p, e: e, name: name, boot: p.w.judge.boot(e)}
		n := &nearConn{
			Conn: near, c: c, out: p.w.dice.of(name + " out"), in: p.w.dice.of(name + " in"),
			closed: make(chan struct{}),
		}
		p.mu.Lock()
		if p.isDead() {
			p.mu.Unlock()
			return nil, net.ErrClosed
		}
		p.conns = append(p.conns, n)
		p.mu.Unlock()
		p.w.running.Go(func() {
			e.server.Handle(p.w.ctx, &farConn{Conn: far, c: c, late: p.w.dice.of(name + " way")})
			p.w.judge.ended(c)
		})
		return n, nil
	}, name
}

// nearConn is the parent's end.
type nearConn struct {
	net.Conn
	c       *conn
	out, in *rand.Rand // of the writer and of the reader
	once    sync.Once
	closed  chan struct{}
}

func (n *nearConn) Close() error {
	n.once.Do(func() { close(n.closed) })
	return n.Conn.Close()
}

// cut ends the connection. The other end is gone too, and nobody asks why.
func (n *nearConn) cut() { _ = n.Close() }

// Write sends one frame: signclient writes each at once.
func (n *nearConn) Write(b []byte) (int, error) {
	p := n.c.p
	q := open(b)
	step := p.w.judge.step(q)
	f := fine
	if !p.w.plan.calm {
		f = p.draw(n.out, step, wireFaults)
	}
	r := &request{id: q.ID, step: step, fault: f}
	p.w.judge.sent(n.c, r, q)
	p.suffer(n.out, f, diesBefore, stopsBefore)
	p.rest(upTo(n.out, 5*time.Millisecond))
	switch {
	case p.isDead():
		return 0, net.ErrClosed
	case f == failed:
		n.cut()
		return 0, net.ErrClosed
	case f == enclaveBefore:
		n.c.e.crash("before " + step)
		n.cut()
		return 0, net.ErrClosed
	}
	n.c.mu.Lock()
	n.c.owed = append(n.c.owed, r)
	n.c.mu.Unlock()
	if f == cutMidway {
		most := []time.Duration{20 * time.Millisecond, shortLease}[n.out.IntN(2)]
		cut := time.AfterFunc(upTo(n.out, most), n.cut)
		p.w.running.Go(func() { <-n.closed; cut.Stop() })
	}
	return n.Conn.Write(b)
}

// Read gives an answer on, later or never.
func (n *nearConn) Read(b []byte) (int, error) {
	p := n.c.p
	got, err := n.Conn.Read(b)
	var f fault
	if err == nil {
		if r := n.c.answered(); r != nil {
			f = r.fault
		}
	}
	p.suffer(n.in, f, diesAfter, stopsAfter)
	p.rest(upTo(n.in, 5*time.Millisecond))
	select {
	case <-n.closed:
		return 0, net.ErrClosed
	default:
	}
	if f == answerLost || p.isDead() {
		n.cut()
		return 0, net.ErrClosed
	}
	return got, err
}

// answered takes the oldest request off the queue.
func (c *conn) answered() *request {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.owed) == 0 {
		return nil
	}
	r := c.owed[0]
	c.owed = c.owed[1:]
	c.e.w.judge.delivered(r)
	return r
}

func (c *conn) find(id uint64) *request {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.owed {
		if r.id == id {
			return r
		}
	}
	return nil
}

// farConn is the enclave's end: what is read here is asked of the enclave, and
// what is written here was released by it, at this very moment.
type farConn struct {
	net.Conn
	c    *conn
	late *rand.Rand // of the reader

	buf []byte
}

func (f *farConn) Read(b []byte) (int, error) {
	if len(f.buf) == 0 {
		in := bufio.NewReader(f.Conn)
		frame, err := wire.ReadFrame(in)
		if err != nil {
			return 0, io.EOF
		}
		sleep(f.c.p.w.ctx, upTo(f.late, 5*time.Millisecond))
		if f.c.e.w.judge.gone(f.c) {
			return 0, io.EOF
		}
		var w frameBuffer
		if err := wire.WriteFrame(&w, frame); err != nil {
			return 0, err
		}
		f.buf = w
		f.asked(frame)
	}
	n := copy(b, f.buf)
	f.buf = f.buf[n:]
	return n, nil
}

type frameBuffer []byte

func (w *frameBuffer) Write(b []byte) (int, error) {
	*w = append(*w, b...)
	return len(b), nil
}

func (f *farConn) asked(frame []byte) {
	q, err := wire.Decode(frame)
	if err != nil {
		return
	}
	if r := f.c.find(q.ID); r != nil {
		f.c.e.w.judge.asked(f.c, r, q)
	}
}

// SetWriteDeadline never fails: an answer is released even where its connection
// is gone by then, and Write has to see it.
func (f *farConn) SetWriteDeadline(t time.Time) error {
	_ = f.Conn.SetWriteDeadline(t)
	return nil
}

func (f *farConn) Write(b []byte) (int, error) {
	if f.c.e.w.judge.gone(f.c) {
		return 0, io.ErrClosedPipe // what a dead enclave still writes reaches nobody
	}
	q := open(b)
	if r := f.c.find(q.ID); r != nil {
		f.c.e.w.judge.answers(f.c, r, q)
		if r.fault == enclaveAfter {
			f.c.e.crash("after " + r.step)
			return 0, io.ErrClosedPipe
		}
	}
	return f.Conn.Write(b)
}

// open takes a frame apart that our own code made.
func open(b []byte) *wire.Message {
	m, err := wire.Decode(b[4:])
	if err != nil {
		panic(fmt.Sprintf("sim: a frame that nobody can read: %v", err))
	}
	return m
}
