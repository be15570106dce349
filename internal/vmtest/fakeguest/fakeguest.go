// Package fakeguest plays QEMU and the guest's driver, so that a device can be
// tested without a virtual machine. It checks nothing of what it sends: tests
// send what no driver would.
package fakeguest

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyhold/keyhold/internal/vmtest/vhostuser"
)

// Requests of a front end (QEMU, docs/interop/vhost-user).
const (
	GetFeatures         = 1
	SetFeatures         = 2
	SetOwner            = 3
	SetMemTable         = 5
	SetVringNum         = 8
	SetVringAddr        = 9
	SetVringBase        = 10
	GetVringBase        = 11
	SetVringKick        = 12
	SetVringCall        = 13
	GetProtocolFeatures = 15
	SetProtocolFeatures = 16
	GetQueueNum         = 17
	SetVringEnable      = 18
	GetConfig           = 24
)

// Features that the driver acknowledges: virtio 1 and vhost-user's own.
const Features = 1<<32 | 1<<30

// Where the memory lies. The three addresses of a byte differ, so that mixing
// them up is seen.
const (
	GuestBase  = 0x4000_0000
	UserBase   = 0x7f00_0000_0000
	fileOffset = 0x1000
	MemorySize = 8 << 20

	perQueue  = 2 << 20 // tables, then the buffers of each descriptor
	buffers   = 64 << 10
	BufferLen = 64 << 10 // of each descriptor

	needReply = 0x8
	patience  = 10 * time.Second // longer than anything takes on a busy machine
)

// Guest is a front end with its guest.
type Guest struct {
	t      testing.TB
	conn   *net.UnixConn
	memfd  *os.File
	memory []byte // the guest's, without what the file has before it
	served chan error
	ended  bool
}

// Attach connects to the backend. The test waits for the backend's end.
func Attach(t testing.TB, b *vhostuser.Backend) *Guest {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := unixConn(t, fds[0]), unixConn(t, fds[1])
	g := &Guest{t: t, conn: ours, served: make(chan error, 1)}
	g.allocate()
	go func() { g.served <- b.Serve(context.WithoutCancel(t.Context()), theirs) }()
	t.Cleanup(func() {
		if !g.ended {
			if err := g.End(); err != nil {
				t.Errorf("the backend ended with: %v", err)
			}
		}
		if err := errors.Join(unix.Munmap(g.memory), g.memfd.Close()); err != nil {
			t.Error(err)
		}
	})
	return g
}

func unixConn(t testing.TB, fd int) *net.UnixConn {
	t.Helper()
	f := os.NewFile(uintptr(fd), "vhost-user")
	defer f.Close() //nolint:errcheck // FileConn has its own
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		t.Fatal("a socket pair is not of UNIX sockets")
	}
	return u
}

func (g *Guest) allocate() {
	g.t.Helper()
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		g.t.Fatal(err)
	}
	g.memfd = os.NewFile(uintptr(fd), "guest")
	if err := g.memfd.Truncate(fileOffset + MemorySize); err != nil {
		g.t.Fatal(err)
	}
	g.memory, err = unix.Mmap(fd, fileOffset, MemorySize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		g.t.Fatal(err)
	}
}

// End takes the front end away and returns what the backend ended with.
func (g *Guest) End() error {
	g.t.Helper()
	_ = g.conn.Close() // the backend may have been first
	return g.Wait()
}

// Wait returns what the backend ended with by itself.
func (g *Guest) Wait() error {
	g.t.Helper()
	if g.ended {
		g.t.Fatal("the backend has ended before")
	}
	g.ended = true
	select {
	case err := <-g.served:
		return errors.Join(err, ignoreClosed(g.conn.Close()))
	case <-time.After(patience):
		g.t.Fatal("the backend does not end")
		return nil
	}
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Send sends a request and waits for nothing.
func (g *Guest) Send(request uint32, body []byte, fds ...int) {
	g.t.Helper()
	g.send(request, 1, body, fds)
}

// Do sends a request and waits until it is done.
func (g *Guest) Do(request uint32, body []byte, fds ...int) {
	g.t.Helper()
	g.send(request, 1|needReply, body, fds)
	if reply := g.reply(request); len(reply) != 8 || binary.LittleEndian.Uint64(reply) != 0 {
		g.t.Fatalf("request %d: replied % x", request, reply)
	}
}

// Ask sends a request that has an answer, and returns that.
func (g *Guest) Ask(request uint32, body []byte) []byte {
	g.t.Helper()
	g.send(request, 1, body, nil)
	return g.reply(request)
}

func (g *Guest) send(request, flags uint32, body []byte, fds []int) {
	g.t.Helper()
	p := binary.LittleEndian.AppendUint32(nil, request)
	p = binary.LittleEndian.AppendUint32(p, flags)
	p = binary.LittleEndian.AppendUint32(p, uint32(len(body))) //nolint:gosec // short
	p = append(p, body...)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if _, _, err := g.conn.WriteMsgUnix(p, oob, nil); err != nil {
		g.t.Fatalf("request %d: %v", request, err)
	}
}

func (g *Guest) reply(request uint32) []byte {
	g.t.Helper()
	header := make([]byte, 12)
	if err := g.conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		g.t.Fatal(err)
	}
	if _, err := io.ReadFull(g.conn, header); err != nil {
		g.t.Fatalf("request %d: no reply: %v", request, errors.Join(err, g.Wait()))
	}
	body := make([]byte, binary.LittleEndian.Uint32(header[8:]))
	if _, err := io.ReadFull(g.conn, body); err != nil {
		g.t.Fatalf("request %d: short reply: %v", request, err)
	}
	if got := binary.LittleEndian.Uint32(header); got != request {
		g.t.Fatalf("request %d: reply to %d", request, got)
	}
	return body
}

// Negotiate does what QEMU does before a driver is there, with these features.
func (g *Guest) Negotiate(features uint64) {
	g.t.Helper()
	g.Ask(GetFeatures, nil)
	g.Send(SetProtocolFeatures, g.Ask(GetProtocolFeatures, nil))
	g.Send(SetOwner, nil)
	g.Send(SetFeatures, binary.LittleEndian.AppendUint64(nil, features))
	g.ShareMemory()
}

// ShareMemory sends the memory table, which may be done again.
func (g *Guest) ShareMemory() {
	g.t.Helper()
	body := binary.LittleEndian.AppendUint64(nil, 1) // one region, and padding
	for _, v := range []uint64{GuestBase, MemorySize, UserBase, fileOffset} {
		body = binary.LittleEndian.AppendUint64(body, v)
	}
	g.Do(SetMemTable, body, int(g.memfd.Fd()))
}

// Memory is the guest's memory.
func (g *Guest) Memory() []byte { return g.memory }
