// Package enclavetest runs the production enclave in memory, with a software
// NSM and a KMS that is a map, for tests and simulators. It is no place for keys
// that matter: nothing here is measured by hardware.
package enclavetest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/enclave/internal/boot"
	"github.com/keyhold/keyhold/enclave/internal/logring"
	"github.com/keyhold/keyhold/enclave/internal/serve"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/keypolicy"
)

// DefaultMaxConns is the number of connections where Options.MaxConns is 0.
const DefaultMaxConns = 64

// ErrDown answers whoever talks to a server that has crashed or was closed.
var ErrDown = errors.New("enclavetest: the enclave is down")

// errPanic is the value of the panic of Options.Panic.
var errPanic = errors.New("enclavetest: panic on purpose")

// errPoisoned is the panic of a crash. The request that caused it has lost its
// connection by then.
var errPoisoned = errors.New("enclavetest: poisoned")

// Options describe a Server. The zero value is an enclave with DefaultConfig and
// no keys.
type Options struct {
	Config *config.Config // nil: DefaultConfig

	// Bare leaves the enclave waiting for its config, also after Restart, so
	// that the parent under test has to boot it. Keys and Sealed are not used.
	Bare bool

	// Keys to make of Algorithm (secp256k1 where empty), under the first policy
	// that the config lets it be made with. They are random: a simulator that
	// needs the same ones again keeps Sealed and KMS, or fixes crypto/rand with
	// testing/cryptotest.
	Keys      int
	Algorithm record.Algorithm

	Sealed *Sealed     // the keyring to load instead of a new one; needs its KMS
	KMS    *KMS        // shared by enclaves that open each other's keyrings; nil: one of its own
	CA     *nsmtest.CA // that the NSM is under; nil: one of its own
	PCR0   []byte      // 48 bytes; nil: nsmtest.Measurements("enclavetest")

	// Device, where set, makes the NSM of each boot in place of the software NSM,
	// whose documents cost milliseconds: for simulators that boot thousands of times
	// and look at no document. CA, PCR0 and Server.NSM are of no use then.
	Device func() (nsm.Session, error)

	Mono     func() time.Duration // nil: by package time since New, so a synctest bubble's
	Now      func() time.Time     // the NSM's clock; nil: time.Now
	MaxConns int                  // 0: DefaultMaxConns
	Logger   *slog.Logger         // nil: nobody is told

	// Poison, where set, is asked about each payload about to be signed; true
	// crashes the enclave.
	Poison func(payload []byte) bool

	// Panic is the same with a panic that the enclave survives.
	Panic func(payload []byte) bool
}

// Sealed is a keyring as parents store it.
type Sealed struct {
	Header  []byte   // sealed.Header
	Entries [][]byte // sealed.Entry each
}

// Server is an enclave that can crash and boot again. It is safe for concurrent
// use.
type Server struct {
	opt Options
	raw []byte // the config

	mu   sync.Mutex
	life *life // nil while down
	ring Sealed
	keys []sealed.Public
	past sync.WaitGroup // of all lives
}

// life is one boot.
type life struct {
	nsm    *nsmtest.NSM // nil with Options.Device
	boot   *boot.Boot
	server *serve.Server
	ctx    context.Context //nolint:containedctx // the boot's own life time, not a caller's
	kill   context.CancelFunc
}

// DefaultConfig permits every algorithm under the policies "default" (messages)
// and "open" (every kind), with leases of 10 s.
func DefaultConfig() *config.Config {
	c := &config.Config{
		Version: 1, KMSKeyARN: "arn:aws:kms:eu-central-1:111122223333:key/00000000-0000-4000-8000-000000000001",
		Keyring: "test", Epochs: []uint32{1}, SealEpoch: 1,
		Policies: []config.Policy{
			{Name: "default", Kinds: []record.Kind{record.Message}},
			{Name: "open", Kinds: record.Kinds()},
		},
		Lease:     config.LeaseLimit{MaxMS: config.DefaultLeaseMaxMS, MarginMS: config.DefaultLeaseMarginMS},
		KeyPolicy: config.DefaultKeyPolicy(),
	}
	for _, a := range []record.Algorithm{record.Ed25519, record.P256, record.RSA2048, record.Secp256k1} {
		for _, p := range c.Policies {
			c.Create = append(c.Create, config.Create{Algorithm: a, Policy: p.Name, Max: 1_000_000})
		}
	}
	return c
}

