// Package hostvsock is the parent instance as a guest's AF_VSOCK sees it: tests
// dial the guest's ports and listen on those of context id 3. It carries streams
// only, and resets what it was not asked for.
package hostvsock

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/keyhold/keyhold/internal/vmtest/vhostuser"
)

// ParentCID is the context id of the parent instance of every Nitro enclave.
const ParentCID = 3

const (
	queueRX = 0 // packets to the guest
	queueTX = 1
	queues  = 2 // QEMU answers the third, for events, itself

	firstPort = 0x4000_0000 // of connections that are dialled from here

	// bufferLen is how much of a connection waits here to be read, in bytes; the
	// guest is told, and sends no more.
	bufferLen = 256 << 10
	// maxWaiting bounds the packets for a guest that gives no buffers. While it is
	// reached, nothing that the guest sends is looked at.
	maxWaiting = 1024

	backlog = 128 // connections that wait to be accepted
	// linger is how long a closed connection waits for the guest to confirm that,
	// as in Linux.
	linger = 8 * time.Second
)

// key names a connection.
type key struct{ hostCID, hostPort, guestPort uint32 }

// packet waits for a buffer of the guest.
type packet struct {
	key   key
	op    uint16
	flags uint32
	data  []byte
	conn  *Conn // nil for a reset of what is none
}

// Device is one guest's vsock. A guest that went may be followed by another:
// listeners stay.
type Device struct {
	guestCID uint32
	backend  *vhostuser.Backend
	mu       sync.Locker // the backend's; guards all below and the connections

	conns     map[key]*Conn
	listeners map[uint32]*listener
	waiting   []packet
	nextPort  uint32
}

// New returns the device of a guest with that context id.
func New(guestCID uint32) *Device {
	d := &Device{guestCID: guestCID, conns: map[key]*Conn{}, listeners: map[uint32]*listener{}, nextPort: firstPort}
	d.backend = vhostuser.New(d, queues, binary.LittleEndian.AppendUint64(nil, uint64(guestCID)))
	d.mu = d.backend.Locker()
	return d
}

// Backend serves the device to QEMU.
func (d *Device) Backend() *vhostuser.Backend { return d.backend }

// Kick implements vhostuser.Device.
func (d *Device) Kick(int) { d.pump() }

// Reset implements vhostuser.Device: connections end with the guest.
func (d *Device) Reset() {
	d.waiting = nil
	for _, c := range d.conns {
		c.broken(syscall.ECONNRESET)
	}
}

// send queues a packet, which pump takes to the guest.
func (d *Device) send(p packet) {
	if p.conn != nil {
		p.conn.queued += len(p.data)
	}
	d.waiting = append(d.waiting, p)
}

// pump carries packets in both directions until none can be carried.
func (d *Device) pump() {
	tx := d.backend.Queue(queueTX)
	taken := false
	for {
		d.flush()
		if len(d.waiting) >= maxWaiting {
			break
		}
		c, ok := tx.Pop()
		if !ok {
			break
		}
		p := c.Copy()
		tx.Put(c, 0)
		taken = true
		d.receive(p)
	}
	if taken {
		tx.Notify()
	}
}

// flush fills the guest's buffers with waiting packets. Data is split where a
// buffer is smaller than it: Linux offers buffers of 3776 bytes.
func (d *Device) flush() {
	rx := d.backend.Queue(queueRX)
	filled := false
	for len(d.waiting) > 0 {
		c, ok := rx.Pop()
		if !ok {
			break
		}
		p := &d.waiting[0]
		room := c.Room() - headerLen
		if c.Readable() || room < min(1, len(p.data)) {
			d.backend.Fail(fmt.Errorf("buffer of %d bytes: %w", c.Room(), errPacket))
			return
		}
		part := p.data[:min(room, len(p.data))]
		rx.Put(c, c.Fill(append(d.head(p, len(part)), part...)))
		filled = true
		if p.data = p.data[len(part):]; len(p.data) == 0 {
			d.waiting = d.waiting[1:]
		}
		if p.conn != nil {
			p.conn.queued -= len(part)
			p.conn.changed.Broadcast()
		}
	}
	if filled {
		rx.Notify()
	}
}

func (d *Device) head(p *packet, n int) []byte {
	h := header{
		srcCID: uint64(p.key.hostCID), dstCID: uint64(d.guestCID), srcPort: p.key.hostPort, dstPort: p.key.guestPort,
		len: uint32(n), typ: typeStream, op: p.op, flags: p.flags, alloc: bufferLen, //nolint:gosec // at most a buffer
	}
	if p.conn != nil {
		h.forwarded = p.conn.forwarded
		p.conn.told = p.conn.forwarded
	}
	return h.append(make([]byte, 0, headerLen+n))
}

// receive takes one packet of the guest.
func (d *Device) receive(p []byte) {
	h, data, err := parse(p)
	if err != nil {
		d.backend.Fail(err)
		return
	}
	if h.srcCID != uint64(d.guestCID) {
		return // it speaks for somebody else, who is not here
	}
	if h.dstCID > 1<<32-1 {
		return // no context id, so nobody to answer as
	}
	k := key{uint32(h.dstCID), h.dstPort, h.srcPort}
	c := d.conns[k]
	switch {
	case c != nil:
		c.receive(h, data)
	case h.op == opRequest && h.typ == typeStream:
		d.accept(k, h)
	case h.op != opReset:
		d.send(packet{key: k, op: opReset})
	}
}

// accept takes a connection that the guest opens.
func (d *Device) accept(k key, h header) {
	l := d.listeners[k.hostPort]
	if l == nil || k.hostCID != ParentCID || len(l.waiting) == cap(l.waiting) {
		d.send(packet{key: k, op: opReset})
		return
	}
	c := d.newConn(k)
	c.state = established
	c.credit(h)
	d.send(packet{key: k, op: opResponse, conn: c})
	l.waiting <- c
}

// Dial connects to a port of the guest as the parent instance. Without a guest
// it fails at once; with one that is not there yet it waits.
func (d *Device) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	return d.DialFrom(ctx, ParentCID, port)
}

// DialFrom is Dial with the context id of somebody else.
func (d *Device) DialFrom(ctx context.Context, cid, port uint32) (net.Conn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.nextPort++
	k := key{cid, d.nextPort, port}
	fail := func(err error) error {
		return &net.OpError{Op: "dial", Net: network, Addr: Addr{d.guestCID, port}, Err: err}
	}
	if !d.backend.Attached() {
		return nil, fail(syscall.ENODEV)
	}
	c := d.newConn(k)
	d.send(packet{key: k, op: opRequest, conn: c})
	d.pump()
	defer context.AfterFunc(ctx, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		c.changed.Broadcast()
	})()
	for c.state == dialling && ctx.Err() == nil {
		c.changed.Wait()
	}
	if c.err != nil {
		return nil, fail(c.err)
	}
	if c.state == dialling {
		c.reset()
		d.pump()
		return nil, fail(ctx.Err())
	}
	return c, nil
}

// Listen accepts what the guest opens to a port of the parent instance.
func (d *Device) Listen(port uint32) (net.Listener, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := &listener{device: d, port: port, waiting: make(chan *Conn, backlog), done: make(chan struct{})}
	if d.listeners[port] != nil {
		return nil, &net.OpError{Op: "listen", Net: network, Addr: l.Addr(), Err: syscall.EADDRINUSE}
	}
	d.listeners[port] = l
	return l, nil
}
