package vhostuser_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/keyhold/keyhold/internal/vmtest/fakeguest"
	"github.com/keyhold/keyhold/internal/vmtest/vhostuser"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// echo answers every chain with its own bytes.
type echo struct {
	backend *vhostuser.Backend
	mu      sync.Mutex
	resets  int
}

func newEcho() *echo {
	e := &echo{}
	e.backend = vhostuser.New(e, 2, []byte{16, 0, 0, 0, 0, 0, 0, 0})
	return e
}

func (e *echo) Kick(i int) {
	q := e.backend.Queue(i)
	for c, ok := q.Pop(); ok; c, ok = q.Pop() {
		q.Put(c, c.Fill(c.Copy()))
		q.Notify()
	}
}

func (e *echo) Reset() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.resets++
}

// attached returns a guest that has agreed with the device on everything.
func attached(t *testing.T) (*fakeguest.Guest, *echo) {
	t.Helper()
	e := newEcho()
	g := fakeguest.Attach(t, e.backend)
	g.Negotiate(fakeguest.Features)
	return g, e
}

func roundTrip(t *testing.T, q *fakeguest.Queue, text string) {
	t.Helper()
	head := q.Add(fakeguest.Part{Out: []byte(text)}, fakeguest.Part{In: 100})
	q.Kick()
	got, n := q.Await()
	if answer := q.Buffer((head + 1) % 8)[:n]; got != head || string(answer) != text {
		t.Fatalf("chain %d came back for %d, with %q", got, head, answer)
	}
}

func TestDeviceAnswersOnEveryQueueAndRoundTheRing(t *testing.T) {
	g, e := attached(t)
	for i := range 2 {
		q := g.Start(i, 8)
		for range 100 { // several times round the ring
			roundTrip(t, q, "hello")
		}
	}
	if err := g.End(); err != nil {
		t.Errorf("ended with: %v", err)
	}
	if e.resets != 1 {
		t.Errorf("the device was reset %d times", e.resets)
	}
}

func TestAChainOfManyBuffersIsOneMessage(t *testing.T) {
	g, _ := attached(t)
	q := g.Start(0, 8)
	q.Add(fakeguest.Part{Out: []byte("ab")}, fakeguest.Part{Out: []byte("cde")}, fakeguest.Part{In: 1}, fakeguest.Part{In: 3})
	q.Kick()
	if _, n := q.Await(); n != 4 || q.Buffer(2)[0] != 'a' || string(q.Buffer(3)[:3]) != "bcd" {
		t.Errorf("%d bytes: %q %q", n, q.Buffer(2)[:1], q.Buffer(3)[:3])
	}
}

func TestChainsOfferedBeforeTheStartAreSeen(t *testing.T) {
	g, _ := attached(t)
	q := g.Start(0, 8)
	base := q.Stop()
	q.Add(fakeguest.Part{Out: []byte("early")}, fakeguest.Part{In: 10})
	q.Resume(base)
	if _, n := q.Await(); n != 5 {
		t.Errorf("%d bytes", n)
	}
}

// The interrupt of a chain that was given back while the old eventfd was in place
// goes to nobody, and a driver that sleeps would sleep for ever.
func TestNewCallEventfdIsWrittenAtOnce(t *testing.T) {
	g, _ := attached(t)
	q := g.Start(0, 8)
	q.Add(fakeguest.Part{Out: []byte("x")}, fakeguest.Part{In: 1})
	q.Kick()
	for !q.Interrupted(time.Minute) { // given back, and told the eventfd that is thrown away now
	}
	q.SetCall()
	if !q.Interrupted(time.Minute) {
		t.Fatal("the new eventfd was not written")
	}
	if _, _, ok := q.Used(); !ok {
		t.Error("no chain had come back")
	}
}

