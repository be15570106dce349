package watch_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/watch"
)

// enclave answers hello and attest as it is told.
type enclave struct {
	t        *testing.T
	hello    refusal.Code // the answer to hello, where not empty
	attest   refusal.Code // the answer to attest, where not empty
	document []byte
	hangUp   bool          // after each answer to attest
	hangs    chan struct{} // where not nil, attest waits for it

	mu    sync.Mutex
	dials int
	wg    sync.WaitGroup
	conns []net.Conn
}

func (e *enclave) dial(context.Context) (net.Conn, error) {
	near, far := net.Pipe()
	e.mu.Lock()
	e.dials++
	e.conns = append(e.conns, far)
	e.mu.Unlock()
	e.wg.Go(func() { e.serve(far) })
	return near, nil
}

func (e *enclave) end() {
	e.mu.Lock()
	for _, c := range e.conns {
		c.Close()
	}
	e.mu.Unlock()
	e.wg.Wait()
}

func (e *enclave) serve(conn net.Conn) {
	defer conn.Close()
	for {
		frame, err := wire.ReadFrame(conn)
		if err != nil {
			return
		}
		m, err := wire.Decode(frame)
		if err != nil {
			e.t.Error(err)
			return
		}
		var body any
		typ, code := m.Type, e.attest
		if m.Type == wire.TypeHello {
			code, body = e.hello, &wire.HelloReply{BootID: record.BootID{1}, State: wire.StateReady, Ticket: make(wire.Ticket, wire.TicketLen)}
		} else {
			if m.Type != wire.TypeAttest {
				e.t.Errorf("unexpected %s", m.Type)
			}
			if e.hangs != nil {
				<-e.hangs
			}
			body = &wire.AttestReply{Document: e.document}
		}
		if code != "" {
			entry, _ := refusal.Lookup(code)
			typ, body = wire.TypeError, &wire.Error{Code: string(code), Text: entry.Text, Ticket: make(wire.Ticket, wire.TicketLen)}
		}
		answer, err := wire.Encode(m.ID, typ, body)
		if err != nil {
			e.t.Error(err)
			return
		}
		if wire.WriteFrame(conn, answer) != nil || m.Type == wire.TypeAttest && e.hangUp {
			return
		}
	}
}

func TestAPulseTellsAnEnclaveThatLivesFromOneThatDoesNot(t *testing.T) {
	for _, tt := range []struct {
		name  string
		e     *enclave
		want  error // nil: it lives
		dials int   // for three probes
	}{
		{"it answers a challenge", &enclave{document: []byte{1}}, nil, 1},
		{"it waits for its parent", &enclave{attest: refusal.NotConfigured}, nil, 1},
		{"it has no connection to spare", &enclave{hello: refusal.Busy}, nil, 3},
		{"its security module fails", &enclave{attest: refusal.NSMFailed}, refusal.NSMFailed, 3},
		{"no document", &enclave{}, refusal.NSMFailed, 3},
		{"it ends connections", &enclave{document: []byte{1}, hangUp: true}, nil, 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := tt.e
			e.t = t
			p := &watch.Pulse{Dial: e.dial}
			defer e.end()
			defer p.Close()
			var errs []string
			for range 3 {
				if err := p.Probe(t.Context()); !errors.Is(err, tt.want) {
					errs = append(errs, err.Error())
				}
			}
			if diff := cmp.Diff([]string(nil), errs); diff != "" {
				t.Error(diff)
			}
			if e.dials != tt.dials {
				t.Errorf("%d connections, want %d", e.dials, tt.dials)
			}
		})
	}
}

func TestAnEnclaveThatHangsIsNotWaitedForLongerThanItsTime(t *testing.T) {
	e := &enclave{t: t, hangs: make(chan struct{})}
	defer e.end()
	defer close(e.hangs)
	p := &watch.Pulse{Dial: e.dial}
	defer p.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := p.Probe(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

func TestAnEnclaveThatDoesNotListenIsNotAlive(t *testing.T) {
	p := &watch.Pulse{Dial: func(context.Context) (net.Conn, error) { return nil, errHangs }}
	defer p.Close()
	if err := p.Probe(t.Context()); !errors.Is(err, errHangs) {
		t.Errorf("got %v", err)
	}
	p.Dial = (&enclave{t: t}).dial
	p.Rand = strings.NewReader("")
	if err := p.Probe(t.Context()); err == nil {
		t.Error("a challenge without randomness was sent")
	}
}
