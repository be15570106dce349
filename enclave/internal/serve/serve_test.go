package serve_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

// raw frames bytes that need be no message.
func raw(b []byte) []byte { return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...) }

func canonical(t *testing.T, v any) []byte {
	t.Helper()
	mode, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		t.Fatal(err)
	}
	b, err := mode.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestBadFramesAreAnsweredAndEndTheConnection(t *testing.T) {
	s := start(t, enclavetest.Options{})
	good := frame(t, 7, wire.TypeTicket, &wire.GetTicket{})[4:]
	for _, tc := range []struct {
		name  string
		bytes []byte
		want  refusal.Code
	}{
		{"empty", raw(nil), refusal.BadFrame},
		{"one byte beyond the limit", binary.BigEndian.AppendUint32(nil, wire.MaxFrame+1), refusal.BadFrame},
		{"four gigabytes", binary.BigEndian.AppendUint32(nil, 0xffffffff), refusal.BadFrame},
		{"no CBOR", raw([]byte("GET / HTTP/1.1\r\n\r\n")), refusal.BadMessage},
		{"a cut message in a whole frame", raw(good[:len(good)-1]), refusal.BadMessage},
		{"bytes behind the message", raw(append(bytes.Clone(good), 0)), refusal.BadMessage},
		{"another version", raw(canonical(t, map[string]any{"v": 2, "id": 7, "type": "ticket", "body": map[string]any{}})), refusal.BadVersion},
		{"a field too many", raw(canonical(t, map[string]any{"v": 1, "id": 7, "type": "ticket", "body": map[string]any{}, "x": 1})), refusal.BadMessage},
		{"no id", raw(canonical(t, map[string]any{"v": 1, "type": "ticket", "body": map[string]any{}})), refusal.BadMessage},
		{"a million nested lists", raw(bytes.Repeat([]byte{0x81}, wire.MaxFrame-1)), refusal.BadMessage},
	} {
		t.Run(tc.name, func(t *testing.T) {
			conn, _ := hello(t, s)
			send(t, conn, tc.bytes)
			if id, _, code := answer(t, conn); code != tc.want || id != 0 {
				t.Errorf("got %q for id %d, want %q for 0", code, id, tc.want)
			}
			wantClosed(t, conn)
		})
	}
}

func TestBadBodiesAreAnsweredAndTheConnectionGoesOn(t *testing.T) {
	s := start(t, enclavetest.Options{Keys: 1})
	conn, h := hello(t, s)
	for _, tc := range []struct {
		name string
		typ  wire.Type
		body any
		want refusal.Code
	}{
		{"unknown type", "sing", map[string]any{}, refusal.UnknownType},
		{"an answer as a request", wire.TypeError, &wire.Error{}, refusal.UnknownType},
		{"no body", wire.TypeSign, nil, refusal.BadMessage},
		{"a body of another type", wire.TypeTicket, signRequest(s, h.Ticket, "x"), refusal.BadMessage},
		{"a field too many", wire.TypeTicket, map[string]any{"x": 1}, refusal.BadMessage},
		{"a challenge that brings a public key", wire.TypeAttest, map[string]any{"nonce": make([]byte, 16), "public_key": make([]byte, 32)}, refusal.BadMessage},
		{"a challenge that brings user data", wire.TypeAttest, map[string]any{"nonce": make([]byte, 16), "user_data": make([]byte, 32)}, refusal.BadMessage},
		{"a nonce of 65 bytes", wire.TypeAttest, &wire.Attest{Nonce: make([]byte, 65)}, refusal.BadMessage},
		{"no nonce", wire.TypeAttest, &wire.Attest{Nonce: []byte{}}, refusal.BadMessage},
		{"a key id that is too short", wire.TypeCancel, map[string]any{"key_id": make([]byte, 31), "key_fence": 1}, refusal.BadMessage},
		{"more keys than a load holds", wire.TypeLoad, &wire.Load{Header: s.Sealed().Header, Keys: make([][]byte, wire.MaxLoadKeys+1)}, refusal.TooLarge},
	} {
		t.Run(tc.name, func(t *testing.T) {
			send(t, nopCloser{conn}, frame(t, 9, tc.typ, tc.body))
			if id, _, code := answer(t, conn); code != tc.want || id != 9 {
				t.Errorf("got %q for id %d, want %q for 9", code, id, tc.want)
			}
			if _, err := enclavetest.Ask[wire.TicketReply](conn, wire.TypeTicket, &wire.GetTicket{}); err != nil {
				t.Errorf("next request: %v", err)
			}
		})
	}
}

