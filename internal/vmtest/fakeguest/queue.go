package fakeguest

import (
	"encoding/binary"
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyhold/keyhold/internal/vmtest/guestmem"
)

// Flags of descriptors.
const (
	Next     = 1
	Write    = 2
	Indirect = 4
)

// Offsets of a queue's tables in its part of the memory.
const (
	descAt  = 0
	availAt = 0x8000
	usedAt  = 0xa000
)

// Queue is the driver's end of a virtqueue. Each descriptor has a buffer of
// BufferLen bytes of its own.
type Queue struct {
	t         testing.TB
	guest     *Guest
	index     uint32
	size      uint16
	part      []byte // of the memory
	availIdx  uint16
	usedSeen  uint16
	kick      *os.File
	call      *os.File
	nextFree  uint16
	collected int // interrupts so far
}

// Start sets a queue up and enables it. A queue that ran goes on where it stood.
func (g *Guest) Start(index int, size uint16) *Queue {
	g.t.Helper()
	q := &Queue{t: g.t, guest: g, index: uint32(index), size: size, part: g.memory[index*perQueue:][:perQueue]} //nolint:gosec // a handful
	q.Resume(0)
	return q
}

// Resume sets the queue up again, to begin at an index of the available ring.
func (q *Queue) Resume(base uint16) {
	q.t.Helper()
	q.Configure(base)
	q.SetCall()
	q.SetKick()
	q.guest.Do(SetVringEnable, q.state(1))
}

// Pause keeps the device from the queue until Continue.
func (q *Queue) Pause() {
	q.t.Helper()
	q.guest.Do(SetVringEnable, q.state(0))
}

// Continue lets the device look at the queue, which may end it.
func (q *Queue) Continue() {
	q.t.Helper()
	q.guest.Send(SetVringEnable, q.state(1))
}

// Configure sends everything but the eventfds.
func (q *Queue) Configure(base uint16) {
	q.t.Helper()
	q.guest.Do(SetVringNum, q.state(uint32(q.size)))
	q.guest.Do(SetVringBase, q.state(uint32(base)))
	q.guest.Do(SetVringAddr, q.Addresses())
}

// Addresses is the body of SetVringAddr.
func (q *Queue) Addresses() []byte {
	body := q.state(0) // no flags
	first := UserBase + uint64(q.index)*perQueue
	for _, at := range []uint64{descAt, usedAt, availAt} {
		body = binary.LittleEndian.AppendUint64(body, first+at)
	}
	return binary.LittleEndian.AppendUint64(body, 0) // no log
}

// SetCall hands over a new eventfd for interrupts. What the old one got is lost.
func (q *Queue) SetCall() {
	q.t.Helper()
	q.call = q.eventfd(q.call)
	q.guest.Do(SetVringCall, q.word(), eventFD(q.t, q.call))
}

// SetKick hands over a new eventfd for kicks.
func (q *Queue) SetKick() {
	q.t.Helper()
	q.kick = q.eventfd(q.kick)
	q.guest.Do(SetVringKick, q.word(), eventFD(q.t, q.kick))
}

// Stop ends the queue and returns where it stood.
func (q *Queue) Stop() uint16 {
	q.t.Helper()
	return binary.LittleEndian.Uint16(q.guest.Ask(GetVringBase, q.state(0))[4:])
}

func (q *Queue) state(v uint32) []byte {
	return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, q.index), v)
}

func (q *Queue) word() []byte { return binary.LittleEndian.AppendUint64(nil, uint64(q.index)) }

func (q *Queue) eventfd(old *os.File) *os.File {
	q.t.Helper()
	if old != nil {
		if err := old.Close(); err != nil {
			q.t.Fatal(err)
		}
	}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		q.t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "eventfd")
	q.t.Cleanup(func() { _ = f.Close() }) // it may have been replaced
	return f
}

