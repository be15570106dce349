// Package egress is what an enclave reaches of the outside: a forwarder of TLS
// bytes to KMS, and a server of AWS credentials. It opens no TLS, and refuses
// every destination that is not on its list by exact name.
package egress

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"
)

// Defaults of Forwarder.
const (
	DefaultMaxConns     = 64               // the SDK in an enclave keeps a handful
	DefaultHelloTimeout = 5 * time.Second  // a ClientHello is one write
	DefaultDialTimeout  = 5 * time.Second  // to KMS in the same region
	DefaultIdleTimeout  = 2 * time.Minute  // above the SDK's idle time of 90 s, so that it closes first
	DefaultTotalTimeout = 30 * time.Minute // a connection lives no longer
)

// acceptPause is waited after an accept that failed, so that running out of
// file descriptors does not become a busy loop.
const acceptPause = 100 * time.Millisecond

// Errors of a Forwarder; they end a connection and are logged.
var (
	ErrNotTLS  = errors.New("egress: no TLS ClientHello")
	ErrNoSNI   = errors.New("egress: the ClientHello names no host")
	ErrRefused = errors.New("egress: the host is not on the list")
	ErrHost    = errors.New("egress: not the name of a host")
)

// Forwarder copies bytes between an enclave and the hosts of its list.
type Forwarder struct {
	// Hosts are the exact names that may be reached, lower case. At least one.
	Hosts []string
	// Dial opens a connection to a host of the list. Nil: TCP, port 443.
	Dial func(ctx context.Context, host string) (net.Conn, error)
	// MaxConns is how many connections are open at once; more are closed at once.
	// 0 is DefaultMaxConns.
	MaxConns int
	// HelloTimeout bounds the wait for a whole ClientHello, DialTimeout the
	// dialling, IdleTimeout the silence in both directions and TotalTimeout the
	// life of a connection. 0 is the default of each.
	HelloTimeout, DialTimeout, IdleTimeout, TotalTimeout time.Duration
	// Logger is told of refused and failed connections. Nil: nobody is.
	Logger *slog.Logger
}

// Validate reports everything that is wrong with f.
func (f *Forwarder) Validate() error {
	var errs []error
	if len(f.Hosts) == 0 {
		errs = append(errs, fmt.Errorf("%w: the list is empty", ErrHost))
	}
	for i, h := range f.Hosts {
		if !isHostName(h) {
			errs = append(errs, fmt.Errorf("%w: entry %d of the list", ErrHost, i))
		}
	}
	return errors.Join(errs...)
}

func (f Forwarder) withDefaults() Forwarder {
	f.MaxConns = orDefault(f.MaxConns, DefaultMaxConns)
	f.HelloTimeout = orDefault(f.HelloTimeout, DefaultHelloTimeout)
	f.DialTimeout = orDefault(f.DialTimeout, DefaultDialTimeout)
	f.IdleTimeout = orDefault(f.IdleTimeout, DefaultIdleTimeout)
	f.TotalTimeout = orDefault(f.TotalTimeout, DefaultTotalTimeout)
	if f.Dial == nil {
		f.Dial = dialTLSPort
	}
	if f.Logger == nil {
		f.Logger = slog.New(slog.DiscardHandler)
	}
	return f
}

func orDefault[T int | time.Duration](v, d T) T {
	if v <= 0 {
		return d
	}
	return v
}

func dialTLSPort(ctx context.Context, host string) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp", net.JoinHostPort(host, "443"))
}

// Serve accepts connections until ctx ends, which is no error, or ln fails. It
// closes ln, and returns when every connection has ended.
func (f Forwarder) Serve(ctx context.Context, ln net.Listener) error {
	if err := f.Validate(); err != nil {
		return err
	}
	f = f.withDefaults()
	ctx, cancel := context.WithCancel(ctx)
	var conns sync.WaitGroup
	defer conns.Wait()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { closeQuietly(ln) })
	defer stop()

	slots := make(chan struct{}, f.MaxConns)
	for {
		conn, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("accept for KMS: %w", err)
			}
			f.Logger.WarnContext(ctx, "egress accept failed", slog.Any("error", err))
			pause(ctx, acceptPause)
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			f.Logger.WarnContext(ctx, "egress connection refused: too many", slog.Int("limit", f.MaxConns))
			closeQuietly(conn)
			continue
		}
		conns.Go(func() {
			defer func() { <-slots }()
			f.serve(ctx, conn)
		})
	}
}

// closeQuietly closes what carries nothing any more: an error changes nothing.
func closeQuietly(c io.Closer) { _ = c.Close() }

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// serve handles one connection of an enclave and closes it.
func (f Forwarder) serve(ctx context.Context, conn net.Conn) {
	defer closeQuietly(conn)
	ctx, cancel := context.WithTimeout(ctx, f.TotalTimeout)
	defer cancel()
	defer context.AfterFunc(ctx, func() { closeQuietly(conn) })()

	host, hello, err := peekHello(ctx, conn, f.HelloTimeout)
	if err == nil && !slices.Contains(f.Hosts, host) {
		err = ErrRefused // the name is the enclave's and not repeated
	}
	if err != nil {
		f.Logger.WarnContext(ctx, "egress connection refused", slog.Any("error", err))
		return
	}
	dctx, dialled := context.WithTimeout(ctx, f.DialTimeout)
	upstream, err := f.Dial(dctx, host)
	dialled()
	if err != nil {
		f.Logger.WarnContext(ctx, "egress dial failed", slog.String("host", host), slog.Any("error", err))
		return
	}
	defer closeQuietly(upstream)
	defer context.AfterFunc(ctx, func() { closeQuietly(upstream) })()
	if err := splice(conn, upstream, hello, f.IdleTimeout); err != nil && ctx.Err() == nil {
		f.Logger.InfoContext(ctx, "egress connection ended", slog.String("host", host), slog.Any("error", err))
	}
}

// isHostName accepts lower-case DNS names of at least two labels whose last is
// not a number, so no IP address in any spelling.
func isHostName(s string) bool {
	labels := strings.Split(s, ".")
	if len(s) > 253 || len(labels) < 2 {
		return false
	}
	for _, l := range labels {
		if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' || strings.Trim(l, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
			return false
		}
	}
	last := labels[len(labels)-1]
	return strings.Trim(last, "0123456789") != "" && !strings.HasPrefix(last, "0x")
}

// KMSHost returns the name of the KMS endpoint for the key with that full ARN,
// as the enclave derives it.
func KMSHost(keyARN string) (string, error) {
	parts := strings.Split(keyARN, ":")
	if len(parts) != 6 || parts[0] != "arn" || parts[2] != "kms" {
		return "", fmt.Errorf("%w: not the ARN of a KMS key", ErrHost)
	}
	suffix := ".amazonaws.com"
	if parts[1] == "aws-cn" {
		suffix += ".cn"
	}
	host := "kms." + parts[3] + suffix
	if !isHostName(host) || strings.Contains(parts[3], ".") {
		return "", fmt.Errorf("%w: the ARN names no region", ErrHost)
	}
	return host, nil
}
