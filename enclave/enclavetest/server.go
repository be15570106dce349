package enclavetest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"

	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
)

// Handle answers one connection until it, ctx or the boot ends, and closes it. A
// server that is down only closes it.
func (s *Server) Handle(ctx context.Context, conn net.Conn) {
	l := s.now()
	if l == nil {
		closeQuietly(conn)
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(l.ctx, cancel)() //nolint:contextcheck // the end of the boot ends the connection too
	l.server.Handle(ctx, conn)
}

// Serve handles what l accepts until ctx ends, through crashes and restarts, and
// closes l.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	defer context.AfterFunc(ctx, func() { closeQuietly(l) })()
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("enclavetest: accept: %w", err)
		}
		wg.Go(func() { s.Handle(ctx, conn) })
	}
}

// Dial returns the other end of a net.Pipe that the server handles, or ErrDown.
// It has the form of a dialer that clients take.
func (s *Server) Dial(ctx context.Context) (net.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.life == nil {
		return nil, ErrDown
	}
	near, far := net.Pipe()
	life := s.life
	s.past.Go(func() { life.server.Handle(life.ctx, far) })
	return near, nil
}

// Crash ends the boot as kill -9 would: all connections close, and nothing
// answers until Restart. It does not wait.
func (s *Server) Crash() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.life != nil {
		s.life.kill()
		s.life = nil
	}
}

// Close crashes the server and waits for everything that it started.
func (s *Server) Close() {
	s.Crash()
	s.past.Wait()
}

// BootID names the boot, zero while down.
func (s *Server) BootID() record.BootID {
	if l := s.now(); l != nil {
		return l.boot.Engine().BootID()
	}
	return record.BootID{}
}

// NSM is the device of this boot, nil while down. Its faults can be set.
func (s *Server) NSM() *nsmtest.NSM {
	if l := s.now(); l != nil {
		return l.nsm
	}
	return nil
}

// CA vouches for the documents of all boots.
func (s *Server) CA() *nsmtest.CA { return s.opt.CA }

// PCR0 is the image's measurement in the documents of all boots.
func (s *Server) PCR0() []byte { return slices.Clone(s.opt.PCR0) }

// KMS opens the keyring.
func (s *Server) KMS() *KMS { return s.opt.KMS }

// Config returns the canonical bytes of the config.
func (s *Server) Config() []byte { return slices.Clone(s.raw) }

// Keys returns the public parts of the keys that New made or loaded.
func (s *Server) Keys() []sealed.Public {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.keys)
}

// Sealed returns the keyring as a parent would have stored it after New.
func (s *Server) Sealed() Sealed {
	return Sealed{Header: slices.Clone(s.ring.Header), Entries: slices.Clone(s.ring.Entries)}
}

func (s *Server) now() *life {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.life
}

// beforeRecord is nil without Options.Poison and Options.Panic.
func (s *Server) beforeRecord() func([]byte) {
	if s.opt.Poison == nil && s.opt.Panic == nil {
		return nil
	}
	return func(payload []byte) {
		if s.opt.Panic != nil && s.opt.Panic(payload) {
			panic(fmt.Errorf("%w: %s", errPanic, payload)) // a panic's value may well hold payload: nobody must print it
		}
		if s.opt.Poison != nil && s.opt.Poison(payload) {
			s.Crash()
			panic(errPoisoned)
		}
	}
}

type closer interface{ Close() error }

// closeQuietly closes what nobody waits for.
func closeQuietly(c closer) {
	if err := c.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return
	}
}