func TestAQueueGoesOnWhereItWasStopped(t *testing.T) {
	g, _ := attached(t)
	q := g.Start(0, 8)
	for range 5 {
		roundTrip(t, q, "before")
	}
	base := q.Stop()
	if base != 5 {
		t.Errorf("it stood at %d", base)
	}
	q.Resume(base)
	for range 10 {
		roundTrip(t, q, "after")
	}
}

func TestMemoryMayBeMappedAnewWhileAQueueRuns(t *testing.T) {
	g, _ := attached(t)
	q := g.Start(0, 8)
	for range 20 {
		roundTrip(t, q, "x")
		g.ShareMemory()
	}
}

func TestADriverThatAsksForQuietIsNotInterrupted(t *testing.T) {
	g, _ := attached(t)
	q := g.Start(0, 8)
	for q.Interrupted(10 * time.Millisecond) { // the one of the start
	}
	q.SetAvail(1, 0)
	q.Add(fakeguest.Part{Out: []byte("x")}, fakeguest.Part{In: 1})
	q.Kick()
	deadline := time.Now().Add(time.Minute)
	for _, _, ok := q.Used(); !ok; _, _, ok = q.Used() {
		if time.Now().After(deadline) {
			t.Fatal("the chain did not come back")
		}
	}
	if q.Interrupted(10 * time.Millisecond) {
		t.Error("it was interrupted")
	}
}

// QEMU 7.2 acknowledges EVENT_IDX for its vhost-user-rng although nobody offered
// it. The guest then stops to kick, and everything hangs: it is better to end.
func TestFeaturesThatWereNotOfferedEndTheDevice(t *testing.T) {
	for name, features := range map[string]uint64{
		"EVENT_IDX":     fakeguest.Features | 1<<29,
		"INDIRECT_DESC": fakeguest.Features | 1<<28,
		"PACKED":        fakeguest.Features | 1<<34,
		"an unknown":    fakeguest.Features | 1<<63,
	} {
		t.Run(name, func(t *testing.T) {
			g := fakeguest.Attach(t, newEcho().backend)
			g.Send(fakeguest.SetFeatures, binary.LittleEndian.AppendUint64(nil, features))
			if err := g.Wait(); !errors.Is(err, vhostuser.ErrFeatures) {
				t.Errorf("ended with: %v", err)
			}
		})
	}
}

func TestADriverOlderThanVirtio1IsRefused(t *testing.T) {
	g := fakeguest.Attach(t, newEcho().backend)
	g.Negotiate(1 << 30)
	g.Send(fakeguest.SetVringKick, make([]byte, 8))
	if err := g.Wait(); !errors.Is(err, vhostuser.ErrFeatures) {
		t.Errorf("ended with: %v", err)
	}
}

