package serve_test

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func start(t *testing.T, o enclavetest.Options) *enclavetest.Server {
	t.Helper()
	s, err := enclavetest.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func dial(t *testing.T, s *enclavetest.Server) net.Conn {
	t.Helper()
	conn, err := s.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// hello is dial with the lane's number and a ticket.
func hello(t *testing.T, s *enclavetest.Server) (net.Conn, *wire.HelloReply) {
	t.Helper()
	conn := dial(t, s)
	h, err := enclavetest.Ask[wire.HelloReply](conn, wire.TypeHello, &wire.Hello{})
	if err != nil {
		t.Fatal(err)
	}
	return conn, h
}

func frame(t *testing.T, id uint64, typ wire.Type, body any) []byte {
	t.Helper()
	b, err := wire.Encode(id, typ, body)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := wire.WriteFrame(&out, b); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// send writes in the background, since a pipe has no buffer and the server may
// stop reading.
func send(t *testing.T, conn net.Conn, b []byte) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := conn.Write(b); err != nil && !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("send: %v", err)
		}
	})
	t.Cleanup(func() {
		conn.Close()
		wg.Wait()
	})
}

// answer reads the next frame and returns its id, type and, for an error, code.
func answer(t *testing.T, conn net.Conn) (id uint64, typ wire.Type, code refusal.Code) {
	t.Helper()
	b, err := wire.ReadFrame(conn)
	if err != nil {
		t.Fatalf("read answer: %v", err)
	}
	m, err := wire.Decode(b)
	if err != nil {
		t.Fatalf("read answer: %v", err)
	}
	if m.Type != wire.TypeError {
		return m.ID, m.Type, ""
	}
	var e wire.Error
	if err := wire.DecodeBody(m, &e); err != nil {
		t.Fatalf("read error: %v", err)
	}
	if entry, ok := refusal.Lookup(refusal.Code(e.Code)); !ok || e.Text != entry.Text || len(e.Ticket) != wire.TicketLen {
		t.Errorf("error %q has text %q and a ticket of %d bytes", e.Code, e.Text, len(e.Ticket))
	}
	return m.ID, m.Type, refusal.Code(e.Code)
}

func wantClosed(t *testing.T, conn net.Conn) {
	t.Helper()
	if n, err := conn.Read(make([]byte, 1)); err == nil || n != 0 {
		t.Errorf("the connection is still open")
	}
}

func signRequest(s *enclavetest.Server, ticket wire.Ticket, payloads ...string) *wire.Sign {
	rs := make([]record.Record, len(payloads))
	for i, p := range payloads {
		rs[i].Payload = []byte(p)
	}
	return &wire.Sign{
		Ticket: ticket, BatchID: "imp-b0000000", ImportID: "imp", BatchFence: 1, KeyID: s.Keys()[0].KeyID, KeyFence: 1,
		LeaseMS: 10_000, Kind: record.Message, Payload: record.EncodePayload(rs), Probe: wire.NoProbe,
	}
}

// memory is a log that is read while others write it.
type memory struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (m *memory) Write(p []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.b.Write(p)
}

func (m *memory) String() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.b.String()
}

func (m *memory) logger() *slog.Logger {
	return slog.New(slog.NewJSONHandler(m, &slog.HandlerOptions{Level: slog.LevelDebug}))
}