// nopCloser keeps a subtest's clean-up from closing a connection that others use.
type nopCloser struct{ net.Conn }

func (nopCloser) Close() error { return nil }

func TestAFrameThatIsCutOffEndsTheConnection(t *testing.T) {
	s := start(t, enclavetest.Options{})
	whole := frame(t, 1, wire.TypeTicket, &wire.GetTicket{})
	for n := 1; n < len(whole); n += 5 {
		conn, _ := hello(t, s)
		if _, err := conn.Write(whole[:n]); err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	conn, _ := hello(t, s)
	if st, err := enclavetest.Ask[wire.StatusReply](conn, wire.TypeStatus, &wire.GetStatus{}); err != nil || st.Panics != 0 {
		t.Errorf("status: %+v, %v", st, err)
	}
}

func TestHelloComesFirst(t *testing.T) {
	s := start(t, enclavetest.Options{})
	conn := dial(t, s)
	send(t, conn, frame(t, 3, wire.TypeTicket, &wire.GetTicket{}))
	if id, _, code := answer(t, conn); id != 3 || code != refusal.BadMessage {
		t.Errorf("got %q for id %d", code, id)
	}
	wantClosed(t, conn)
}

func TestHelloWithABadBodyGetsNoLane(t *testing.T) {
	s := start(t, enclavetest.Options{Keys: 1})
	conn := dial(t, s)
	send(t, conn, append(frame(t, 1, wire.TypeHello, map[string]any{"x": 1}), frame(t, 2, wire.TypeReceipts, &wire.Receipts{})...))
	if id, _, code := answer(t, conn); id != 1 || code != refusal.BadMessage {
		t.Errorf("got %q for id %d", code, id)
	}
	wantClosed(t, conn)
}

func TestHelloAgainGivesTheSameLane(t *testing.T) {
	s := start(t, enclavetest.Options{})
	_, other := hello(t, s)
	conn, first := hello(t, s)
	again, err := enclavetest.Ask[wire.HelloReply](conn, wire.TypeHello, &wire.Hello{})
	if err != nil {
		t.Fatal(err)
	}
	if again.Lane != first.Lane || other.Lane == first.Lane {
		t.Errorf("lanes %d, then %d, another connection %d", first.Lane, again.Lane, other.Lane)
	}
}

func TestAnswersComeInTheOrderOfTheRequests(t *testing.T) {
	s := start(t, enclavetest.Options{Keys: 1})
	conn, h := hello(t, s)
	var all []byte
	all = append(all, frame(t, 20, wire.TypeSign, signRequest(s, h.Ticket, "a", "b", "c"))...)
	all = append(all, frame(t, 5, "nonsense", map[string]any{})...)
	all = append(all, frame(t, 20, wire.TypeTicket, &wire.GetTicket{})...) // an id twice is the client's business
	all = append(all, frame(t, 1, wire.TypeSign, signRequest(s, h.Ticket, "other"))...)
	all = append(all, frame(t, 2, wire.TypeStatus, &wire.GetStatus{})...)
	send(t, conn, all)
	type got struct {
		ID   uint64
		Type wire.Type
		Code refusal.Code
	}
	want := []got{
		{20, wire.TypeSign, ""},
		{5, wire.TypeError, refusal.UnknownType},
		{20, wire.TypeTicket, ""},
		{1, wire.TypeError, refusal.FenceConflict},
		{2, wire.TypeStatus, ""},
	}
	for _, w := range want {
		id, typ, code := answer(t, conn)
		if diff := cmp.Diff(w, got{id, typ, code}); diff != "" {
			t.Errorf("answer (-want +got):\n%s", diff)
		}
	}
}

func TestTwoRequestsAreInFlightAndNoMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		goOn := make(chan struct{})
		s := start(t, enclavetest.Options{Keys: 1, Panic: func([]byte) bool { <-goOn; return false }})
		conn, h := hello(t, s)
		frames := [][]byte{frame(t, 1, wire.TypeSign, signRequest(s, h.Ticket, "a"))}
		for id := range uint64(8) {
			frames = append(frames, frame(t, id+2, wire.TypeTicket, &wire.GetTicket{}))
		}
		var written atomic.Int32
		go func() {
			for _, b := range frames {
				if _, err := conn.Write(b); err != nil {
					return
				}
				written.Add(1)
			}
		}()
		synctest.Wait()
		if n := written.Load(); n != wire.MaxInFlight {
			t.Errorf("%d requests taken while the first is signed, want %d", n, wire.MaxInFlight)
		}
		close(goOn)
		for i := range frames {
			if id, _, code := answer(t, conn); id != uint64(i+1) || code != "" {
				t.Errorf("answer %d is for %d: %q", i, id, code)
			}
		}
	})
}

