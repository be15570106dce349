// Package vhostuser serves the device side of virtio devices to QEMU over
// vhost-user, with split virtqueues. It refuses every feature that it did not
// offer, and ends a device whose driver hands it anything malformed.
package vhostuser

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"github.com/keyhold/keyhold/internal/vmtest/guestmem"
)

// Feature bits (virtio 1.2, section 6; vhost-user).
const (
	FeatureVersion1  = 1 << 32
	featureProtocol  = 1 << 30
	offered          = FeatureVersion1 | featureProtocol
	protocolMQ       = 1 << 0
	protocolReplyAck = 1 << 3
	protocolConfig   = 1 << 9 // offered by devices with a config space
)

// maxConfig bounds a device's config space, in bytes (QEMU's own limit).
const maxConfig = 256

// ErrFeatures is returned where the front end acknowledges a feature that was
// not offered, or none that is needed. QEMU 7.2 does the first for
// vhost-user-rng: give it event_idx=off,indirect_desc=off.
var ErrFeatures = errors.New("the features are not those that were offered")

// Device is what stands behind the queues. Its methods are called with the
// Backend's lock held.
type Device interface {
	// Kick looks at queue i, where the driver may have put something.
	Kick(i int)
	// Reset forgets the driver: its queues are gone.
	Reset()
}

// Backend serves one Device to one front end at a time.
type Backend struct {
	device   Device
	config   []byte
	protocol uint64 // features of vhost-user that are offered

	mu       sync.Mutex // guards all below, and the state of the device
	conn     *net.UnixConn
	failure  error // why conn is ended
	memory   *guestmem.Memory
	queues   []*Queue
	features uint64
	kicks    sync.WaitGroup // goroutines that wait for kicks
}

// New returns a backend of a device with that many queues and that config space,
// or none.
func New(d Device, queues int, config []byte) *Backend {
	b := &Backend{device: d, config: config, protocol: protocolMQ | protocolReplyAck, memory: &guestmem.Memory{}}
	if len(config) > 0 {
		b.protocol |= protocolConfig
	}
	for i := range queues {
		b.queues = append(b.queues, &Queue{backend: b, index: i})
	}
	return b
}

// Locker is the lock under which the device is called.
func (b *Backend) Locker() sync.Locker { return &b.mu }

// Queue returns queue i, which is used with the lock held.
func (b *Backend) Queue(i int) *Queue { return b.queues[i] }

// Attached reports whether there is a front end. It is called with the lock held.
func (b *Backend) Attached() bool { return b.conn != nil }

// Fail ends the device with an error, which Serve returns. It is called with the
// lock held.
func (b *Backend) Fail(err error) { b.fail(err) }

func (b *Backend) fail(err error) {
	if b.failure != nil || b.conn == nil {
		return
	}
	b.failure = err
	_ = b.conn.Close() // wakes Serve, which has what is to be told in b.failure
}

// Serve answers a front end until it goes, which is no error, or ctx ends. It
// closes c.
func (b *Backend) Serve(ctx context.Context, c *net.UnixConn) (err error) {
	if err := b.attach(c); err != nil {
		return errors.Join(err, c.Close())
	}
	defer func() { err = b.detach(err) }()
	defer context.AfterFunc(ctx, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.fail(ctx.Err())
	})()
	for {
		m, err := readMessage(c)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("vhost-user: %w", err)
		}
		if err := b.answer(c, m); err != nil {
			return err
		}
	}
}

func (b *Backend) attach(c *net.UnixConn) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.conn != nil {
		return errors.New("vhost-user: there is a front end already")
	}
	b.conn, b.failure = c, nil
	return nil
}

// detach forgets the front end and everything it set.
func (b *Backend) detach(err error) error {
	b.mu.Lock()
	if b.failure != nil {
		err = b.failure
	}
	errs := []error{err}
	for _, q := range b.queues {
		errs = append(errs, q.stop())
	}
	b.mu.Unlock()
	b.kicks.Wait()

	b.mu.Lock()
	defer b.mu.Unlock()
	for i, q := range b.queues {
		if q.call != nil {
			errs = append(errs, q.call.Close())
		}
		b.queues[i] = &Queue{backend: b, index: i}
	}
	b.device.Reset()
	errs = append(errs, b.memory.Close())
	if b.failure == nil { // else it is closed
		errs = append(errs, b.conn.Close())
	}
	b.memory, b.features, b.conn, b.failure = &guestmem.Memory{}, 0, nil, nil
	return errors.Join(errs...)
}

