package signclient_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/signclient"
)

// enclave is the other end of a pipe, driven by the test frame by frame.
type enclave struct {
	t    *testing.T
	conn net.Conn
}

// connect returns a client and the enclave it said hello to.
func connect(t *testing.T, opt signclient.Options) (*signclient.Client, *enclave) {
	t.Helper()
	near, far := net.Pipe()
	e := &enclave{t: t, conn: far}
	greeted := make(chan struct{})
	go func() {
		defer close(greeted)
		e.answer(e.next(), wire.TypeHello, &wire.HelloReply{
			BootID: record.BootID{1}, Lane: 7, State: wire.StateReady, ConfigHash: []byte{}, Document: []byte{},
			Statement: []byte{}, Ticket: ticket(0),
		})
	}()
	c, err := signclient.Connect(t.Context(), func(context.Context) (net.Conn, error) { return near, nil }, opt)
	if err != nil {
		t.Fatal(err)
	}
	<-greeted
	t.Cleanup(func() { c.Close(); far.Close() })
	return c, e
}

func ticket(n byte) wire.Ticket {
	b := make(wire.Ticket, wire.TicketLen)
	b[0] = n
	return b
}

// next reads one request.
func (e *enclave) next() *wire.Message {
	b, err := wire.ReadFrame(e.conn)
	if err != nil {
		e.t.Errorf("enclave reads a request: %v", err)
		return &wire.Message{}
	}
	m, err := wire.Decode(b)
	if err != nil {
		e.t.Errorf("enclave reads a request: %v", err)
		return &wire.Message{}
	}
	return m
}

func (e *enclave) answer(m *wire.Message, t wire.Type, body any) {
	b, err := wire.Encode(m.ID, t, body)
	if err != nil {
		e.t.Errorf("enclave encodes an answer: %v", err)
		return
	}
	e.send(b)
}

func (e *enclave) send(b []byte) {
	if err := wire.WriteFrame(e.conn, b); err != nil {
		e.t.Errorf("enclave answers: %v", err)
	}
}

func TestConnectKeepsWhatHelloSaid(t *testing.T) {
	c, _ := connect(t, signclient.Options{})
	if c.BootID() != (record.BootID{1}) || c.Lane() != 7 || c.Hello().State != wire.StateReady {
		t.Fatalf("hello: %+v", c.Hello())
	}
	got, err := c.Ticket(t.Context(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(ticket(0), got); diff != "" {
		t.Fatalf("ticket of hello:\n%s", diff)
	}
}

func TestTwoRequestsAreInFlightAndTheThirdWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, e := connect(t, signclient.Options{})
		loaded := make(chan uint64, 3)
		for range 3 {
			go func() {
				r, err := c.Load(t.Context(), &wire.Load{Header: []byte{}, Keys: [][]byte{}})
				if err != nil {
					t.Error(err)
					return
				}
				loaded <- r.Loaded
			}()
		}
		first, second := e.next(), e.next()
		e.conn.SetReadDeadline(time.Now().Add(time.Second))
		if _, err := wire.ReadFrame(e.conn); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("a third request was sent before an answer")
		}
		e.conn.SetReadDeadline(time.Time{})
		e.answer(first, wire.TypeLoad, loadReply(1))
		third := e.next()
		e.answer(second, wire.TypeLoad, loadReply(2))
		e.answer(third, wire.TypeLoad, loadReply(3))
		if sum := <-loaded + <-loaded + <-loaded; sum != 6 {
			t.Fatalf("answers add up to %d, want 6", sum)
		}
	})
}

func loadReply(n uint64) *wire.LoadReply {
	return &wire.LoadReply{Loaded: n, Refused: []uint32{}, Document: []byte{}, Statement: []byte{}}
}