func TestLanesOfEndedConnectionsAreHandedOutAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, enclavetest.Options{})
		for range 20 {
			conn, h := hello(t, s)
			if h.Lane != 0 {
				t.Fatalf("lane %d, want 0 again", h.Lane)
			}
			conn.Close()
			synctest.Wait()
		}
	})
}

func TestAPanicAnswersInternalAndTheEnclaveLives(t *testing.T) {
	const marker = "marker-payload"
	var log memory
	s := start(t, enclavetest.Options{
		Keys: 1, Logger: log.logger(), Panic: func(p []byte) bool { return string(p) == marker },
	})
	conn, h := hello(t, s)
	if _, err := enclavetest.Ask[wire.SignReply](conn, wire.TypeSign, signRequest(s, h.Ticket, "a", marker)); !errors.Is(err, refusal.Internal) {
		t.Errorf("got %v, want %s", err, refusal.Internal)
	}
	m := signRequest(s, h.Ticket, "b")
	m.KeyFence = 2 // the same connection, the same key
	if _, err := enclavetest.Ask[wire.SignReply](conn, wire.TypeSign, m); err != nil {
		t.Errorf("after the panic: %v", err)
	}
	st, err := enclavetest.Ask[wire.StatusReply](conn, wire.TypeStatus, &wire.GetStatus{})
	if err != nil || st.Panics != 1 || st.Batches != 1 {
		t.Errorf("status %+v, %v", st, err)
	}
	if text := log.String(); strings.Contains(text, marker) || !strings.Contains(text, "request panicked") ||
		!strings.Contains(text, "signOne") {
		t.Errorf("the log must name the place and no payload:\n%s", text)
	}
}

func TestConnectionsBeyondTheCapAreToldBusy(t *testing.T) {
	s := start(t, enclavetest.Options{MaxConns: 2})
	first, _ := hello(t, s)
	hello(t, s)
	third := dial(t, s)
	if id, _, code := answer(t, third); id != 0 || code != refusal.Busy {
		t.Errorf("got %q for id %d, want busy", code, id)
	}
	wantClosed(t, third)
	first.Close()
	for { // the slot is free once the server noticed
		conn := dial(t, s)
		_, err := enclavetest.Ask[wire.HelloReply](conn, wire.TypeHello, &wire.Hello{})
		if err == nil {
			return
		}
		if t.Context().Err() != nil {
			t.Fatal("the slot was never free again")
		}
	}
}

func TestTenThousandConnectionsHurtNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, enclavetest.Options{MaxConns: 4})
		conn, _ := hello(t, s)
		for range 10_000 { // none says or reads a word
			if _, err := s.Dial(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := enclavetest.Ask[wire.TicketReply](conn, wire.TypeTicket, &wire.GetTicket{}); err != nil {
			t.Errorf("among ten thousand: %v", err)
		}
		time.Sleep(time.Minute) //nolint:forbidigo // a bubble's clock
		synctest.Wait()
		st, err := enclavetest.Ask[wire.StatusReply](conn, wire.TypeStatus, &wire.GetStatus{})
		if err != nil || st.Connections != 1 {
			t.Errorf("after a minute: %+v, %v", st, err)
		}
	})
}