func TestMalformedChainsEndTheDevice(t *testing.T) {
	const next, write, indirect = fakeguest.Next, fakeguest.Write, fakeguest.Indirect
	for _, tc := range []struct {
		name string
		make func(q *fakeguest.Queue)
		want error
	}{
		{"a loop", func(q *fakeguest.Queue) {
			q.Describe(0, q.Address(0), 1, next, 1)
			q.Describe(1, q.Address(1), 1, next, 0)
		}, vhostuser.ErrChain},
		{"a descriptor that leads to itself", func(q *fakeguest.Queue) { q.Describe(0, q.Address(0), 0, next, 0) }, vhostuser.ErrChain},
		{"next beyond the table", func(q *fakeguest.Queue) { q.Describe(0, q.Address(0), 1, next, 8) }, vhostuser.ErrChain},
		{"too long for a chain", func(q *fakeguest.Queue) { q.Describe(0, q.Address(0), vhostuser.MaxChain+1, 0, 0) }, vhostuser.ErrChain},
		{"too long by many descriptors", func(q *fakeguest.Queue) {
			for d := range uint16(8) {
				q.Describe(d, fakeguest.GuestBase, vhostuser.MaxChain/4, next, d+1)
			}
		}, vhostuser.ErrChain},
		{"below the memory", func(q *fakeguest.Queue) { q.Describe(0, fakeguest.GuestBase-1, 8, 0, 0) }, vhostuser.ErrChain},
		{"across its end", func(q *fakeguest.Queue) { q.Describe(0, fakeguest.GuestBase+fakeguest.MemorySize-4, 8, 0, 0) }, vhostuser.ErrChain},
		{"an end that overflows", func(q *fakeguest.Queue) { q.Describe(0, ^uint64(0)-2, 8, 0, 0) }, vhostuser.ErrChain},
		{"an address of the front end", func(q *fakeguest.Queue) { q.Describe(0, fakeguest.UserBase, 8, 0, 0) }, vhostuser.ErrChain},
		{"indirect", func(q *fakeguest.Queue) { q.Describe(0, q.Address(0), 16, indirect, 0) }, vhostuser.ErrIndirect},
		{"unknown flags", func(q *fakeguest.Queue) { q.Describe(0, q.Address(0), 16, 1<<7, 0) }, vhostuser.ErrChain},
		{"readable behind writable", func(q *fakeguest.Queue) {
			q.Describe(0, q.Address(0), 1, next|write, 1)
			q.Describe(1, q.Address(1), 1, 0, 0)
		}, vhostuser.ErrChain},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g, e := attached(t)
			q := g.Start(0, 8)
			tc.make(q)
			q.Offer(0)
			q.Kick()
			if err := g.Wait(); !errors.Is(err, tc.want) {
				t.Errorf("ended with: %v", err)
			}
			if _, _, ok := q.Used(); ok {
				t.Error("the chain came back")
			}
			if e.resets != 1 {
				t.Errorf("the device was reset %d times", e.resets)
			}
		})
	}
}

func TestAMalformedRingEndsTheDevice(t *testing.T) {
	for _, tc := range []struct {
		name string
		make func(q *fakeguest.Queue)
		want error
	}{
		{"more chains than places", func(q *fakeguest.Queue) { q.SetAvail(0, 9) }, vhostuser.ErrRing},
		{"an index that went back", func(q *fakeguest.Queue) { q.SetAvail(0, 0xffff) }, vhostuser.ErrRing},
		{"a chain beyond the table", func(q *fakeguest.Queue) { q.Offer(8) }, vhostuser.ErrChain},
		{"a chain far beyond the end", func(q *fakeguest.Queue) { q.Offer(0xffff) }, vhostuser.ErrChain},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g, _ := attached(t)
			q := g.Start(0, 8)
			tc.make(q)
			q.Kick()
			if err := g.Wait(); !errors.Is(err, tc.want) {
				t.Errorf("ended with: %v", err)
			}
		})
	}
}

