package hostvsock_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/keyhold/keyhold/internal/vmtest/fakeguest"
	"github.com/keyhold/keyhold/internal/vmtest/hostvsock"
)

func TestAddressesNameContextIDs(t *testing.T) {
	d := ready(t)
	c, s := dialled(t, d)
	if got, want := c.LocalAddr().String(), fmt.Sprintf("3:%d", s.host); got != want {
		t.Errorf("local %s, want %s", got, want)
	}
	if got := c.RemoteAddr(); got != (hostvsock.Addr{CID: 16, Port: 5000}) || got.Network() != "vsock" {
		t.Errorf("remote %s", got)
	}
	l := listen(t, d.dev)
	in, _ := accepted(t, d, l)
	if in.LocalAddr().String() != "3:9000" || in.RemoteAddr().String() != "16:1234" || l.Addr().String() != "3:9000" {
		t.Errorf("accepted %s from %s on %s", in.LocalAddr(), in.RemoteAddr(), l.Addr())
	}
}

func TestDataIsSplitToTheGuestsBuffers(t *testing.T) {
	d := ready(t)
	c, s := dialled(t, d)
	want := bytes.Repeat([]byte("0123456789"), 3000)
	if _, err := c.Write(want); err != nil {
		t.Fatal(err)
	}
	var got []byte
	for len(got) < len(want) {
		_, body := s.expect(data)
		if len(body) > linuxBuffer-headerLen {
			t.Fatalf("%d bytes in a buffer of %d", len(body), linuxBuffer)
		}
		got = append(got, body...)
	}
	if !bytes.Equal(got, want) { //nolint:forbidigo // public
		t.Error("other bytes arrived")
	}
}

func TestABufferTooSmallForAPacketEndsTheDevice(t *testing.T) {
	for name, size := range map[string]int{"no room for a head": headerLen - 1, "none for data": headerLen} {
		t.Run(name, func(t *testing.T) {
			d := boot(t, hostvsock.New(guestCID), 0, size)
			l := listen(t, d.dev)
			s := &stream{driver: d, host: hostPort, guest: 1, alloc: 100}
			s.send(request, 0, nil)
			if size >= headerLen {
				d.offer()
				s.rx.Await()
				c, err := l.Accept()
				if err != nil {
					t.Fatal(err)
				}
				if _, err := c.Write([]byte("x")); err != nil {
					t.Fatal(err)
				}
				defer c.Close()
			}
			d.offer()
			if err := d.guest.Wait(); err == nil {
				t.Error("it went on")
			}
		})
	}
}