func TestConnectionsEndByTime(t *testing.T) {
	for _, tc := range []struct {
		name string
		do   func(*testing.T, net.Conn)
		live time.Duration // still open then
		dead time.Duration // closed then
	}{
		{"nothing is said", func(*testing.T, net.Conn) {}, 9 * time.Second, 11 * time.Second},
		{"hello comes byte by byte", func(t *testing.T, c net.Conn) {
			t.Helper()
			b := frame(t, 1, wire.TypeHello, &wire.Hello{})
			go func() {
				for i := range b {
					if _, err := c.Write(b[i : i+1]); err != nil {
						return
					}
					time.Sleep(5 * time.Second) //nolint:forbidigo // a bubble's clock
				}
			}()
		}, 9 * time.Second, 21 * time.Second},
		{"nothing comes after hello", func(t *testing.T, c net.Conn) {
			t.Helper()
			if _, err := enclavetest.Ask[wire.HelloReply](c, wire.TypeHello, &wire.Hello{}); err != nil {
				t.Error(err)
			}
		}, 9 * time.Minute, 11 * time.Minute},
		{"the answer is not read", func(t *testing.T, c net.Conn) {
			t.Helper()
			if _, err := c.Write(frame(t, 1, wire.TypeHello, &wire.Hello{})); err != nil {
				t.Error(err)
			}
		}, 9 * time.Second, 11 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := start(t, enclavetest.Options{})
				watcher, _ := hello(t, s)
				connections := func() uint32 {
					st, err := enclavetest.Ask[wire.StatusReply](watcher, wire.TypeStatus, &wire.GetStatus{})
					if err != nil {
						t.Fatal(err)
					}
					return st.Connections
				}
				conn := dial(t, s)
				tc.do(t, conn)
				for passed := time.Duration(0); passed < tc.live; passed += time.Second {
					time.Sleep(time.Second) //nolint:forbidigo // a bubble's clock
					if connections() != 2 {
						t.Fatalf("closed after %v", passed)
					}
				}
				for passed := tc.live; passed < tc.dead; passed += time.Second {
					time.Sleep(time.Second) //nolint:forbidigo // a bubble's clock
					connections()
				}
				synctest.Wait()
				if n := connections(); n != 1 {
					t.Errorf("%d connections after %v, want 1", n, tc.dead)
				}
			})
		})
	}
}

func TestServeStopsWithItsContextAndClosesEverything(t *testing.T) {
	s := start(t, enclavetest.Options{Keys: 1})
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	var conns []net.Conn
	for range 5 {
		conn, err := new(net.Dialer).DialContext(t.Context(), "unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := enclavetest.Ask[wire.HelloReply](conn, wire.TypeHello, &wire.Hello{}); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("serve: %v", err)
	}
	for _, c := range conns {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("connection: %v", err)
		}
	}
}

// Several parents sign at once with keys of their own and hand over lanes.
func TestParentsSignSideBySide(t *testing.T) {
	s := start(t, enclavetest.Options{Keys: 4, Algorithm: record.Ed25519})
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for n := range 5 {
				conn, err := s.Dial(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				h, err := enclavetest.Ask[wire.HelloReply](conn, wire.TypeHello, &wire.Hello{})
				if err != nil {
					t.Error(err)
					return
				}
				m := signRequest(s, h.Ticket, "a", "b")
				m.KeyID, m.KeyFence = s.Keys()[i].KeyID, record.Fence(n+1)
				if _, err := enclavetest.Ask[wire.SignReply](conn, wire.TypeSign, m); err != nil && !errors.Is(err, refusal.LaneFull) {
					t.Error(err)
				}
				reply, err := enclavetest.Ask[wire.ReceiptsReply](conn, wire.TypeReceipts, &wire.Receipts{})
				if err != nil || len(reply.Receipts) == 0 {
					t.Errorf("receipts: %d, %v", len(reply.Receipts), err)
				}
				conn.Close()
			}
		})
	}
	wg.Wait()
}

func TestAChallengeProvesTheReceiptKeyAndTheHeads(t *testing.T) {
	s := start(t, enclavetest.Options{Keys: 1})
	conn, h := hello(t, s)
	signed, err := enclavetest.Ask[wire.SignReply](conn, wire.TypeSign, signRequest(s, h.Ticket, "a"))
	if err != nil {
		t.Fatal(err)
	}
	nonce := bytes.Repeat([]byte{7}, wire.MaxNonce)
	reply, err := enclavetest.Ask[wire.AttestReply](conn, wire.TypeAttest, &wire.Attest{Nonce: nonce})
	if err != nil {
		t.Fatal(err)
	}
	doc := live(t, s, reply.Document, nonce)
	if receipt.BootIDOf(doc.PublicKey) != h.BootID || string(doc.UserData) != string(receipt.UserData(receipt.KindChallenge, nil)) {
		t.Error("the challenge is answered by another key or as another kind")
	}
	heads, err := receipt.OpenHeads(doc.PublicKey, nonce, reply.Heads)
	if err != nil {
		t.Fatal(err)
	}
	// Seq 1 of the first lane went to the keys.
	want := []receipt.Head{{Lane: h.Lane, Seq: 2, Hash: receipt.ChainHash(signed.Receipt)}}
	if diff := cmp.Diff(want, heads.Lanes); diff != "" {
		t.Errorf("heads (-want +got):\n%s", diff)
	}
}
