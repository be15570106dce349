package main

import (
	"context"
	"fmt"
	"net"

	"github.com/mdlayher/vsock"

	"github.com/keyhold/keyhold/internal/wire"
)

// dialParent dials a port of the parent instance. The library's Dial knows no
// context, so it runs beside, and what comes too late is closed.
func dialParent(port uint32) func(context.Context) (net.Conn, error) {
	type result struct {
		conn *vsock.Conn
		err  error
	}
	return func(ctx context.Context) (net.Conn, error) {
		done := make(chan result, 1)
		go func() {
			conn, err := vsock.Dial(wire.ParentCID, port, nil)
			done <- result{conn, err}
		}()
		select {
		case r := <-done:
			if r.err != nil {
				return nil, fmt.Errorf("dial the parent: %w", r.err)
			}
			return r.conn, nil
		case <-ctx.Done():
			go func() {
				if r := <-done; r.err == nil {
					_ = r.conn.Close() // nobody has used it
				}
			}()
			return nil, fmt.Errorf("dial the parent: %w", ctx.Err())
		}
	}
}