func TestRequestsThatCannotBeMeantEndTheDevice(t *testing.T) {
	u64 := func(v ...uint64) (b []byte) {
		for _, v := range v {
			b = binary.LittleEndian.AppendUint64(b, v)
		}
		return b
	}
	state := func(ring, v uint64) []byte { return u64(ring | v<<32) }
	const base = fakeguest.UserBase
	for name, m := range map[string]struct {
		request uint32
		body    []byte
	}{
		"unknown":                         {99, nil},
		"features without a body":         {fakeguest.SetFeatures, nil},
		"protocol features not offered":   {fakeguest.SetProtocolFeatures, u64(1 << 1)},
		"memory without files":            {fakeguest.SetMemTable, u64(1, 0, 4096, 0, 0)},
		"memory that ends early":          {fakeguest.SetMemTable, u64(1)[:4]},
		"a ring of no size":               {fakeguest.SetVringNum, state(0, 0)},
		"a ring of seven":                 {fakeguest.SetVringNum, state(0, 7)},
		"a ring of 65536":                 {fakeguest.SetVringNum, state(0, 1<<16)},
		"a third ring of two":             {fakeguest.SetVringNum, state(2, 8)},
		"a base beyond 16 bits":           {fakeguest.SetVringBase, state(0, 1<<16)},
		"tables outside the memory":       {fakeguest.SetVringAddr, u64(0, base-16, base, base, 0)},
		"tables across its end":           {fakeguest.SetVringAddr, u64(0, base+fakeguest.MemorySize-16, base, base, 0)},
		"tables askew":                    {fakeguest.SetVringAddr, u64(0, base, base+2, base, 0)},
		"tables by the guest's address":   {fakeguest.SetVringAddr, u64(0, fakeguest.GuestBase, fakeguest.GuestBase, fakeguest.GuestBase, 0)},
		"logging":                         {fakeguest.SetVringAddr, u64(1<<32, base, base, base, 0)},
		"kick without a file":             {fakeguest.SetVringKick, u64(0)},
		"call without a file":             {fakeguest.SetVringCall, u64(0)},
		"config beyond its end":           {fakeguest.GetConfig, append(u64(200|100<<32), make([]byte, 104)...)},
		"config whose length lies":        {fakeguest.GetConfig, append(u64(100<<32), make([]byte, 8)...)},
		"config that overflows":           {fakeguest.GetConfig, append(u64(0xffffffff|8<<32), make([]byte, 12)...)},
		"a body longer than any":          {fakeguest.GetConfig, make([]byte, 4096)},
		"a kick that names no ring":       {fakeguest.SetVringKick, u64(1 << 20)},
		"the ring word of a ring request": {fakeguest.SetVringEnable, u64(0, 0)},
	} {
		t.Run(name, func(t *testing.T) {
			g, _ := attached(t)
			if m.request == fakeguest.SetVringAddr {
				g.Do(fakeguest.SetVringNum, state(0, 8))
			}
			g.Send(m.request, m.body)
			if err := g.Wait(); err == nil {
				t.Error("accepted")
			} else if !strings.Contains(err.Error(), "vhost-user: ") {
				t.Errorf("ended with: %v", err)
			}
		})
	}
}

func TestConfigSpaceIsReadInParts(t *testing.T) {
	g, _ := attached(t)
	ask := append(binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, 0), 8), make([]byte, 4+8)...)
	if got := g.Ask(fakeguest.GetConfig, ask); !bytes.Equal(got[12:], []byte{16, 0, 0, 0, 0, 0, 0, 0}) { //nolint:forbidigo // public
		t.Errorf("got % x", got)
	}
	if got := binary.LittleEndian.Uint64(g.Ask(fakeguest.GetQueueNum, nil)); got != 2 {
		t.Errorf("%d queues", got)
	}
}

func TestADisabledQueueIsNotServed(t *testing.T) {
	g, _ := attached(t)
	q := g.Start(0, 8)
	q.Pause()
	q.Add(fakeguest.Part{Out: []byte("x")}, fakeguest.Part{In: 1})
	q.Kick()
	g.Ask(fakeguest.GetQueueNum, nil)
	if _, _, ok := q.Used(); ok {
		t.Fatal("it was served")
	}
	q.Continue()
	if _, n := q.Await(); n != 1 {
		t.Errorf("%d bytes", n)
	}
}

func TestASecondFrontEndIsRefusedAndALaterOneServed(t *testing.T) {
	e := newEcho()
	first := fakeguest.Attach(t, e.backend)
	first.Negotiate(fakeguest.Features)
	if err := fakeguest.Attach(t, e.backend).Wait(); err == nil {
		t.Error("a second front end was served")
	}
	roundTrip(t, first.Start(0, 8), "still there")
	if err := first.End(); err != nil {
		t.Fatal(err)
	}
	third := fakeguest.Attach(t, e.backend)
	third.Negotiate(fakeguest.Features)
	roundTrip(t, third.Start(0, 8), "hello")
}

func TestTheEndOfItsContextEndsTheBackend(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), ""), os.NewFile(uintptr(fds[1]), "")
	defer ours.Close()
	c, err := net.FileConn(theirs)
	if err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := newEcho().backend.Serve(ctx, c.(*net.UnixConn)); !errors.Is(err, context.Canceled) {
		t.Errorf("ended with: %v", err)
	}
}