// eventFD is the number of f, which stays pollable.
func eventFD(t testing.TB, f *os.File) (fd int) {
	t.Helper()
	raw, err := f.SyscallConn()
	if err == nil {
		err = raw.Control(func(n uintptr) { fd = int(n) })
	}
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// Part is one buffer of a chain: bytes for the device, or room for its answer.
type Part struct {
	Out []byte
	In  int
}

// Add offers a chain of buffers and returns its first descriptor. The device
// learns of it by Kick.
func (q *Queue) Add(parts ...Part) uint16 {
	q.t.Helper()
	head := q.nextFree
	for i, p := range parts {
		d, flags, n := (head+uint16(i))%q.size, uint16(0), p.In
		if i < len(parts)-1 {
			flags |= Next
		}
		if p.Out != nil {
			n = copy(q.Buffer(d), p.Out)
		} else {
			flags |= Write
		}
		q.Describe(d, q.Address(d), uint32(n), flags, (d+1)%q.size) //nolint:gosec // at most BufferLen
	}
	q.nextFree = (head + uint16(len(parts))) % q.size //nolint:gosec // a handful
	q.Offer(head)
	return head
}

// Describe writes a descriptor as it is told.
func (q *Queue) Describe(d uint16, addr uint64, n uint32, flags, next uint16) {
	e := q.part[descAt+16*int(d):]
	binary.LittleEndian.PutUint64(e, addr)
	binary.LittleEndian.PutUint32(e[8:], n)
	binary.LittleEndian.PutUint16(e[12:], flags)
	binary.LittleEndian.PutUint16(e[14:], next)
}

// Address is where the guest sees the buffer of a descriptor.
func (q *Queue) Address(d uint16) uint64 {
	return GuestBase + uint64(q.index)*perQueue + buffers + uint64(d)*BufferLen
}

// Buffer is the buffer of a descriptor.
func (q *Queue) Buffer(d uint16) []byte { return q.part[buffers+int(d)*BufferLen:][:BufferLen] }

// Offer puts a chain into the available ring.
func (q *Queue) Offer(head uint16) {
	binary.LittleEndian.PutUint16(q.part[availAt+4+2*int(q.availIdx%q.size):], head)
	q.availIdx++
	q.SetAvail(q.flags(), q.availIdx)
}

// SetAvail writes flags and index of the available ring as it is told.
func (q *Queue) SetAvail(flags, idx uint16) {
	guestmem.Store(q.part[availAt:][:4], uint32(flags)|uint32(idx)<<16)
}

func (q *Queue) flags() uint16 { return uint16(guestmem.Load(q.part[availAt:][:4])) } //nolint:gosec // the lower half

// Kick tells the device to look.
func (q *Queue) Kick() {
	q.t.Helper()
	if _, err := q.kick.Write(binary.NativeEndian.AppendUint64(nil, 1)); err != nil {
		q.t.Fatal(err)
	}
}

// Used returns the next chain that came back and how much was written into it.
func (q *Queue) Used() (head uint16, n int, ok bool) {
	if uint16(guestmem.Load(q.part[usedAt:][:4])>>16) == q.usedSeen {
		return 0, 0, false
	}
	e := q.part[usedAt+4+8*int(q.usedSeen%q.size):]
	q.usedSeen++
	return binary.LittleEndian.Uint16(e), int(binary.LittleEndian.Uint32(e[4:])), true
}

// Await waits for an interrupt where no chain has come back yet, as a driver
// does, and returns the next chain.
func (q *Queue) Await() (head uint16, n int) {
	q.t.Helper()
	for {
		if head, n, ok := q.Used(); ok {
			return head, n
		}
		if !q.Interrupted(patience) {
			q.t.Fatalf("queue %d: no chain came back", q.index)
		}
	}
}

// Interrupted waits for an interrupt, at most that long.
func (q *Queue) Interrupted(wait time.Duration) bool {
	q.t.Helper()
	if err := q.call.SetReadDeadline(time.Now().Add(wait)); err != nil {
		q.t.Fatal(err)
	}
	var count [8]byte
	_, err := q.call.Read(count[:])
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return false
	}
	if err != nil {
		q.t.Fatal(err)
	}
	q.collected += int(binary.NativeEndian.Uint64(count[:])) //nolint:gosec // a handful
	return true
}

// Interrupts is how many interrupts Interrupted and Await have collected.
func (q *Queue) Interrupts() int { return q.collected }