func TestTheGuestGetsNoMoreThanItsCredit(t *testing.T) {
	d := boot(t, hostvsock.New(guestCID), 16, 4096)
	c, s := dialled(t, d)
	s.alloc = 5000
	s.send(creditUpdate, 0, nil)
	done := make(chan error, 1)
	go func() {
		_, err := c.Write(make([]byte, 12_000))
		done <- err
	}()
	for got := 0; got < 12_000; {
		_, body := s.expect(data)
		got += len(body)
		inFlight := got - int(s.fwd)
		if inFlight > 5000 {
			t.Fatalf("%d bytes came on a credit of 5000", inFlight)
		}
		if inFlight == 5000 {
			s.fwd = uint32(got)
			s.send(creditUpdate, 0, nil)
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestAFullGuestBlocksWritesUntilTheirDeadline(t *testing.T) {
	d := ready(t)
	c, s := dialled(t, d)
	s.alloc = 10
	s.send(creditUpdate, 0, nil)
	if err := c.SetWriteDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	n, err := c.Write(make([]byte, 100))
	wantErr(t, "write", err, os.ErrDeadlineExceeded)
	if n != 10 {
		t.Errorf("wrote %d bytes, credit was for 10", n)
	}
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("%v is no time-out", err)
	}
}

func TestTheGuestLearnsOfRoomAsDataIsRead(t *testing.T) {
	d := ready(t)
	c, s := dialled(t, d)
	const chunk = 16 << 10
	for range 3 {
		s.send(data, 0, make([]byte, chunk))
	}
	if _, err := io.ReadFull(c, make([]byte, 3*chunk)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		s.send(data, 0, make([]byte, chunk))
	}
	if _, err := io.ReadFull(c, make([]byte, 2*chunk)); err != nil {
		t.Fatal(err)
	}
	p, _ := s.expect(creditUpdate)
	if p.Fwd < 4*chunk || p.Alloc != 256<<10 {
		t.Errorf("told of %d bytes, buffer %d", p.Fwd, p.Alloc)
	}
}

func TestCountersOfCreditWrapAround(t *testing.T) {
	d := ready(t)
	c, s := dialled(t, d)
	s.fwd = 0xffff_fff0 // as if it took what it never got: nothing fits
	s.alloc = 8
	s.send(creditUpdate, 0, nil)
	if err := c.SetWriteDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Write([]byte("x")); n != 0 || err == nil {
		t.Errorf("wrote %d bytes, error %v", n, err)
	}
	s.alloc = 17 // 16 bytes are in flight by that count
	s.send(creditUpdate, 0, nil)
	if err := c.SetWriteDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Write([]byte("x")); n != 1 || err != nil {
		t.Errorf("wrote %d bytes, error %v", n, err)
	}
}

func TestAGuestBeyondItsCreditIsReset(t *testing.T) {
	d := ready(t)
	c, s := dialled(t, d)
	for range 5 { // 5 times 60 KiB is more than 256 KiB
		s.send(data, 0, make([]byte, 60<<10))
	}
	s.expect(reset)
	n, err := io.Copy(io.Discard, c)
	wantErr(t, "read", err, syscall.ECONNRESET)
	if n != 4*60<<10 {
		t.Errorf("read %d bytes before", n)
	}
}

func TestHalfCloseByTheHostLeavesReadingOpen(t *testing.T) {
	d := ready(t)
	c, s := dialled(t, d)
	if _, err := c.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got := s.read(8); string(got) != "question" {
		t.Errorf("got %q", got)
	}
	if p, _ := s.expect(shutdown); p.Flags != noSend {
		t.Errorf("flags %d", p.Flags)
	}
	_, err := c.Write([]byte("more"))
	wantErr(t, "write", err, syscall.EPIPE)
	s.send(data, 0, []byte("answer"))
	s.send(shutdown, noSend|noReceive, nil)
	if got, err := io.ReadAll(c); err != nil || string(got) != "answer" {
		t.Errorf("read %q, %v", got, err)
	}
	s.expect(reset) // both are through
}

func TestHalfCloseByTheGuestLeavesWritingOpen(t *testing.T) {
	d := ready(t)
	c, s := dialled(t, d)
	s.send(data, 0, []byte("question"))
	s.send(shutdown, noSend, nil)
	if got, err := io.ReadAll(c); err != nil || string(got) != "question" {
		t.Errorf("read %q, %v", got, err)
	}
	if _, err := c.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	if got := s.read(6); string(got) != "answer" {
		t.Errorf("got %q", got)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if p, _ := s.expect(shutdown); p.Flags != noSend|noReceive {
		t.Errorf("flags %d", p.Flags)
	}
}

func TestWritingToAGuestThatReceivesNoMoreFails(t *testing.T) {
	d := ready(t)
	c, s := dialled(t, d)
	s.send(shutdown, noReceive, nil)
	_, err := c.Write([]byte("x"))
	wantErr(t, "write", err, syscall.EPIPE)
	s.send(data, 0, []byte("but it sends"))
	b := make([]byte, 100)
	if n, err := c.Read(b); err != nil || string(b[:n]) != "but it sends" {
		t.Errorf("read %q, %v", b[:n], err)
	}
}

func TestDataSentBeforeTheGuestClosedIsRead(t *testing.T) {
	d := ready(t)
	c, s := dialled(t, d)
	s.send(data, 0, []byte("last words"))
	s.send(shutdown, noSend|noReceive, nil)
	s.expect(reset)
	if got, err := io.ReadAll(c); err != nil || string(got) != "last words" {
		t.Errorf("read %q, %v", got, err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestAResetByTheGuestIsAnErrorAfterTheData(t *testing.T) {
	d := ready(t)
	c, s := dialled(t, d)
	s.send(data, 0, []byte("cut o"))
	s.send(reset, 0, nil)
	got, err := io.ReadAll(c)
	if string(got) != "cut o" {
		t.Errorf("read %q", got)
	}
	wantErr(t, "read", err, syscall.ECONNRESET)
	_, err = c.Write([]byte("x"))
	wantErr(t, "write", err, syscall.ECONNRESET)
}

func TestDataAfterCloseIsAnsweredByAReset(t *testing.T) {
	d := ready(t)
	c, s := dialled(t, d)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	s.expect(shutdown)
	began := time.Now()
	s.send(data, 0, []byte("too late"))
	s.expect(reset)
	if waited := time.Since(began); waited > 4*time.Second { // after 8 s it comes in any case
		t.Errorf("the reset came after %s", waited)
	}
	s.send(data, 0, []byte("still there?")) // of a connection that is none
	s.expect(reset)
}

func TestOperationsOnAClosedConnectionFail(t *testing.T) {
	d := ready(t)
	c, _ := dialled(t, d)
	waiting := make(chan error, 1)
	go func() {
		_, err := c.Read(make([]byte, 1))
		waiting <- err
	}()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "a read that waited", <-waiting, net.ErrClosed)
	_, read := c.Read(make([]byte, 1))
	_, write := c.Write([]byte("x"))
	for what, err := range map[string]error{"read": read, "write": write, "close": c.Close(), "deadline": c.SetDeadline(time.Now())} {
		wantErr(t, what, err, net.ErrClosed)
	}
}

func TestReadsEndAtTheirDeadlineAndWorkAfterIt(t *testing.T) {
	d := ready(t)
	c, s := dialled(t, d)
	for name, at := range map[string]time.Time{"soon": time.Now().Add(10 * time.Millisecond), "past": time.Unix(1, 0)} {
		if err := c.SetReadDeadline(at); err != nil {
			t.Fatal(err)
		}
		_, err := c.Read(make([]byte, 1))
		wantErr(t, name, err, os.ErrDeadlineExceeded)
	}
	if err := c.SetReadDeadline(time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	s.send(data, 0, []byte("x"))
	if n, err := c.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Errorf("read %d bytes, %v", n, err)
	}
}

func TestAnOldDeadlineDoesNotEndWhatHasANewOne(t *testing.T) {
	d := ready(t)
	c, _ := dialled(t, d)
	for i := range 2000 { // a timer that has fired may still be on its way
		if err := errors.Join(c.SetReadDeadline(time.Now().Add(time.Duration(i%50)*time.Microsecond)), c.SetReadDeadline(time.Now().Add(time.Hour))); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(nil); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAClosedConnectionIsResetWhereTheGuestSaysNothing(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes 8 s")
	}
	t.Parallel()
	d := ready(t)
	c, s := dialled(t, d)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	s.expect(shutdown)
	s.expect(reset)
}

func TestADeadlineEndsAReadThatWaits(t *testing.T) {
	d := ready(t)
	c, _ := dialled(t, d)
	waiting := make(chan error, 1)
	go func() {
		_, err := c.Read(make([]byte, 1))
		waiting <- err
	}()
	if err := c.SetDeadline(time.Now()); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "read", <-waiting, os.ErrDeadlineExceeded)
}

func TestDialFailsWhereNobodyListens(t *testing.T) {
	d := ready(t)
	done := make(chan error, 1)
	go func() {
		_, err := d.dev.Dial(t.Context(), guestPort)
		done <- err
	}()
	p, _ := d.expect(request)
	(&stream{driver: d, host: p.SrcPort, guest: guestPort}).send(reset, 0, nil)
	wantErr(t, "dial", <-done, syscall.ECONNREFUSED)
}

func TestDialFailsWithoutAGuest(t *testing.T) {
	_, err := hostvsock.New(guestCID).Dial(t.Context(), guestPort)
	wantErr(t, "dial", err, syscall.ENODEV)
}

func TestDialEndsWithItsContextAndTellsTheGuest(t *testing.T) {
	d := ready(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := d.dev.Dial(ctx, guestPort)
		done <- err
	}()
	p, _ := d.expect(request)
	cancel()
	wantErr(t, "dial", <-done, context.Canceled)
	d.expect(reset)
	(&stream{driver: d, host: p.SrcPort, guest: guestPort}).send(response, 0, nil) // crossed the reset
	d.expect(reset)
}

func TestDialWaitsForTheGuestsDriver(t *testing.T) {
	dev := hostvsock.New(guestCID)
	g := fakeguest.Attach(t, dev.Backend())
	g.Negotiate(fakeguest.Features)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := dev.Dial(ctx, guestPort)
		done <- err
	}()
	d := &driver{t: t, guest: g, rx: g.Start(0, 16), tx: g.Start(1, 16), buffer: linuxBuffer, dev: dev}
	d.offer()
	d.expect(request)
	cancel()
	wantErr(t, "dial", <-done, context.Canceled)
}

func TestAnotherPeersContextIDIsWhatTheGuestSees(t *testing.T) {
	d := ready(t)
	done := make(chan error, 1)
	go func() {
		_, err := d.dev.DialFrom(t.Context(), 17, guestPort)
		done <- err
	}()
	p, _ := d.expect(request)
	if p.SrcCID != 17 {
		t.Errorf("the guest sees %d", p.SrcCID)
	}
	d.send(packet{SrcCID: guestCID, DstCID: 17, SrcPort: guestPort, DstPort: p.SrcPort, Op: reset}, nil)
	wantErr(t, "dial", <-done, syscall.ECONNREFUSED)
}

func TestWhatNobodyAskedForIsReset(t *testing.T) {
	for _, tc := range []struct {
		name string
		p    packet
	}{
		{"a request to a port where nobody listens", packet{DstCID: 3, DstPort: 1, Op: request}},
		{"a request to another context id", packet{DstCID: 4, DstPort: hostPort, Op: request}},
		{"a request for datagrams", packet{DstCID: 3, DstPort: hostPort, Op: request, Type: 3}},
		{"data of no connection", packet{DstCID: 3, DstPort: hostPort, Op: data}},
		{"a response to nothing", packet{DstCID: 3, DstPort: hostPort, Op: response}},
		{"an operation that is none", packet{DstCID: 3, DstPort: hostPort, Op: 99}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := ready(t)
			listen(t, d.dev)
			tc.p.SrcCID, tc.p.SrcPort = guestCID, 77
			d.send(tc.p, nil)
			if p, _ := d.expect(reset); p.DstPort != 77 || p.SrcPort != tc.p.DstPort || p.SrcCID != tc.p.DstCID {
				t.Errorf("the reset says %+v", p)
			}
		})
	}
}

func TestWhatASecondTimeMakesNoSenseResetsAConnection(t *testing.T) {
	for name, op := range map[string]uint16{"request": request, "response": response, "nonsense": 42} {
		t.Run(name, func(t *testing.T) {
			d := ready(t)
			c, s := dialled(t, d)
			s.send(op, 0, nil)
			s.expect(reset)
			_, err := c.Read(make([]byte, 1))
			wantErr(t, "read", err, syscall.ECONNRESET)
		})
	}
}

func TestPacketsOfAnotherContextIDAreDropped(t *testing.T) {
	d := ready(t)
	listen(t, d.dev)
	d.send(packet{SrcCID: 17, DstCID: 3, SrcPort: 1, DstPort: hostPort, Op: request}, nil)
	d.send(packet{SrcCID: guestCID, DstCID: 1 << 40, SrcPort: 1, DstPort: hostPort, Op: request}, nil)
	d.send(packet{SrcCID: guestCID, DstCID: 3, SrcPort: 2, DstPort: hostPort, Op: request}, nil)
	if p, _ := d.expect(response); p.DstPort != 2 {
		t.Errorf("port %d was answered", p.DstPort)
	}
}

func TestMalformedPacketsEndTheDevice(t *testing.T) {
	for name, send := range map[string]func(d *driver){
		"shorter than a head": func(d *driver) { d.tx.Add(fakeguest.Part{Out: make([]byte, headerLen-1)}) },
		"a length that lies":  func(d *driver) { d.put(packet{SrcCID: guestCID, DstCID: 3, Op: data, Len: 1 << 30}, []byte("x")) },
		"a reset with data":   func(d *driver) { d.put(packet{SrcCID: guestCID, DstCID: 3, Op: reset}, []byte("x")) },
	} {
		t.Run(name, func(t *testing.T) {
			d := ready(t)
			send(d)
			d.tx.Kick()
			if err := d.guest.Wait(); err == nil {
				t.Error("it went on")
			}
		})
	}
}

// A guest that asks and takes no answers must not fill the host's memory.
func TestAGuestWithoutBuffersIsNotListenedToForEver(t *testing.T) {
	d := boot(t, hostvsock.New(guestCID), 0, linuxBuffer)
	back := 0
	for range 2000 {
		d.put(packet{SrcCID: guestCID, DstCID: 3, SrcPort: 1, DstPort: 1, Op: request}, nil)
		if !d.tx.Interrupted(100 * time.Millisecond) {
			if _, _, ok := d.tx.Used(); !ok {
				break
			}
			back++
			continue
		}
		for _, _, ok := d.tx.Used(); ok; _, _, ok = d.tx.Used() {
			back++
		}
	}
	if back < 1000 || back > 1024 {
		t.Errorf("%d requests were taken", back)
	}
	for range 16 {
		d.offer()
	}
	for range 1000 {
		d.expect(reset)
	}
	d.tx.Await() // the one that was left lying
}

func TestConnectionsEndWithTheGuestAndListenersStay(t *testing.T) {
	dev := hostvsock.New(guestCID)
	l := listen(t, dev)
	first := boot(t, dev, 8, linuxBuffer)
	c, _ := dialled(t, first)
	in, _ := accepted(t, first, l)
	if err := first.guest.End(); err != nil {
		t.Fatal(err)
	}
	for name, conn := range map[string]net.Conn{"dialled": c, "accepted": in} {
		_, err := conn.Read(make([]byte, 1))
		wantErr(t, name, err, syscall.ECONNRESET)
	}
	second := boot(t, dev, 8, linuxBuffer)
	again, s := accepted(t, second, l)
	s.send(data, 0, []byte("hello again"))
	b := make([]byte, 100)
	if n, err := again.Read(b); err != nil || string(b[:n]) != "hello again" {
		t.Errorf("read %q, %v", b[:n], err)
	}
}

func TestAClosedListenerRefusesAndEndsAccept(t *testing.T) {
	d := ready(t)
	l := listen(t, d.dev)
	_, err := d.dev.Listen(hostPort)
	wantErr(t, "a second listener", err, syscall.EADDRINUSE)
	s := &stream{driver: d, host: hostPort, guest: 1}
	s.send(request, 0, nil)
	s.expect(response)
	waiting := make(chan error, 1)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	s.expect(reset) // it was never accepted
	go func() {
		_, err := l.Accept()
		waiting <- err
	}()
	wantErr(t, "accept", <-waiting, net.ErrClosed)
	wantErr(t, "close", l.Close(), net.ErrClosed)
	s.send(request, 0, nil)
	s.expect(reset)
}

func TestManyConnectionsCarryTheirOwnBytes(t *testing.T) {
	d := boot(t, hostvsock.New(guestCID), 16, linuxBuffer)
	const conns, size = 8, 50_000
	var all []net.Conn
	streams := map[uint32]*stream{}
	for range conns {
		c, s := dialled(t, d)
		all = append(all, c)
		streams[s.host] = s
	}
	var wg sync.WaitGroup
	for i, c := range all {
		wg.Add(2)
		want := bytes.Repeat([]byte{byte(i)}, size)
		go func() {
			defer wg.Done()
			if _, err := c.Write(want); err != nil {
				t.Error(err)
			}
		}()
		go func() {
			defer wg.Done()
			got := make([]byte, size)
			if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) { //nolint:forbidigo // public
				t.Errorf("connection %d: %v", i, err)
			}
		}()
	}
	for left := conns * size; left > 0; { // the guest echoes
		p, body := d.next()
		if p.Op != data {
			continue // credit
		}
		s := streams[p.SrcPort]
		s.fwd += p.Len
		left -= len(body)
		s.send(data, 0, body)
	}
	wg.Wait()
}
