package egress

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

const (
	copyBuffer = 32 << 10 // bytes; two TLS records
	// maxHello bounds the bytes read before the ClientHello is complete: the
	// largest that crypto/tls takes (64 KiB), in records of any size.
	maxHello = 96 << 10
)

var errPeeked = errors.New("egress: hello read")

// peekHello reads a ClientHello and returns the host it names with the bytes
// that were read. crypto/tls parses it on a connection that cannot be written,
// and is stopped before it would answer.
func peekHello(ctx context.Context, conn net.Conn, timeout time.Duration) (host string, read []byte, err error) {
	if err := conn.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		return "", nil, fmt.Errorf("set deadline of the ClientHello: %w", err)
	}
	p := &peeker{Conn: conn}
	seen := false
	err = tls.Server(p, &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			seen, host = true, h.ServerName
			return nil, errPeeked
		},
	}).HandshakeContext(ctx)
	switch {
	case !seen:
		return "", nil, errors.Join(ErrNotTLS, p.err, ctx.Err()) // the text of crypto/tls may repeat what came in
	case host == "":
		return "", nil, ErrNoSNI
	case !errors.Is(err, errPeeked):
		return "", nil, ErrNotTLS
	}
	return host, p.read, nil
}

// peeker keeps what is read and refuses to write.
type peeker struct {
	net.Conn
	read []byte
	err  error // why reading ended
}

func (p *peeker) Read(b []byte) (int, error) {
	room := maxHello - len(p.read)
	if room <= 0 {
		return 0, io.ErrUnexpectedEOF
	}
	n, err := p.Conn.Read(b[:min(len(b), room)])
	p.read = append(p.read, b[:n]...)
	p.err = err
	return n, err
}

func (p *peeker) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

// Close does nothing: the connection goes on, or its owner closes it.
func (p *peeker) Close() error { return nil }

// splice writes hello upstream and then copies both ways until both sides have
// ended, one fails, or neither says anything for idle.
func splice(down, up net.Conn, hello []byte, idle time.Duration) error {
	s := &session{down: down, up: up, idle: idle}
	if err := s.touch(); err != nil {
		return err
	}
	if _, err := up.Write(hello); err != nil {
		return fmt.Errorf("send the ClientHello on: %w", err)
	}
	var both sync.WaitGroup
	var errUp, errDown error
	both.Go(func() { errUp = s.copy(up, down) })
	both.Go(func() { errDown = s.copy(down, up) })
	both.Wait()
	return errors.Join(errUp, errDown)
}

type session struct {
	down, up net.Conn
	idle     time.Duration
}

// touch moves the deadlines of both sides: silence of one is fine while the
// other speaks.
func (s *session) touch() error {
	t := time.Now().Add(s.idle)
	if err := errors.Join(s.down.SetDeadline(t), s.up.SetDeadline(t)); err != nil {
		return fmt.Errorf("set idle deadline: %w", err)
	}
	return nil
}

// copy passes bytes on until src ends, and then ends dst's direction only. Where
// it fails, both connections are closed, so the other direction ends too.
func (s *session) copy(dst, src net.Conn) error {
	buf := make([]byte, copyBuffer)
	for {
		n, err := src.Read(buf)
		if n > 0 {
			if werr := errors.Join(s.touch(), writeAll(dst, buf[:n])); werr != nil {
				return s.abort(werr)
			}
		}
		if errors.Is(err, io.EOF) {
			return s.halfClose(dst)
		}
		if err != nil {
			return s.abort(fmt.Errorf("copy: %w", err))
		}
	}
}

func writeAll(dst net.Conn, b []byte) error {
	if _, err := dst.Write(b); err != nil {
		return fmt.Errorf("copy: %w", err)
	}
	return nil
}

func (s *session) halfClose(dst net.Conn) error {
	if c, ok := dst.(interface{ CloseWrite() error }); ok {
		if err := c.CloseWrite(); err != nil && !errors.Is(err, net.ErrClosed) {
			return s.abort(fmt.Errorf("pass the end on: %w", err))
		}
		return nil
	}
	return s.abort(nil) // a connection that knows no half: all of it ends
}

func (s *session) abort(cause error) error {
	closeQuietly(s.down)
	closeQuietly(s.up)
	return cause
}