func TestRefusalsCarryTheirCodeAndLeaveTheClientAlive(t *testing.T) {
	for _, tt := range []struct {
		name string
		code string
		want error
	}{
		{"known", string(refusal.FenceStale), refusal.FenceStale},
		{"unknown", "secret_marker", signclient.ErrUnknownCode},
		{"unknown is internal", "secret_marker", refusal.Internal},
		{"empty", "", signclient.ErrUnknownCode},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, e := connect(t, signclient.Options{})
			go func() {
				e.answer(e.next(), wire.TypeError, &wire.Error{Code: tt.code, Text: "secret_marker", Ticket: ticket(9)})
			}()
			_, err := c.Sign(t.Context(), &wire.Sign{BatchID: "imp-b0000001"})
			if !errors.Is(err, tt.want) || errors.Is(err, signclient.ErrLost) {
				t.Fatalf("err = %v, want %v", err, tt.want)
			}
			if !strings.Contains(err.Error(), "sign batch imp-b0000001") || strings.Contains(err.Error(), "secret_marker") {
				t.Fatalf("error text: %q", err)
			}
			got, err := c.Ticket(t.Context(), time.Hour)
			if err != nil || got[0] != 9 {
				t.Fatalf("the ticket of the refusal was not kept: %v, %v", got, err)
			}
		})
	}
}

func TestAnAnswerThatIsNotOwedKillsTheClient(t *testing.T) {
	reply := func(e *enclave, m *wire.Message, id uint64, typ wire.Type, body any) []byte {
		b, err := wire.Encode(id, typ, body)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, tt := range []struct {
		name  string
		bytes func(e *enclave, m *wire.Message) []byte
	}{
		{"another id", func(e *enclave, m *wire.Message) []byte {
			return reply(e, m, m.ID+1, wire.TypeTicket, &wire.TicketReply{Ticket: ticket(1)})
		}},
		{"another type", func(e *enclave, m *wire.Message) []byte {
			return reply(e, m, m.ID, wire.TypeFence, &wire.FenceReply{Ticket: ticket(1)})
		}},
		{"body of another type", func(e *enclave, m *wire.Message) []byte {
			return reply(e, m, m.ID, wire.TypeTicket, &wire.GetStatus{})
		}},
		{"error without body", func(e *enclave, m *wire.Message) []byte {
			return reply(e, m, m.ID, wire.TypeError, &wire.GetStatus{})
		}},
		{"trailing bytes", func(e *enclave, m *wire.Message) []byte {
			return append(reply(e, m, m.ID, wire.TypeTicket, &wire.TicketReply{Ticket: ticket(1)}), 0)
		}},
		{"no CBOR", func(*enclave, *wire.Message) []byte { return []byte("secret_marker") }},
		{"short ticket", func(e *enclave, m *wire.Message) []byte {
			return reply(e, m, m.ID, wire.TypeTicket, &wire.TicketReply{Ticket: ticket(1)[:8]})
		}},
		{"no ticket", func(e *enclave, m *wire.Message) []byte {
			return reply(e, m, m.ID, wire.TypeTicket, &wire.TicketReply{Ticket: wire.Ticket{}})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, e := connect(t, signclient.Options{})
			go func() { e.send(tt.bytes(e, e.next())) }()
			_, err := c.Ticket(t.Context(), 0)
			if !errors.Is(err, signclient.ErrLost) || !errors.Is(err, signclient.ErrProtocol) {
				t.Fatalf("err = %v, want ErrLost and ErrProtocol", err)
			}
			if strings.Contains(err.Error(), "secret_marker") {
				t.Fatalf("error repeats what came in: %q", err)
			}
			<-c.Done()
			if _, err := c.Status(t.Context()); !errors.Is(err, signclient.ErrNotSent) {
				t.Fatalf("after death: %v, want ErrNotSent", err)
			}
		})
	}
}

func TestARefusalOfTheConnectionNamesItsCode(t *testing.T) {
	near, far := net.Pipe()
	defer far.Close()
	e := &enclave{t: t, conn: far}
	go func() {
		e.next()
		e.answer(&wire.Message{}, wire.TypeError, &wire.Error{Code: string(refusal.Busy), Ticket: wire.Ticket{}})
	}()
	_, err := signclient.Connect(t.Context(), func(context.Context) (net.Conn, error) { return near, nil }, signclient.Options{})
	if !errors.Is(err, refusal.Busy) || !errors.Is(err, signclient.ErrLost) {
		t.Fatalf("err = %v, want busy", err)
	}
}

func TestSilenceIsALostConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, e := connect(t, signclient.Options{Timeout: 3 * time.Second})
		begin := time.Now()
		go e.next()
		_, err := c.Ticket(t.Context(), 0)
		if !errors.Is(err, signclient.ErrLost) || errors.Is(err, signclient.ErrNotSent) {
			t.Fatalf("err = %v, want ErrLost with an unknown outcome", err)
		}
		if took := time.Since(begin); took != 3*time.Second {
			t.Fatalf("waited %v, want 3s", took)
		}
	})
}

func TestAPeerThatDoesNotReadIsALostConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := connect(t, signclient.Options{Timeout: 3 * time.Second})
		if _, err := c.Ticket(t.Context(), 0); !errors.Is(err, signclient.ErrLost) {
			t.Fatalf("err = %v, want ErrLost", err)
		}
	})
}

// In a bubble time stands still while anybody waits for a mutex, so a mutex held
// across the write would stop the write's own deadline. The watch runs outside.
func TestWhoWaitsForAWriteOfAnotherWaitsForNoLock(t *testing.T) {
	hung := time.AfterFunc(time.Minute, func() { panic("a request waits for a lock while another is being written") })
	defer hung.Stop()
	synctest.Test(t, func(t *testing.T) {
		c, _ := connect(t, signclient.Options{Timeout: 3 * time.Second})
		begin := time.Now()
		lost := make(chan error, wire.MaxInFlight)
		for range wire.MaxInFlight { // the peer reads neither
			go func() {
				_, err := c.Ticket(t.Context(), 0)
				lost <- err
			}()
		}
		notSent := 0
		for range wire.MaxInFlight {
			err := <-lost
			if !errors.Is(err, signclient.ErrLost) {
				t.Errorf("err = %v, want ErrLost", err)
			}
			if errors.Is(err, signclient.ErrNotSent) {
				notSent++
			}
		}
		if took := time.Since(begin); took != 3*time.Second || notSent != wire.MaxInFlight-1 {
			t.Errorf("%d were not sent after %v, want %d after 3s", notSent, took, wire.MaxInFlight-1)
		}
	})
}

func TestAnIdleConnectionOutlivesTheTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, e := connect(t, signclient.Options{Timeout: time.Second})
		timer := time.NewTimer(time.Hour)
		<-timer.C
		go func() { e.answer(e.next(), wire.TypeTicket, &wire.TicketReply{Ticket: ticket(4)}) }()
		if got, err := c.Ticket(t.Context(), time.Minute); err != nil || got[0] != 4 {
			t.Fatalf("ticket %v, %v", got, err)
		}
	})
}

func TestACancelledRequestEndsTheConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, e := connect(t, signclient.Options{})
		ctx, cancel := context.WithCancel(t.Context())
		go func() { e.next(); cancel() }()
		_, err := c.Ticket(ctx, 0)
		if !errors.Is(err, signclient.ErrLost) || !errors.Is(err, context.Canceled) {
			t.Fatalf("err = %v, want ErrLost by cancellation", err)
		}
		<-c.Done()
	})
}

func TestARequestCancelledBeforehandLeavesTheConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, e := connect(t, signclient.Options{})
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := c.Status(ctx); !errors.Is(err, context.Canceled) || errors.Is(err, signclient.ErrLost) {
			t.Fatalf("err = %v, want only Canceled", err)
		}
		go func() { e.answer(e.next(), wire.TypeTicket, &wire.TicketReply{Ticket: ticket(4)}) }()
		if _, err := c.Ticket(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
	})
}

func TestTheOtherEndClosingIsNoticedWhileIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, e := connect(t, signclient.Options{})
		e.conn.Close()
		<-c.Done()
		if _, err := c.Status(t.Context()); !errors.Is(err, signclient.ErrNotSent) || !errors.Is(err, signclient.ErrLost) || !errors.Is(err, io.EOF) {
			t.Fatalf("err = %v, want ErrNotSent with io.EOF", err)
		}
	})
}

func TestATicketAgesFromBeforeItWasAskedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, e := connect(t, signclient.Options{})
		asks := make(chan struct{}, 8)
		go func() {
			for n := byte(1); ; n++ {
				b, err := wire.ReadFrame(e.conn)
				if err != nil {
					return
				}
				m, err := wire.Decode(b)
				if err != nil {
					t.Error(err)
					return
				}
				asks <- struct{}{}
				timer := time.NewTimer(2 * time.Second) // the answer takes its time
				<-timer.C
				e.answer(m, wire.TypeTicket, &wire.TicketReply{Ticket: ticket(n)})
			}
		}()
		for _, tt := range []struct {
			maxAge time.Duration
			want   byte
		}{
			{time.Second, 0},                 // that of hello is new enough
			{0, 1},                           // asked, answered after 2 s
			{2*time.Second + 1, 1},           // 2 s old already
			{2 * time.Second, 2},             // so too old now
			{2*time.Second + time.Minute, 2}, // kept
		} {
			got, err := c.Ticket(t.Context(), tt.maxAge)
			if err != nil || got[0] != tt.want {
				t.Fatalf("ticket(%v) = %d, %v, want %d", tt.maxAge, got[0], err, tt.want)
			}
		}
		if len(asks) != 2 {
			t.Fatalf("asked %d times, want 2", len(asks))
		}
	})
}

