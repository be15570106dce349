package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/keyhold/keyhold/internal/vmtest/guestmem"
)

// Flags of a descriptor (virtio 1.2, section 2.7.5) and of the available ring.
const (
	descNext     = 1
	descWrite    = 2
	descIndirect = 4

	availNoInterrupt = 1
)

const (
	maxQueueSize = 32768 // entries (virtio 1.2, section 2.7)
	// MaxChain is the most that one chain may hold, in bytes: vsock packets are
	// up to 64 KiB, NSM messages up to 12.
	MaxChain = 1 << 20
)

// Errors of what the driver put into a queue. Each ends the device.
var (
	ErrIndirect = errors.New("a descriptor is indirect, which was not offered")
	ErrChain    = errors.New("a chain of descriptors is malformed")
	ErrRing     = errors.New("the available ring is malformed")
)

// Chain is the buffers that the driver handed over together. It may change their
// bytes at any time: what is to be checked is copied first.
type Chain struct {
	head uint16
	out  [][]byte // for the device to read
	in   [][]byte // for the device to write
}

// Copy returns what the driver wrote.
func (c *Chain) Copy() []byte {
	b := make([]byte, 0, size(c.out))
	for _, part := range c.out {
		b = append(b, part...)
	}
	return b
}

// Room is how many bytes fit into Fill.
func (c *Chain) Room() int { return size(c.in) }

// Readable reports whether there is anything for the device to read.
func (c *Chain) Readable() bool { return len(c.out) > 0 }

// Fill writes p for the driver and returns how much of it fitted.
func (c *Chain) Fill(p []byte) int {
	n := 0
	for _, part := range c.in {
		n += copy(part, p[n:])
	}
	return n
}

func size(parts [][]byte) (n int) {
	for _, p := range parts {
		n += len(p)
	}
	return n
}

// Queue is the device's end of a split virtqueue. Its methods are called with
// the Backend's lock held.
type Queue struct {
	backend *Backend
	index   int

	size              uint16
	addrs             [3]uint64 // of desc, used and avail, in the front end's process
	desc, used, avail []byte
	lastAvail         uint16 // next entry of avail to be looked at
	usedIdx           uint16
	call, kick        *os.File
	enabled           bool
}

// live reports whether the queue may be used.
func (q *Queue) live() bool {
	return q.kick != nil && q.enabled && q.avail != nil && q.backend.failure == nil
}

// Pop takes the next chain, and none where there is none. A malformed chain ends
// the device, whose driver must not be believed anything any more.
func (q *Queue) Pop() (*Chain, bool) {
	if !q.live() {
		return nil, false
	}
	idx := uint16(guestmem.Load(q.avail[:4]) >> 16)
	waiting := idx - q.lastAvail
	if waiting == 0 {
		return nil, false
	}
	if waiting > q.size {
		q.backend.fail(fmt.Errorf("queue %d: %d chains wait in %d places: %w", q.index, waiting, q.size, ErrRing))
		return nil, false
	}
	head := binary.LittleEndian.Uint16(q.avail[4+2*int(q.lastAvail%q.size):])
	c, err := q.walk(head)
	if err != nil {
		q.backend.fail(fmt.Errorf("queue %d: chain at descriptor %d: %w", q.index, head, err))
		return nil, false
	}
	q.lastAvail++
	return c, true
}

// walk follows a chain. It ends: each step is counted, and a chain with more
// steps than the table has descriptors is a loop.
func (q *Queue) walk(head uint16) (*Chain, error) {
	c := &Chain{head: head}
	total := uint64(0)
	for i, steps := head, uint16(0); ; steps++ {
		if i >= q.size {
			return nil, fmt.Errorf("descriptor %d of %d: %w", i, q.size, ErrChain)
		}
		if steps == q.size {
			return nil, fmt.Errorf("it is a loop: %w", ErrChain)
		}
		var d [16]byte // read once: the driver could change it between two looks
		copy(d[:], q.desc[16*int(i):])
		addr, n := binary.LittleEndian.Uint64(d[:]), binary.LittleEndian.Uint32(d[8:])
		flags := binary.LittleEndian.Uint16(d[12:])
		if err := c.check(flags); err != nil {
			return nil, err
		}
		if total += uint64(n); total > MaxChain {
			return nil, fmt.Errorf("more than %d bytes: %w", MaxChain, ErrChain)
		}
		b, err := q.backend.memory.Guest(addr, uint64(n))
		if err != nil {
			return nil, fmt.Errorf("%w: %w", err, ErrChain)
		}
		if flags&descWrite != 0 {
			c.in = append(c.in, b)
		} else {
			c.out = append(c.out, b)
		}
		if flags&descNext == 0 {
			return c, nil
		}
		i = binary.LittleEndian.Uint16(d[14:])
	}
}

// check refuses flags that were not agreed on, and a buffer for the device to
// read behind one for it to write (virtio 1.2, section 2.7.4.2).
func (c *Chain) check(flags uint16) error {
	switch {
	case flags&descIndirect != 0:
		return ErrIndirect
	case flags&^(descNext|descWrite) != 0:
		return fmt.Errorf("flags %#x: %w", flags, ErrChain)
	case flags&descWrite == 0 && len(c.in) > 0:
		return fmt.Errorf("a readable buffer behind a writable one: %w", ErrChain)
	}
	return nil
}

// Put gives a chain back of whose buffers the device wrote the first n bytes.
// The driver may see it at once, and is woken by Notify.
func (q *Queue) Put(c *Chain, n int) {
	if !q.live() {
		return
	}
	e := q.used[4+8*int(q.usedIdx%q.size):]
	binary.LittleEndian.PutUint32(e, uint32(c.head))
	binary.LittleEndian.PutUint32(e[4:], uint32(n)) //nolint:gosec // at most MaxChain
	q.usedIdx++
	guestmem.Store(q.used[:4], uint32(q.usedIdx)<<16)
}

// Notify wakes the driver, unless it asked for quiet.
func (q *Queue) Notify() {
	if q.live() && guestmem.Load(q.avail[:4])&availNoInterrupt == 0 {
		q.signal()
	}
}

// one is what an eventfd counts up by.
var one = binary.NativeEndian.AppendUint64(nil, 1)

func (q *Queue) signal() {
	if q.call == nil {
		return
	}
	if _, err := q.call.Write(one); err != nil {
		q.backend.fail(fmt.Errorf("queue %d: interrupt the driver: %w", q.index, err))
	}
}

// place finds the queue's tables in the memory that is mapped now.
func (q *Queue) place() error {
	if q.size == 0 {
		return errors.New("the ring has no size")
	}
	n := uint64(q.size)
	tables := [3]struct {
		len   uint64
		align uint64
		into  *[]byte
	}{{16 * n, 16, &q.desc}, {6 + 8*n, 4, &q.used}, {6 + 2*n, 4, &q.avail}}
	for i, t := range tables {
		b, err := q.backend.memory.User(q.addrs[i], t.len)
		if err != nil {
			return fmt.Errorf("table %d: %w", i, err)
		}
		if q.addrs[i]%t.align != 0 || !guestmem.Aligned(b[:4]) {
			return fmt.Errorf("table %d is not aligned", i)
		}
		*t.into = b
	}
	return nil
}

// stop ends the queue until it gets a new kick.
func (q *Queue) stop() error {
	if q.kick == nil {
		return nil
	}
	err := q.kick.Close() // wakes its reader
	q.kick = nil
	return err
}
