// Package enclave is the program inside a Nitro Enclave: it boots, takes frames
// from the parent and signs. It refuses to start on a weak kernel generator and
// to serve without a measured config.
package enclave

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/enclave/internal/boot"
	"github.com/keyhold/keyhold/enclave/internal/logring"
	"github.com/keyhold/keyhold/enclave/internal/serve"
	"github.com/keyhold/keyhold/keypolicy"
)

// defaultMaxConns is the number of connections where Config.MaxConns is 0. Each
// may hold two requests and an answer of up to 1 MiB.
const defaultMaxConns = 256

// maxMaxConns keeps the lanes, twice as many, within one signed list of heads.
const maxMaxConns = 450

// Config is what Run needs. None of it decides what keys may do: that is in the
// measured config, which the parent hands over.
type Config struct {
	// Listener accepts the parent's connections. Run closes it.
	Listener net.Listener
	// CheckPeer refuses a connection that is not the parent's: on vsock, whose
	// CID is not 3. Nil lets every peer in.
	CheckPeer func(net.Conn) error
	// NSM is the security module of this enclave. It stays the caller's.
	NSM nsm.Session
	// KMSRoots vouch for KMS. The image embeds Amazon's; there are no others.
	KMSRoots *x509.CertPool
	// DialKMS reaches the parent's forwarder, DialCredentials its credential
	// server. TLS to KMS ends in here, so the forwarder sees no plaintext.
	DialKMS, DialCredentials func(context.Context) (net.Conn, error)
	// Entropy returns nil where the kernel's generator may be trusted with
	// keys. Nil checks that the NSM feeds it, as enclaves have it; a machine
	// without NSM brings its own check.
	Entropy func() error
	// Ready is called once before the first connection is served, when the
	// generator is trusted and this boot has its identity. Its error ends Run.
	// Nil has nothing to say.
	Ready func(context.Context) error
	// Mono is the time since some moment before the start; it goes on while the
	// machine is suspended. Nil is CLOCK_BOOTTIME.
	Mono func() time.Duration
	// MaxConns is the number of connections at the same time, up to 450. More
	// are told busy. 0 means 256.
	MaxConns int
	// Logger gets what happens, and never a secret or a payload. The newest lines
	// are kept for the parent, numbers and a few named texts of each.
	Logger *slog.Logger
}

// Validate reports everything that is missing or wrong.
func (c *Config) Validate() error {
	var errs []error
	need := func(ok bool, text string) {
		if !ok {
			errs = append(errs, errors.New("enclave config: "+text))
		}
	}
	need(c.Listener != nil, "Listener is missing")
	need(c.NSM != nil, "NSM is missing")
	need(c.KMSRoots != nil, "KMSRoots is missing")
	need(c.DialKMS != nil, "DialKMS is missing")
	need(c.DialCredentials != nil, "DialCredentials is missing")
	need(c.Logger != nil, "Logger is missing")
	need(c.MaxConns >= 0 && c.MaxConns <= maxMaxConns, fmt.Sprintf("MaxConns must be between 0 and %d", maxMaxConns))
	return errors.Join(errs...)
}

func (c Config) withDefaults() Config {
	if c.Entropy == nil {
		session := c.NSM
		c.Entropy = func() error { return checkEntropy(session, rngCurrent, creditKernel) }
	}
	if c.Ready == nil {
		c.Ready = func(context.Context) error { return nil }
	}
	if c.Mono == nil {
		c.Mono = bootTime
	}
	if c.MaxConns == 0 {
		c.MaxConns = defaultMaxConns
	}
	return c
}

// Run serves one boot of an enclave until ctx ends, and then returns nil. Keys
// and secrets are erased as well as they can be.
func Run(ctx context.Context, c Config) error {
	if err := c.Validate(); err != nil {
		return err
	}
	c = c.withDefaults()
	ring := logring.New(c.Mono)
	c.Logger = slog.New(ring.Handler(c.Logger.Handler()))
	if err := harden(ctx, c.Logger); err != nil {
		return errors.Join(err, c.Listener.Close())
	}
	b, err := boot.New(boot.Options{
		NSM: c.NSM, Entropy: c.Entropy, Mono: c.Mono, MaxLanes: 2 * c.MaxConns, Logger: c.Logger,
		Prove: keypolicy.Prove,
		KMS:   boot.AttestedKMS(c.NSM, c.KMSRoots, c.DialKMS, credentialsFrom(c.DialCredentials), c.Logger),
	})
	if err != nil {
		return errors.Join(err, c.Listener.Close())
	}
	s, err := serve.New(serve.Options{Boot: b, MaxConns: c.MaxConns, CheckPeer: c.CheckPeer, Logger: c.Logger, Log: ring})
	if err != nil {
		return errors.Join(err, c.Listener.Close())
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		select {
		case <-b.Started():
			if err := c.Ready(ctx); err != nil {
				return errors.Join(err, c.Listener.Close())
			}
			return s.Serve(ctx, c.Listener)
		case <-ctx.Done():
			return c.Listener.Close()
		}
	})
	g.Go(func() error { return b.Run(ctx) })
	return g.Wait()
}