func TestAnOversizedRequestIsRefusedHere(t *testing.T) {
	c, e := connect(t, signclient.Options{})
	_, err := c.Configure(t.Context(), &wire.Configure{Config: make([]byte, wire.MaxFrame)})
	if !errors.Is(err, refusal.TooLarge) || errors.Is(err, signclient.ErrLost) {
		t.Fatalf("err = %v, want too_large", err)
	}
	go func() { e.answer(e.next(), wire.TypeTicket, &wire.TicketReply{Ticket: ticket(4)}) }()
	if _, err := c.Ticket(t.Context(), 0); err != nil {
		t.Fatalf("after that: %v", err)
	}
}

func TestAFailedDialSentNothing(t *testing.T) {
	refuse := errors.New("no enclave")
	_, err := signclient.Connect(t.Context(), func(context.Context) (net.Conn, error) { return nil, refuse }, signclient.Options{})
	if !errors.Is(err, refuse) || !errors.Is(err, signclient.ErrNotSent) {
		t.Fatalf("err = %v", err)
	}
}

func TestCloseEndsRequestsThatWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, e := connect(t, signclient.Options{})
		go func() { e.next(); c.Close(); c.Close() }()
		if _, err := c.Status(t.Context()); !errors.Is(err, signclient.ErrLost) {
			t.Fatalf("err = %v, want ErrLost", err)
		}
	})
}

func TestTraceSeesEveryRequestAndItsOutcome(t *testing.T) {
	var seen []string
	c, e := connect(t, signclient.Options{Trace: func(typ wire.Type) func(error) {
		return func(err error) { seen = append(seen, fmt.Sprintf("%s %v", typ, errors.Is(err, refusal.Deadline))) }
	}})
	go func() {
		e.answer(e.next(), wire.TypeError, &wire.Error{Code: string(refusal.Deadline), Ticket: wire.Ticket{}})
	}()
	if _, err := c.Sign(t.Context(), &wire.Sign{}); !errors.Is(err, refusal.Deadline) {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"hello false", "sign true"}, seen); diff != "" {
		t.Fatal(diff)
	}
}

// FuzzReply feeds arbitrary bytes as the answer to a sign request: it is taken
// as the one owed answer, refused by its code, or kills the client.
func FuzzReply(f *testing.F) {
	seed := func(id uint64, t wire.Type, body any) {
		b, err := wire.Encode(id, t, body)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	seed(2, wire.TypeSign, &wire.SignReply{Result: []byte{1}, Receipt: []byte{2}, Ticket: ticket(3)})
	seed(2, wire.TypeError, &wire.Error{Code: string(refusal.Deadline), Ticket: ticket(3)})
	seed(0, wire.TypeError, &wire.Error{Code: "?", Ticket: wire.Ticket{}})
	seed(3, wire.TypeTicket, &wire.TicketReply{})
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) == 0 || len(frame) > wire.MaxFrame {
			t.Skip("no frame")
		}
		c, e := connect(t, signclient.Options{})
		go func() { e.next(); e.send(frame) }()
		reply, err := c.Sign(t.Context(), &wire.Sign{})
		lost := errors.Is(err, signclient.ErrLost)
		if err == nil {
			again, encErr := wire.Encode(2, wire.TypeSign, reply)
			if encErr != nil || string(again) != string(frame) {
				t.Fatalf("accepted %x, which encodes as %x", frame, again)
			}
			return
		}
		if _, known := refusal.Lookup(refusal.Of(err)); !lost && !known {
			t.Fatalf("neither lost nor refused: %v", err)
		}
		select {
		case <-c.Done():
			if !lost {
				t.Fatalf("dead after a refusal: %v", err)
			}
		default:
			if lost {
				t.Fatalf("alive after %v", err)
			}
		}
	})
}
