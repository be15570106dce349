package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// Requests of the front end that are understood (QEMU, docs/interop/vhost-user).
const (
	reqGetFeatures         = 1
	reqSetFeatures         = 2
	reqSetOwner            = 3
	reqSetMemTable         = 5
	reqSetVringNum         = 8
	reqSetVringAddr        = 9
	reqSetVringBase        = 10
	reqGetVringBase        = 11
	reqSetVringKick        = 12
	reqSetVringCall        = 13
	reqSetVringErr         = 14
	reqGetProtocolFeatures = 15
	reqSetProtocolFeatures = 16
	reqGetQueueNum         = 17
	reqSetVringEnable      = 18
	reqGetConfig           = 24
)

const (
	headerLen = 12
	// maxBody is the longest body that is read: a config space of 256 bytes and
	// its head, and a memory table of eight regions, are shorter.
	maxBody = 512
	maxFDs  = 8 // regions of a memory table

	version       = 1
	flagVersion   = 0x3
	flagReply     = 0x4
	flagNeedReply = 0x8

	noFD      = 0x100 // in the ring word: no file descriptor comes along
	ringIndex = 0xff
)

// message is a request with the file descriptors that came along. Those that a
// handler keeps it takes out.
type message struct {
	request uint32
	flags   uint32
	body    []byte
	fds     []int
}

// closeFDs closes what no handler took.
func (m *message) closeFDs() error {
	var errs []error
	for _, fd := range m.fds {
		errs = append(errs, unix.Close(fd))
	}
	m.fds = nil
	return errors.Join(errs...)
}

// takeEvent hands out the one eventfd of the message. The front end's own end is
// the same open file: it is never made blocking, not even for a moment, as
// os.File.Fd would make it.
func (m *message) takeEvent() (*os.File, error) {
	if len(m.fds) != 1 {
		return nil, fmt.Errorf("%d file descriptors came along, want 1", len(m.fds))
	}
	if err := unix.SetNonblock(m.fds[0], true); err != nil {
		return nil, fmt.Errorf("make eventfd pollable: %w", err)
	}
	f := os.NewFile(uintptr(m.fds[0]), "eventfd")
	m.fds = nil
	return f, nil
}

// takeFiles hands out all files of the message.
func (m *message) takeFiles() []*os.File {
	files := make([]*os.File, 0, len(m.fds))
	for _, fd := range m.fds {
		files = append(files, os.NewFile(uintptr(fd), "guest memory"))
	}
	m.fds = nil
	return files
}

// u64 reads the body of a request that carries one number.
func (m *message) u64() (uint64, error) {
	if len(m.body) != 8 {
		return 0, errBody
	}
	return binary.LittleEndian.Uint64(m.body), nil
}

// ringState reads the body of a request that carries a ring and a number.
func (m *message) ringState() (ring, num uint32, err error) {
	if len(m.body) != 8 {
		return 0, 0, errBody
	}
	return binary.LittleEndian.Uint32(m.body), binary.LittleEndian.Uint32(m.body[4:]), nil
}

var errBody = errors.New("body has the wrong length")

func readMessage(c *net.UnixConn) (*message, error) {
	header := make([]byte, headerLen)
	oob := make([]byte, unix.CmsgSpace(4*maxFDs))
	n, oobn, flags, _, err := c.ReadMsgUnix(header, oob)
	if err != nil {
		return nil, fmt.Errorf("read header: %w", err)
	}
	if n == 0 {
		return nil, io.EOF
	}
	m := &message{}
	if err := m.addFDs(oob[:oobn]); err != nil {
		return nil, errors.Join(fmt.Errorf("read file descriptors: %w", err), m.closeFDs())
	}
	if flags&unix.MSG_CTRUNC != 0 {
		return nil, errors.Join(errors.New("read file descriptors: too many"), m.closeFDs())
	}
	if err := m.readRest(c, header, n); err != nil {
		return nil, errors.Join(err, m.closeFDs())
	}
	return m, nil
}

func (m *message) readRest(c io.Reader, header []byte, n int) error {
	if _, err := io.ReadFull(c, header[n:]); err != nil {
		return fmt.Errorf("read header: %w", err)
	}
	le := binary.LittleEndian
	m.request, m.flags = le.Uint32(header), le.Uint32(header[4:])
	if m.flags&flagVersion != version || m.flags&flagReply != 0 {
		return fmt.Errorf("request %d: flags %#x are none of a request", m.request, m.flags)
	}
	size := le.Uint32(header[8:])
	if size > maxBody {
		return fmt.Errorf("request %d: body of %d bytes, limit %d", m.request, size, maxBody)
	}
	m.body = make([]byte, size)
	if _, err := io.ReadFull(c, m.body); err != nil {
		return fmt.Errorf("read body: %w", err)
	}
	return nil
}

func (m *message) addFDs(oob []byte) error {
	if len(oob) == 0 {
		return nil
	}
	controls, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return fmt.Errorf("control message: %w", err)
	}
	for _, c := range controls {
		fds, err := unix.ParseUnixRights(&c)
		if err != nil {
			return fmt.Errorf("control message: %w", err)
		}
		m.fds = append(m.fds, fds...)
	}
	return nil
}

func writeReply(c io.Writer, request uint32, body []byte) error {
	le := binary.LittleEndian
	out := le.AppendUint32(make([]byte, 0, headerLen+len(body)), request)
	out = le.AppendUint32(out, version|flagReply)
	out = le.AppendUint32(out, uint32(len(body))) //nolint:gosec // bounded by maxBody
	if _, err := c.Write(slices.Concat(out, body)); err != nil {
		return fmt.Errorf("reply to request %d: %w", request, err)
	}
	return nil
}
