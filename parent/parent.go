// Package parent runs Keyhold's process on the EC2 host: it brings enclaves up,
// makes them prove what they are, and lets the pipeline feed them. It holds no
// key, and gives no work to an enclave that is not the wanted image with the
// wanted config.
package parent

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mrand "math/rand/v2"
	"net"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/egress"
	"github.com/keyhold/keyhold/parent/pipeline"
	"github.com/keyhold/keyhold/parent/signclient"
	"github.com/keyhold/keyhold/parent/store"
)

// Defaults of Config.
const (
	DefaultWorkers        = 4
	DefaultChallengeEvery = time.Minute
	DefaultStatusEvery    = 5 * time.Second
)

// configPCR is the register that holds the config's measurement.
const configPCR = 16

// Config is everything that Run needs.
type Config struct {
	// Store holds the queue, the sealed keys and the receipts.
	Store store.Store
	// Enclaves to work with, at least one, each with a name of its own.
	Enclaves []Enclave
	// EnclaveConfig is handed to enclaves as it is. They measure these bytes into
	// PCR16, so they are the identity of the deployment.
	EnclaveConfig []byte
	// Root signs the attestation documents; attestation.AWSRoot but in tests.
	Root attestation.Root
	// Images that an enclave may be: PCR0 of each, and other registers where they
	// are wanted. Run adds PCR16 from EnclaveConfig.
	Images []attestation.Image

	// KMSListeners take the connections that enclaves make to KMS, and
	// CredentialListeners those to the credential server. Run closes them.
	KMSListeners        []net.Listener
	CredentialListeners []net.Listener
	// DialKMS opens a connection to the KMS host of the config's key. Nil: TCP,
	// port 443. Local mode leads it elsewhere.
	DialKMS func(ctx context.Context, host string) (net.Conn, error)
	// Credentials are handed to enclaves, which sign their KMS requests with them.
	Credentials egress.Source

	// HTTP serves /metrics, /healthz and /readyz. It must listen on loopback, for
	// nobody is asked who he is. Nil: none. Run closes it.
	HTTP net.Listener

	// Workers is how many connections, and so batches in work, each enclave has.
	// 0 is DefaultWorkers.
	Workers int
	// Lease is how long a claim holds: longer than twice the p99 of signing and
	// storing a batch. 0 is lease.max_ms of EnclaveConfig, and more is refused.
	Lease time.Duration
	// ChallengeEvery is how often each enclave must show that it is there.
	// 0 is DefaultChallengeEvery.
	ChallengeEvery time.Duration
	// StatusEvery is how often each enclave is asked for its counters and log lines.
	// 0 is DefaultStatusEvery.
	StatusEvery time.Duration
	// Owner names this process in claims. Empty: 128 random bits.
	Owner string

	// Rand gives nonces, ids and the seed of jitter. Nil is crypto/rand.
	Rand io.Reader
	// Now is the wall clock. Nil is time.Now.
	Now func() time.Time
	// Logger is told what happens. Nil: nobody is.
	Logger *slog.Logger
}

// Enclave is where one enclave is reached.
type Enclave struct {
	Name string // in logs, metrics and /readyz
	Dial signclient.Dialer
}

// Validate reports everything that is wrong with c.
func (c *Config) Validate() error {
	var errs []error
	bad := func(ok bool, text string) {
		if !ok {
			errs = append(errs, fmt.Errorf("parent config: %s: %w", text, refusal.UsageWrong))
		}
	}
	bad(c.Store != nil, "a store is needed")
	bad(len(c.Enclaves) > 0, "at least one enclave is needed")
	names := map[string]bool{}
	for _, e := range c.Enclaves {
		bad(e.Name != "" && !names[e.Name], "every enclave needs a name of its own")
		bad(e.Dial != nil, "every enclave needs a dialer")
		names[e.Name] = true
	}
	bad(len(c.Images) > 0, "at least one wanted image is needed")
	want := config.PCR16(c.EnclaveConfig)
	for _, img := range c.Images {
		got, named := img.PCRs[configPCR]
		//nolint:forbidigo // registers are public
		bad(!named || bytes.Equal(got, want[:]), "PCR16 of a wanted image is not that of the config file")
	}
	bad(c.Root != attestation.Root{}, "an attestation root is needed")
	bad(c.HTTP == nil || isLoopback(c.HTTP.Addr()), "the HTTP address must be on loopback")
	bad(c.Workers >= 0 && c.Workers <= pipeline.MaxWorkers, fmt.Sprintf("workers must be at most %d", pipeline.MaxWorkers))
	bad(c.ChallengeEvery >= 0, "the time between challenges must not be negative")
	bad(c.StatusEvery >= 0, "the time between looks at counters must not be negative")
	parsed, err := config.Parse(c.EnclaveConfig)
	if err != nil {
		return errors.Join(append(errs, fmt.Errorf("parent config: %w: %w", refusal.ConfigInvalid, err))...)
	}
	bad(c.Lease == 0 || c.Lease >= time.Second && c.Lease <= parsed.Lease.Max(), "the lease must be between 1 s and lease.max_ms of the config file")
	return errors.Join(errs...)
}

func isLoopback(a net.Addr) bool {
	switch a := a.(type) {
	case *net.TCPAddr:
		return a.IP.IsLoopback()
	case *net.UnixAddr:
		return true
	}
	return false
}

