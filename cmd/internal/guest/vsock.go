package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/mdlayher/vsock"

	"github.com/keyhold/keyhold/internal/wire"
)

const anyCID = 0xffffffff // VMADDR_CID_ANY: whatever number this enclave got

func listenVsock(port uint32) (net.Listener, error) {
	l, err := vsock.ListenContextID(anyCID, port, nil)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	return l, nil
}

// dialParent dials a port of the parent instance. The library's Dial knows no
// context, so it runs beside, and what comes too late is closed.
func dialParent(ctx context.Context, port uint32) (net.Conn, error) {
	type result struct {
		conn *vsock.Conn
		err  error
	}
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

// fromParent refuses every peer but the parent instance.
func fromParent(c net.Conn) error {
	if a, ok := c.RemoteAddr().(*vsock.Addr); !ok || a.ContextID != wire.ParentCID {
		return errors.New("the peer is not the parent instance")
	}
	return nil
}

// The heartbeat with which an enclave tells nitro-cli run-enclave that it has started, as AWS's own init does it
// (aws-nitro-enclaves-sdk-bootstrap, init/init.c): one byte there, the same byte back. That init tries once.
const (
	heartbeatPort  = 9000
	heartbeatByte  = 0xb7
	heartbeatTries = 3
)

// heartbeat tells the parent instance that this machine is up. Nobody is there to answer where it was not
// started by nitro-cli or its like, and then it should not run.
func (p *program) heartbeat(ctx context.Context) error {
	var err error
	for range heartbeatTries {
		if err = p.beatOnce(ctx); err == nil || ctx.Err() != nil {
			break
		}
	}
	return err
}

func (p *program) beatOnce(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, p.beat)
	defer cancel()
	conn, err := p.dial(ctx, heartbeatPort)
	if err != nil {
		return fmt.Errorf("heartbeat: %w", err)
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) }) // ends what waits below
	defer stop()
	beat := []byte{heartbeatByte}
	if _, err := conn.Write(beat); err != nil {
		return fmt.Errorf("send heartbeat: %w", err)
	}
	beat[0] = 0
	if _, err := io.ReadFull(conn, beat); err != nil {
		return fmt.Errorf("await heartbeat: %w", err)
	}
	if beat[0] != heartbeatByte {
		return errors.New("the heartbeat was answered with another byte")
	}
	return nil
}
