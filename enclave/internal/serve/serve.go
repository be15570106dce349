// Package serve answers the frames that parents send to an enclave, each
// connection's in order. It refuses connections beyond its cap, whatever comes
// before hello, and every frame that is not exactly one known message.
package serve

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhold/keyhold/enclave/internal/boot"
	"github.com/keyhold/keyhold/enclave/internal/logring"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

// Time limits of a connection. A load of 500 keys or one of 500 new RSA keys may
// take minutes: that is work, and no deadline here counts it.
const (
	helloTimeout = 10 * time.Second // from accept to the end of hello
	idleTimeout  = 10 * time.Minute // from one frame to the next
	frameTimeout = 10 * time.Second // from a frame's first byte to its last
	writeTimeout = 10 * time.Second // of one answer
	busyTimeout  = time.Second      // of telling that there are too many connections
	maxBusy      = 16               // connections that are told so at the same time; more are just closed
)

// Options say what a Server serves.
type Options struct {
	Boot      *boot.Boot           // started
	MaxConns  int                  // connections at the same time
	CheckPeer func(net.Conn) error // refuses who must not talk to the enclave; nil: all may
	Logger    *slog.Logger
	Log       *logring.Ring // what status tells of the log; nil: nothing
}

// Server answers connections for one boot.
type Server struct {
	opt    Options
	slots  chan struct{} // one for each connection
	busy   chan struct{} // one for each that is told busy
	conns  atomic.Int32
	panics atomic.Uint64

	refusals logring.Tally // requests, by code
}

// New returns a server.
func New(o Options) (*Server, error) {
	if o.Boot == nil || o.Logger == nil || o.MaxConns < 1 {
		return nil, errors.New("serve: options are incomplete")
	}
	return &Server{opt: o, slots: make(chan struct{}, o.MaxConns), busy: make(chan struct{}, maxBusy)}, nil
}

// Serve accepts connections until ctx ends, then closes them all, waits for
// their requests and returns nil.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	stop := context.AfterFunc(ctx, func() {
		if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			s.opt.Logger.WarnContext(ctx, "listener did not close", slog.Any("error", err))
		}
	})
	defer stop()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				s.close(ctx, conn)
			}
			return nil
		}
		if err != nil {
			if err := s.afterAcceptError(ctx, err); err != nil {
				return err
			}
			continue
		}
		wg.Go(func() { s.Handle(ctx, conn) })
	}
}

// afterAcceptError waits a moment where accepting may work again: the enclave
// must not end because it ran out of descriptors once.
func (s *Server) afterAcceptError(ctx context.Context, err error) error {
	if errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("accept: %w", err)
	}
	s.opt.Logger.WarnContext(ctx, "connection not accepted", slog.Any("error", err))
	t := time.NewTimer(100 * time.Millisecond)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
	return nil
}

// Handle answers one connection until it or ctx ends, and closes it.
func (s *Server) Handle(ctx context.Context, conn net.Conn) {
	defer s.close(ctx, conn)
	stop := context.AfterFunc(ctx, func() { s.close(ctx, conn) })
	defer stop()
	if s.opt.CheckPeer != nil {
		if err := s.opt.CheckPeer(conn); err != nil {
			s.opt.Logger.WarnContext(ctx, "peer refused", slog.Any("error", err))
			return
		}
	}
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	default:
		s.tellBusy(ctx, conn)
		return
	}
	s.conns.Add(1)
	defer s.conns.Add(-1)
	newSession(s, conn).run(ctx)
}

func (s *Server) tellBusy(ctx context.Context, conn net.Conn) {
	select {
	case s.busy <- struct{}{}:
		defer func() { <-s.busy }()
	default:
		return
	}
	if err := s.write(conn, s.errorFrame(0, refusal.Busy), busyTimeout); err != nil {
		s.opt.Logger.DebugContext(ctx, "busy not delivered", slog.Any("error", err))
	}
}

func (s *Server) close(ctx context.Context, conn net.Conn) {
	if err := conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		s.opt.Logger.DebugContext(ctx, "connection did not close", slog.Any("error", err))
	}
}

func (s *Server) write(conn net.Conn, frame []byte, timeout time.Duration) error {
	if err := conn.SetWriteDeadline(time.Now().Add(timeout)); err != nil {
		return fmt.Errorf("set write deadline: %w", err)
	}
	return wire.WriteFrame(conn, frame)
}

// errorFrame holds a code, its fixed text and a ticket; nothing else of an error
// leaves the enclave.
func (s *Server) errorFrame(id uint64, code refusal.Code) []byte {
	entry, ok := refusal.Lookup(code)
	if !ok {
		entry, _ = refusal.Lookup(refusal.Internal)
	}
	frame, err := wire.Encode(id, wire.TypeError, &wire.Error{
		Code: string(entry.Code), Text: entry.Text, Ticket: s.opt.Boot.Engine().Ticket(),
	})
	if err != nil {
		panic("serve: an error of fixed length does not encode: " + err.Error())
	}
	return frame
}