// answer does what m asks for, and replies where a reply is due.
func (b *Backend) answer(c io.Writer, m *message) error {
	b.mu.Lock()
	reply, err := b.handle(m)
	if err = errors.Join(err, m.closeFDs()); err != nil {
		err = fmt.Errorf("vhost-user: request %d: %w", m.request, err)
		b.fail(err) // at once: queues may be without their tables
	}
	b.mu.Unlock()
	if err != nil {
		return err
	}
	if reply == nil && m.flags&flagNeedReply != 0 {
		reply = make([]byte, 8) // zero is success; a failure ends the connection
	}
	if reply == nil {
		return nil
	}
	return writeReply(c, m.request, reply)
}

func (b *Backend) handle(m *message) ([]byte, error) {
	switch m.request {
	case reqGetFeatures:
		return number(offered), nil
	case reqGetProtocolFeatures:
		return number(b.protocol), nil
	case reqGetQueueNum:
		return number(uint64(len(b.queues))), nil
	case reqSetFeatures:
		return nil, b.setFeatures(m)
	case reqSetProtocolFeatures:
		acked, err := m.u64()
		if err == nil && acked&^b.protocol != 0 {
			err = fmt.Errorf("protocol features %#x: %w", acked&^b.protocol, ErrFeatures)
		}
		return nil, err
	case reqSetOwner, reqSetVringErr: // nothing is kept of them
		return nil, nil
	case reqGetConfig:
		return b.getConfig(m)
	case reqSetMemTable:
		return nil, b.setMemory(m)
	}
	return b.handleRing(m)
}

func number(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

func (b *Backend) setFeatures(m *message) error {
	acked, err := m.u64()
	if err != nil {
		return err
	}
	if extra := acked &^ offered; extra != 0 {
		return fmt.Errorf("acknowledged %#x besides: %w", extra, ErrFeatures)
	}
	b.features = acked
	return nil
}

func (b *Backend) getConfig(m *message) ([]byte, error) {
	const head = 12 // offset, size and flags
	if len(m.body) < head {
		return nil, errBody
	}
	le := binary.LittleEndian
	offset, n := le.Uint32(m.body), le.Uint32(m.body[4:])
	if offset > maxConfig || n > maxConfig-offset || int(n) != len(m.body)-head {
		return nil, errors.New("range of the config space is impossible")
	}
	var space [maxConfig]byte
	copy(space[:], b.config)
	copy(m.body[head:], space[offset:offset+n])
	return m.body, nil
}

// setMemory maps the guest's memory. It may come again while queues run: their
// tables are found anew.
func (b *Backend) setMemory(m *message) error {
	const head, entry = 8, 32
	le := binary.LittleEndian
	if len(m.body) < head || int(le.Uint32(m.body)) != len(m.fds) || len(m.body) < head+entry*len(m.fds) {
		return errBody
	}
	regions := make([]guestmem.Region, len(m.fds))
	for i := range regions {
		p := m.body[head+entry*i:]
		regions[i] = guestmem.Region{Guest: le.Uint64(p), Size: le.Uint64(p[8:]), User: le.Uint64(p[16:]), Offset: le.Uint64(p[24:])}
	}
	files := m.takeFiles()
	memory, err := guestmem.Map(regions, files)
	for _, f := range files {
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return err
	}
	old := b.memory
	b.memory = memory
	for _, q := range b.queues {
		if q.avail == nil {
			continue
		}
		if err := q.place(); err != nil {
			return errors.Join(fmt.Errorf("queue %d in the new memory: %w", q.index, err), old.Close())
		}
	}
	return old.Close()
}

// waitForKicks calls the device whenever the driver kicks queue i, until its
// eventfd is closed.
func (b *Backend) waitForKicks(i int, kick *os.File) {
	defer b.kicks.Done()
	var count [8]byte
	for {
		if _, err := kick.Read(count[:]); err != nil {
			return
		}
		b.mu.Lock()
		if q := b.queues[i]; q.kick == kick && q.live() {
			b.device.Kick(i)
		}
		b.mu.Unlock()
	}
}
