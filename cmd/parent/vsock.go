package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"slices"

	"github.com/mdlayher/vsock"

	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/signclient"
)

// cidAny binds to whatever CID this machine has, as VMADDR_CID_ANY.
const cidAny = math.MaxUint32

// dialEnclave returns a dialer for the enclave of that CID. vsock.Dial knows no
// context, so it runs on its own, and a connection that comes too late is closed
// at once. The kernel ends a dial that nobody answers after two seconds.
func dialEnclave(cid uint32) signclient.Dialer {
	type dialled struct {
		conn net.Conn
		err  error
	}
	return func(ctx context.Context) (net.Conn, error) {
		done := make(chan dialled)
		go func() {
			var d dialled
			if conn, err := vsock.Dial(cid, wire.EnclavePort, nil); err != nil {
				d.err = err
			} else {
				d.conn = conn
			}
			select {
			case done <- d:
			case <-ctx.Done():
				if d.conn != nil {
					_ = d.conn.Close() // nobody has used it
				}
			}
		}()
		select {
		case d := <-done:
			if d.err != nil {
				return nil, fmt.Errorf("dial vsock %d:%d: %w", cid, wire.EnclavePort, d.err)
			}
			return d.conn, nil
		case <-ctx.Done():
			return nil, fmt.Errorf("dial vsock %d:%d: %w", cid, wire.EnclavePort, ctx.Err())
		}
	}
}

// listenEnclaves listens on a vsock port for those enclaves only.
func listenEnclaves(port uint32, cids []uint, log *slog.Logger) (net.Listener, error) {
	ln, err := vsock.ListenContextID(cidAny, port, nil)
	if err != nil {
		return nil, fmt.Errorf("listen on vsock port %d: %w", port, portError(err))
	}
	return &enclaveListener{Listener: ln, cids: cids, log: log}, nil
}

// enclaveListener closes connections of everyone else: other enclaves on this
// machine, and processes on it.
type enclaveListener struct {
	net.Listener
	cids []uint
	log  *slog.Logger
}

// Accept waits for a connection of an enclave of the list.
func (l *enclaveListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err //nolint:wrapcheck // a net.Listener's own error is what callers look at
		}
		addr, ok := conn.RemoteAddr().(*vsock.Addr)
		if ok && slices.Contains(l.cids, uint(addr.ContextID)) {
			return conn, nil
		}
		l.log.Warn("vsock connection refused: not one of the enclaves", slog.String("peer", conn.RemoteAddr().String()))
		if err := conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			l.log.Debug("vsock connection did not close", slog.Any("error", err))
		}
	}
}