// withDefaults fills in what is left empty. c is valid.
func (c Config) withDefaults(parsed *config.Config) (Config, error) {
	if c.Workers == 0 {
		c.Workers = DefaultWorkers
	}
	if c.Lease == 0 {
		c.Lease = parsed.Lease.Max()
	}
	if c.ChallengeEvery == 0 {
		c.ChallengeEvery = DefaultChallengeEvery
	}
	if c.StatusEvery == 0 {
		c.StatusEvery = DefaultStatusEvery
	}
	if c.Rand == nil {
		c.Rand = rand.Reader
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Owner == "" {
		var id [16]byte
		if _, err := io.ReadFull(c.Rand, id[:]); err != nil {
			return c, fmt.Errorf("name this process: %w", err)
		}
		c.Owner = hex.EncodeToString(id[:])
	}
	return c, nil
}

// Run works until ctx ends, which is no error: claims that were made ahead are
// dropped, those in work are finished within a lease, and the rest is given
// back. Enclaves keep their way to KMS until then.
func Run(ctx context.Context, c Config) error {
	if err := c.Validate(); err != nil {
		return err
	}
	parsed, err := config.Parse(c.EnclaveConfig)
	if err != nil {
		return fmt.Errorf("parent config: %w: %w", refusal.ConfigInvalid, err)
	}
	if c, err = c.withDefaults(parsed); err != nil {
		return err
	}
	p, err := newProcess(c, parsed)
	if err != nil {
		return err
	}
	return p.run(ctx)
}

// process is a running parent.
type process struct {
	cfg     Config
	parsed  *config.Config
	store   store.Store
	metrics *metrics
	inside  *inside
	want    *attestor
	units   []*unit
	mu      sync.Mutex  // of rand and cfg.Rand
	rand    *mrand.Rand // jitter
}

func newProcess(c Config, parsed *config.Config) (*process, error) {
	seed, err := newRand(c.Rand)
	if err != nil {
		return nil, err
	}
	m := newMetrics()
	p := &process{cfg: c, parsed: parsed, metrics: m, inside: newInside(), store: &measured{Store: c.Store, m: m, now: c.Now}, rand: seed}
	m.registry.MustRegister(p.inside)
	p.want = newAttestor(c, parsed)
	for _, e := range c.Enclaves {
		p.units = append(p.units, newUnit(p, e))
	}
	return p, nil
}

func newRand(r io.Reader) (*mrand.Rand, error) {
	var seed [16]byte
	if _, err := io.ReadFull(r, seed[:]); err != nil {
		return nil, fmt.Errorf("seed the jitter: %w", err)
	}
	//nolint:gosec // G404: jitter only; nonces and ids come from cfg.Rand
	return mrand.New(mrand.NewPCG(binary.BigEndian.Uint64(seed[:8]), binary.BigEndian.Uint64(seed[8:]))), nil
}

// run starts everything. What serves the enclaves lives in a context of its own
// that ends after the pipeline, so that work can be finished once ctx ends.
func (p *process) run(ctx context.Context) error {
	p.cfg.Logger.InfoContext(ctx, "parent started", slog.String("owner", p.cfg.Owner)) // as it stands in its claims
	services, endServices := context.WithCancel(context.WithoutCancel(ctx))
	defer endServices()
	g, services := errgroup.WithContext(services)
	for _, u := range p.units {
		g.Go(func() error { return u.run(services) })
		g.Go(func() error { return u.follow(services) })
	}
	p.serveEgress(services, g)
	if p.cfg.HTTP != nil {
		g.Go(func() error { return p.serveHTTP(services, p.cfg.HTTP) })
	}
	work, endWork := context.WithCancel(services)
	defer endWork()
	defer context.AfterFunc(ctx, endWork)()
	g.Go(func() error {
		defer endServices()
		return p.pipe(work)
	})
	if err := g.Wait(); err != nil {
		return fmt.Errorf("parent: %w", err)
	}
	p.cfg.Logger.InfoContext(ctx, "parent ended")
	return nil
}

// pipe runs the pipeline until ctx ends and its work is finished or given back.
func (p *process) pipe(ctx context.Context) error {
	dice, err := newRand(p.cfg.Rand)
	if err != nil {
		return err
	}
	enclaves := make([]pipeline.Enclave, 0, len(p.units))
	for _, u := range p.units {
		enclaves = append(enclaves, pipeline.Enclave{Name: u.name, Connect: u.connect})
	}
	return pipeline.Run(ctx, pipeline.Config{
		Store: p.store, Enclaves: enclaves, Workers: p.cfg.Workers, Lease: p.cfg.Lease, Owner: p.cfg.Owner,
		Rand: dice, Now: p.cfg.Now, Logger: p.cfg.Logger, Observer: p.metrics.observer(),
	})
}

func (p *process) serveEgress(ctx context.Context, g *errgroup.Group) {
	log := p.cfg.Logger
	for _, ln := range p.cfg.KMSListeners {
		g.Go(func() error {
			host, err := egress.KMSHost(p.parsed.KMSKeyARN)
			if err != nil {
				return err
			}
			return egress.Forwarder{Hosts: []string{host}, Dial: p.cfg.DialKMS, Logger: log}.Serve(ctx, ln)
		})
	}
	for _, ln := range p.cfg.CredentialListeners {
		g.Go(func() error {
			return egress.Credentials{Source: p.cfg.Credentials, Logger: log, Now: p.cfg.Now}.Serve(ctx, ln)
		})
	}
}

// read fills b with random bytes.
func (p *process) read(b []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, err := io.ReadFull(p.cfg.Rand, b); err != nil {
		return fmt.Errorf("read random bytes: %w", err)
	}
	return nil
}

// jitter returns a time between half of d and d.
func (p *process) jitter(d time.Duration) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return d/2 + time.Duration(p.rand.Int64N(int64(d/2)+1))
}
