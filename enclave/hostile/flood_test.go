package hostile_test

import (
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

func floodAttacks() []attack {
	return []attack{
		{"opens ten thousand connections", "H5", []outcome{answered, closed, code(refusal.Busy)}, tenThousand},
		{"reads answers slowly or never, writes messages byte by byte, says nothing", "H5", []outcome{answered, closed}, slow},
	}
}

// tenThousand keeps as many connections open as it gets, all saying hello.
func tenThousand(t *testing.T, got *tally) {
	v := start(t, func(o *enclavetest.Options) { o.MaxConns = 32 })
	honest := v.dial(t)
	count := 10_000
	if testing.Short() {
		count = 500
	}
	hello := frame(t, wire.TypeHello, &wire.Hello{})
	conns := make(chan net.Conn, 256) // the oldest is dropped for a new one
	var wg sync.WaitGroup
	for range count {
		conn, err := new(net.Dialer).DialContext(t.Context(), "unix", v.addr)
		must(t, err)
		if len(conns) == cap(conns) {
			must(t, (<-conns).Close())
		}
		conns <- conn
		wg.Go(func() {
			if _, err := conn.Write(hello); err != nil {
				got.got(closed)
				return
			}
			raw, err := wire.ReadFrame(conn)
			if err != nil {
				got.got(closed)
				return
			}
			m, err := wire.Decode(raw)
			if err != nil {
				t.Error(err)
				return
			}
			got.got(outcomeOf(t, m))
		})
	}
	ask[wire.TicketReply](t, honest, wire.TypeTicket, &wire.GetTicket{})
	for len(conns) > 0 {
		must(t, (<-conns).Close())
	}
	wg.Wait()
	must(t, honest.Close())
	for {
		c := v.open(t)
		_, err := enclavetest.Ask[wire.HelloReply](c, wire.TypeHello, &wire.Hello{})
		must(t, c.Close())
		if err == nil {
			break
		}
		if !errors.Is(err, refusal.Busy) && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
			t.Logf("after the flood: %v", err)
		}
	}
	v.honest(t)
}

// slow runs in a bubble, so that the enclave's patience costs no time.
func slow(t *testing.T, got *tally) {
	for name, attacker := range map[string]func(net.Conn){
		"says nothing": func(net.Conn) {},
		"never reads": func(c net.Conn) {
			_, _ = c.Write(frame(t, wire.TypeHello, &wire.Hello{})) // until the enclave hangs up
		},
		"a byte every five seconds": func(c net.Conn) {
			for _, b := range frame(t, wire.TypeHello, &wire.Hello{}) {
				if _, err := c.Write([]byte{b}); err != nil {
					return
				}
				time.Sleep(5 * time.Second) //nolint:forbidigo // a bubble's clock
			}
		},
		"reads a byte every five seconds": func(c net.Conn) {
			go func() { _, _ = c.Write(frame(t, wire.TypeHello, &wire.Hello{})) }() // likewise
			for {
				if _, err := c.Read(make([]byte, 1)); err != nil {
					return
				}
				time.Sleep(5 * time.Second) //nolint:forbidigo // a bubble's clock
			}
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			s, err := enclavetest.New(t.Context(), enclavetest.Options{Config: testConfig(), Keys: 1})
			must(t, err)
			defer s.Close()
			honest, err := s.Dial(t.Context())
			must(t, err)
			ask[wire.HelloReply](t, honest, wire.TypeHello, &wire.Hello{})
			conn, err := s.Dial(t.Context())
			must(t, err)
			var wg sync.WaitGroup
			wg.Go(func() { attacker(conn) })
			for range 60 {
				time.Sleep(time.Second) //nolint:forbidigo // a bubble's clock
				ask[wire.TicketReply](t, honest, wire.TypeTicket, &wire.GetTicket{})
				got.got(answered) // the honest one, all the while
			}
			synctest.Wait()
			if st := ask[wire.StatusReply](t, honest, wire.TypeStatus, &wire.GetStatus{}); st.Connections != 1 {
				t.Errorf("%s: still connected after a minute", name)
			} else {
				got.got(closed)
			}
			_ = conn.Close() // the enclave has done so
			wg.Wait()
			must(t, honest.Close())
		})
	}
}
