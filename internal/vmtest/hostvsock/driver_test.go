package hostvsock_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhold/keyhold/internal/vmtest/fakeguest"
	"github.com/keyhold/keyhold/internal/vmtest/hostvsock"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	guestCID  = 16
	guestPort = 5000
	hostPort  = 9000

	linuxBuffer = 3776 // what Linux offers for a packet: a page without what its own bookkeeping takes

	request       = 1
	response      = 2
	reset         = 3
	shutdown      = 4
	data          = 5
	creditUpdate  = 6
	creditRequest = 7

	noReceive = 1
	noSend    = 2

	headerLen = 44
	patience  = 10 * time.Second
)

// packet of virtio-vsock, as virtio 1.2, section 5.10.6 has it.
type packet struct {
	SrcCID, DstCID   uint64
	SrcPort, DstPort uint32
	Len              uint32
	Type, Op         uint16
	Flags            uint32
	Alloc, Fwd       uint32
}

// driver is the guest's virtio-vsock driver.
type driver struct {
	t      *testing.T
	guest  *fakeguest.Guest
	rx, tx *fakeguest.Queue
	buffer int
	dev    *hostvsock.Device
}

// boot starts a guest with that many receive buffers of that size.
func boot(t *testing.T, d *hostvsock.Device, buffers, size int) *driver {
	t.Helper()
	g := fakeguest.Attach(t, d.Backend())
	g.Negotiate(fakeguest.Features)
	drv := &driver{t: t, guest: g, rx: g.Start(0, 16), tx: g.Start(1, 16), buffer: size, dev: d}
	for range buffers {
		drv.offer()
	}
	return drv
}

// ready starts a device and a guest with Linux's buffers.
func ready(t *testing.T) *driver {
	t.Helper()
	return boot(t, hostvsock.New(guestCID), 8, linuxBuffer)
}

func (d *driver) offer() {
	d.rx.Add(fakeguest.Part{In: d.buffer})
	d.rx.Kick()
}

// next waits for a packet and gives its buffer back.
func (d *driver) next() (packet, []byte) {
	d.t.Helper()
	head, n := d.rx.Await()
	raw := bytes.Clone(d.rx.Buffer(head)[:n])
	d.offer()
	var p packet
	if err := binary.Read(bytes.NewReader(raw), binary.LittleEndian, &p); err != nil {
		d.t.Fatal(err)
	}
	if int(p.Len) != n-headerLen || p.Type != 1 || p.DstCID != guestCID {
		d.t.Fatalf("a packet of %d bytes says %+v", n, p)
	}
	return p, raw[headerLen:]
}

// expect waits for a packet of that kind.
func (d *driver) expect(op uint16) (packet, []byte) {
	d.t.Helper()
	p, body := d.next()
	if p.Op != op {
		d.t.Fatalf("operation %d came, want %d: %+v", p.Op, op, p)
	}
	return p, body
}

// send puts a packet into the transmit queue and waits until it was taken.
func (d *driver) send(p packet, body []byte) {
	d.t.Helper()
	d.put(p, body)
	d.tx.Await()
}

func (d *driver) put(p packet, body []byte) {
	d.t.Helper()
	if p.Type == 0 {
		p.Type = 1
	}
	if p.Len == 0 {
		p.Len = uint32(len(body))
	}
	var raw bytes.Buffer
	if err := binary.Write(&raw, binary.LittleEndian, p); err != nil {
		d.t.Fatal(err)
	}
	parts := []fakeguest.Part{{Out: raw.Bytes()}}
	if len(body) > 0 {
		parts = append(parts, fakeguest.Part{Out: body})
	}
	d.tx.Add(parts...)
	d.tx.Kick()
}

// stream is the guest's end of a connection.
type stream struct {
	*driver
	host, guest uint32 // ports
	alloc, fwd  uint32
}

func (s *stream) send(op uint16, flags uint32, body []byte) {
	s.t.Helper()
	s.driver.send(packet{
		SrcCID: guestCID, DstCID: hostvsock.ParentCID, SrcPort: s.guest, DstPort: s.host,
		Op: op, Flags: flags, Alloc: s.alloc, Fwd: s.fwd,
	}, body)
}

// read takes data until there are n bytes.
func (s *stream) read(n int) []byte {
	s.t.Helper()
	var got []byte
	for len(got) < n {
		_, body := s.expect(data)
		got = append(got, body...)
		s.fwd += uint32(len(body))
	}
	return got
}

// dialled connects the host to the guest.
func dialled(t *testing.T, d *driver) (net.Conn, *stream) {
	t.Helper()
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		c, err := d.dev.Dial(t.Context(), guestPort)
		done <- result{c, err}
	}()
	p, _ := d.expect(request)
	if p.SrcCID != hostvsock.ParentCID || p.DstPort != guestPort || p.Alloc == 0 {
		t.Fatalf("the request says %+v", p)
	}
	s := &stream{driver: d, host: p.SrcPort, guest: guestPort, alloc: 64 << 10}
	s.send(response, 0, nil)
	r := <-done
	if r.err != nil {
		t.Fatal(r.err)
	}
	t.Cleanup(func() { _ = r.conn.Close() })
	return r.conn, s
}

// accepted connects the guest to the host.
func accepted(t *testing.T, d *driver, l net.Listener) (net.Conn, *stream) {
	t.Helper()
	s := &stream{driver: d, host: hostPort, guest: 1234, alloc: 64 << 10}
	s.send(request, 0, nil)
	s.expect(response)
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c, s
}

func listen(t *testing.T, d *hostvsock.Device) net.Listener {
	t.Helper()
	l, err := d.Listen(hostPort)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func wantErr(t *testing.T, what string, err, want error) {
	t.Helper()
	var op *net.OpError
	if !errors.Is(err, want) || !errors.As(err, &op) {
		t.Errorf("%s: %v, want a net.OpError with %v", what, err, want)
	}
}