// New boots an enclave. Close ends it.
func New(ctx context.Context, o Options) (*Server, error) {
	if o.Config == nil {
		o.Config = DefaultConfig()
	}
	if o.Algorithm == "" {
		o.Algorithm = record.Secp256k1
	}
	if o.KMS == nil {
		o.KMS = &KMS{}
	}
	if o.PCR0 == nil {
		o.PCR0 = nsmtest.Measurements("enclavetest")[0]
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Mono == nil {
		start := time.Now()
		o.Mono = func() time.Duration { return time.Since(start) }
	}
	if o.MaxConns == 0 {
		o.MaxConns = DefaultMaxConns
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.CA == nil && o.Device == nil {
		ca, err := nsmtest.NewCA(o.Now)
		if err != nil {
			return nil, fmt.Errorf("enclavetest: %w", err)
		}
		o.CA = ca
	}
	raw, err := config.Encode(o.Config)
	if err != nil {
		return nil, fmt.Errorf("enclavetest: %w", err)
	}
	s := &Server{opt: o, raw: raw}
	if o.Sealed != nil {
		s.ring = Sealed{Header: o.Sealed.Header, Entries: slices.Clone(o.Sealed.Entries)}
	}
	if err := s.Restart(ctx); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// Restart boots the enclave anew, with another boot id, crashing it before where
// it is up. All but a Bare one are ready with all keys when it returns.
func (s *Server) Restart(ctx context.Context) error {
	s.Crash()
	l := &life{}
	session, err := s.device(l)
	if err != nil {
		return fmt.Errorf("enclavetest: %w", err)
	}
	if err := s.admit(session); err != nil {
		return err
	}
	l.ctx, l.kill = context.WithCancel(context.WithoutCancel(ctx))
	ring := logring.New(s.opt.Mono)
	log := slog.New(ring.Handler(s.opt.Logger.Handler()))
	l.boot, err = boot.New(boot.Options{
		NSM: session, Entropy: func() error { return nil }, Mono: s.opt.Mono, MaxLanes: 2 * s.opt.MaxConns,
		KMS:    func(string, func() time.Time) (boot.KMS, error) { return s.opt.KMS, nil },
		Prove:  Prove,
		Logger: log, BeforeRecord: s.beforeRecord(),
	})
	if err != nil {
		l.kill()
		return fmt.Errorf("enclavetest: %w", err)
	}
	l.server, err = serve.New(serve.Options{Boot: l.boot, MaxConns: s.opt.MaxConns, Logger: log, Log: ring})
	if err != nil {
		l.kill()
		return fmt.Errorf("enclavetest: %w", err)
	}
	failed := make(chan error, 1)
	s.past.Go(func() { failed <- l.boot.Run(l.ctx) })
	select {
	case <-l.boot.Started():
	case err := <-failed:
		l.kill()
		return fmt.Errorf("enclavetest: %w", err)
	}
	if !s.opt.Bare {
		if err := s.prepare(ctx, l); err != nil {
			l.kill()
			return fmt.Errorf("enclavetest: %w", err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.life = l
	return nil
}

// admit has the key policy let the enclave in.
func (s *Server) admit(session nsm.Session) error {
	pcr0, _, err := session.DescribePCR(0)
	if err == nil && len(pcr0) != nsm.PCRSize {
		err = nsm.ErrMalformed
	}
	if err != nil {
		return fmt.Errorf("enclavetest: describe PCR0: %w", err)
	}
	s.opt.KMS.Admit(s.opt.Config.KMSKeyARN, keypolicy.Pair{PCR0: keypolicy.PCR(pcr0), PCR16: config.PCR16(s.raw)})
	return nil
}

// device makes the NSM of one boot.
func (s *Server) device(l *life) (nsm.Session, error) {
	if s.opt.Device != nil {
		return s.opt.Device()
	}
	pcrs := nsmtest.Measurements("enclavetest")
	pcrs[0] = s.opt.PCR0
	soft, err := nsmtest.New(s.opt.CA, nsmtest.Options{PCRs: pcrs, Now: s.opt.Now})
	l.nsm = soft
	return soft, err
}
