package hostvsock

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// states of a connection.
const (
	dialling = iota
	established
	gone // the guest knows it no more, or never did
)

// maxQueued bounds what one connection has waiting for the guest's buffers, in
// bytes, whatever credit the guest gives.
const maxQueued = 256 << 10

// Conn is a stream to a process in the guest. It implements net.Conn.
type Conn struct {
	device  *Device
	key     key
	changed *sync.Cond // any of the below

	state int
	err   error // why it broke, where it did

	in       [][]byte // to be read
	inLen    int
	noMore   bool // the guest sends no more
	deaf     bool // the guest receives no more
	finished bool // CloseWrite
	closed   bool // Close
	linger   *time.Timer

	queued         int    // bytes that wait for buffers of the guest
	sent           uint32 // bytes so far; counters wrap around
	alloc, taken   uint32 // the guest's buffer, and what has left it so far
	forwarded      uint32 // what was read here so far
	told           uint32 // and what the guest knows of that
	readEnd, wrEnd deadline
	writing        sync.Mutex // one Write after the other
}

var _ net.Conn = (*Conn)(nil)

func (d *Device) newConn(k key) *Conn {
	c := &Conn{device: d, key: k, changed: sync.NewCond(d.mu)}
	d.conns[k] = c
	return c
}

// send queues a packet of this connection.
func (c *Conn) send(op uint16, flags uint32, data []byte) {
	c.device.send(packet{key: c.key, op: op, flags: flags, data: data, conn: c})
}

// forget takes the connection off the device.
func (c *Conn) forget() {
	c.state = gone
	delete(c.device.conns, c.key)
	if c.linger != nil {
		c.linger.Stop()
	}
	c.changed.Broadcast()
}

// broken ends the connection with an error, after what is left to be read.
func (c *Conn) broken(err error) {
	if c.state == dialling || !c.noMore || !c.deaf {
		c.err = err
	}
	c.forget()
}

// reset ends the connection on both sides.
func (c *Conn) reset() {
	c.send(opReset, 0, nil)
	c.broken(syscall.ECONNRESET)
}

// credit notes how much the guest takes.
func (c *Conn) credit(h header) {
	c.alloc, c.taken = h.alloc, h.forwarded
	c.changed.Broadcast()
}

// window is how much may be sent now, in bytes. A guest that says it took more
// than it got hurts itself only.
func (c *Conn) window() int {
	inFlight := c.sent - c.taken
	if inFlight >= c.alloc {
		return 0
	}
	return max(0, min(int(c.alloc-inFlight), maxQueued-c.queued))
}

// receive takes a packet of the guest.
func (c *Conn) receive(h header, data []byte) {
	c.credit(h)
	wantsResponse := c.state == dialling
	switch {
	case h.op == opReset:
		if wantsResponse {
			c.broken(syscall.ECONNREFUSED)
		} else {
			c.broken(syscall.ECONNRESET)
		}
	case h.typ != typeStream || wantsResponse != (h.op == opResponse):
		c.reset()
	case h.op == opResponse:
		c.state = established
	case h.op == opData:
		c.receiveData(data)
	case h.op == opShutdown:
		c.receiveShutdown(h.flags)
	case h.op == opCreditRequest:
		c.send(opCreditUpdate, 0, nil)
	case h.op != opCreditUpdate:
		c.reset()
	}
}

// receiveData keeps data for Read. Data that nobody will read, that the guest
// said it would not send, or that it has no room for, is answered by a reset.
func (c *Conn) receiveData(data []byte) {
	if c.closed || c.noMore || c.inLen+len(data) > bufferLen {
		c.reset()
		return
	}
	if len(data) > 0 {
		c.in = append(c.in, data)
		c.inLen += len(data)
	}
}

// receiveShutdown notes what the guest will not do any more. Once it does
// neither, it waits for a reset, and what it sent is here already.
func (c *Conn) receiveShutdown(flags uint32) {
	c.noMore = c.noMore || flags&flagNoSend != 0
	c.deaf = c.deaf || flags&flagNoReceive != 0
	if c.noMore && c.deaf {
		c.send(opReset, 0, nil)
		c.forget()
	}
}

// Read implements net.Conn.
func (c *Conn) Read(p []byte) (int, error) {
	c.device.mu.Lock()
	defer c.device.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, c.failed("read", net.ErrClosed)
		case c.readEnd.expired:
			return 0, c.failed("read", os.ErrDeadlineExceeded)
		case len(p) == 0:
			return 0, nil
		case len(c.in) > 0:
			return c.take(p), nil
		case c.noMore:
			return 0, io.EOF
		case c.err != nil:
			return 0, c.failed("read", c.err)
		}
		c.changed.Wait()
	}
}

// take fills p from what is there, and tells the guest of the room now and then.
func (c *Conn) take(p []byte) (n int) {
	for len(c.in) > 0 && n < len(p) {
		m := copy(p[n:], c.in[0])
		n += m
		if c.in[0] = c.in[0][m:]; len(c.in[0]) == 0 {
			c.in = c.in[1:]
		}
	}
	c.inLen -= n
	c.forwarded += uint32(n)
	if c.state == established && c.forwarded-c.told >= bufferLen/4 {
		c.send(opCreditUpdate, 0, nil)
		c.device.pump()
	}
	return n
}

// Write implements net.Conn. It returns once the guest's driver has buffers or
// credit for everything.
func (c *Conn) Write(p []byte) (n int, err error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	c.device.mu.Lock()
	defer c.device.mu.Unlock()
	for {
		switch {
		case c.closed:
			return n, c.failed("write", net.ErrClosed)
		case c.wrEnd.expired:
			return n, c.failed("write", os.ErrDeadlineExceeded)
		case c.err != nil:
			return n, c.failed("write", c.err)
		case c.finished || c.deaf:
			return n, c.failed("write", syscall.EPIPE)
		case n == len(p):
			return n, nil
		}
		m := min(c.window(), len(p)-n)
		if m == 0 {
			c.changed.Wait()
			continue
		}
		c.sent += uint32(m) //nolint:gosec // at most maxQueued
		c.send(opData, 0, append([]byte(nil), p[n:n+m]...))
		n += m
		c.device.pump()
	}
}

// CloseWrite tells the guest that nothing more comes. Reading goes on.
func (c *Conn) CloseWrite() error {
	c.device.mu.Lock()
	defer c.device.mu.Unlock()
	switch {
	case c.closed:
		return c.failed("close", net.ErrClosed)
	case c.err != nil:
		return c.failed("close", c.err)
	case c.finished || c.state == gone:
		return nil
	}
	c.finished = true
	c.changed.Broadcast()
	c.send(opShutdown, flagNoSend, nil)
	c.device.pump()
	return nil
}

// Close implements net.Conn. What was written still reaches the guest.
func (c *Conn) Close() error {
	c.device.mu.Lock()
	defer c.device.mu.Unlock()
	if c.closed {
		return c.failed("close", net.ErrClosed)
	}
	c.closed = true
	c.in, c.inLen = nil, 0
	c.readEnd.stop()
	c.wrEnd.stop()
	c.changed.Broadcast()
	if c.state == gone {
		return nil
	}
	c.send(opShutdown, flagNoSend|flagNoReceive, nil)
	c.linger = time.AfterFunc(linger, func() {
		c.device.mu.Lock()
		defer c.device.mu.Unlock()
		if c.state != gone {
			c.reset()
			c.device.pump()
		}
	})
	c.device.pump()
	return nil
}

func (c *Conn) failed(op string, err error) error {
	return &net.OpError{Op: op, Net: network, Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}

// LocalAddr implements net.Conn.
func (c *Conn) LocalAddr() net.Addr { return Addr{c.key.hostCID, c.key.hostPort} }

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return Addr{c.device.guestCID, c.key.guestPort} }

// deadline of reads or writes.
type deadline struct {
	expired bool
	timer   *time.Timer
}

func (d *deadline) stop() {
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
}

// SetDeadline implements net.Conn.
func (c *Conn) SetDeadline(t time.Time) error { return c.set(t, &c.readEnd, &c.wrEnd) }

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.set(t, &c.readEnd) }

// SetWriteDeadline implements net.Conn.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.set(t, &c.wrEnd) }

func (c *Conn) set(t time.Time, ends ...*deadline) error {
	c.device.mu.Lock()
	defer c.device.mu.Unlock()
	if c.closed {
		return c.failed("set", net.ErrClosed)
	}
	for _, d := range ends {
		d.stop()
		d.expired = false
		if t.IsZero() {
			continue
		}
		wait := time.Until(t)
		if wait <= 0 {
			d.expired = true
			continue
		}
		var mine *time.Timer
		mine = time.AfterFunc(wait, func() {
			c.device.mu.Lock()
			defer c.device.mu.Unlock()
			if d.timer == mine { // none was set since
				d.expired = true
				c.changed.Broadcast()
			}
		})
		d.timer = mine
	}
	c.changed.Broadcast()
	return nil
}
