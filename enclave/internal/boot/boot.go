// Package boot brings an enclave from nothing to a keyring: entropy, measured
// config, attested KMS, boot statement. It refuses to go on where a step was not
// taken as it should be, and takes none of them twice.
package boot

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/enclave/internal/kms"
	"github.com/keyhold/keyhold/enclave/internal/secret"
	"github.com/keyhold/keyhold/enclave/internal/sign"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/keypolicy"
)

// kmsTimeout bounds the KMS calls of one request: the proof and two calls of
// three attempts each.
const kmsTimeout = 100 * time.Second

// KMS makes and opens data keys under the measured KMS key, and tells what
// guards that. Errors are those of *kms.Client.
type KMS interface {
	// ReadLock returns policy, metadata and grants of the key.
	ReadLock(ctx context.Context) (*kms.Lock, error)
	// GenerateDataKey returns a new key of 32 bytes and its wrapped form.
	GenerateDataKey(ctx context.Context, encCtx map[string]string) (wrapped []byte, dek *secret.Bytes, err error)
	// Decrypt opens a wrapped key under the context that it was made with.
	Decrypt(ctx context.Context, wrapped []byte, encCtx map[string]string) (*secret.Bytes, error)
}

// Options say what a Boot works with. All but BeforeRecord is needed.
type Options struct {
	NSM      nsm.Session
	Entropy  func() error         // nil once the kernel's generator may be trusted
	Mono     func() time.Duration // see sign.Clock
	KMS      func(keyARN string, now func() time.Time) (KMS, error)
	Prove    func(policy []byte, want keypolicy.Expectation) (keypolicy.Result, error) // keypolicy.Prove
	MaxLanes int
	Logger   *slog.Logger

	BeforeRecord func(payload []byte) // see sign.Options
}

// AttestedKMS returns the KMS of every real enclave, for Options.KMS.
func AttestedKMS(session nsm.Session, roots *x509.CertPool, dial func(context.Context) (net.Conn, error),
	credentials func(context.Context) (kms.Credentials, error), log *slog.Logger,
) func(string, func() time.Time) (KMS, error) {
	return func(keyARN string, now func() time.Time) (KMS, error) {
		c, err := kms.New(kms.Options{
			KeyARN: keyARN, Credentials: credentials, Dial: dial, Roots: roots, Now: now, NSM: session, Logger: log,
		})
		if err != nil {
			return nil, fmt.Errorf("attested KMS: %w", err)
		}
		return c, nil
	}
}

// Boot is one boot of an enclave. Run takes the steps; the other methods are
// requests, which wait for it.
type Boot struct {
	opt     Options
	asks    chan *ask
	started chan struct{} // closed once engine is there
	engine  *sign.Engine
	clock   sign.Clock // set before engine

	mu       sync.Mutex
	progress Progress
}

// Progress says how far a boot has come. Its bytes are not to be changed.
type Progress struct {
	State      wire.State
	ConfigHash []byte // empty while waiting
	PCR16      []byte // empty while waiting
	Header     []byte // sealed.Header; with the rest empty until ready
	Document   []byte
	Statement  []byte
	Proofs     uint64        // of the key policy
	Proved     time.Duration // the last one, on the engine's clock; 0 before it
}

// New returns a boot that waits for Run.
func New(o Options) (*Boot, error) {
	if o.NSM == nil || o.Entropy == nil || o.Mono == nil || o.KMS == nil || o.Prove == nil || o.Logger == nil {
		return nil, errors.New("boot: options are incomplete")
	}
	return &Boot{
		opt: o, asks: make(chan *ask), started: make(chan struct{}),
		progress: Progress{
			State: wire.StateWaiting, ConfigHash: []byte{}, PCR16: []byte{},
			Header: []byte{}, Document: []byte{}, Statement: []byte{},
		},
	}, nil
}

// Started is closed once there is an engine, so a boot id and tickets.
func (b *Boot) Started() <-chan struct{} { return b.started }

// Engine is the one of this boot. It is there once Started is closed.
func (b *Boot) Engine() *sign.Engine { return b.engine }

// Progress returns how far the boot has come.
func (b *Boot) Progress() Progress {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.progress
}

// Run boots, and then answers what belongs to booting until ctx ends. It
// returns an error where there is no enclave to boot.
//
//nolint:funlen,cyclop // the boot protocol, to be read from top to bottom
func (b *Boot) Run(ctx context.Context) error {
	// Entropy. Everything below draws from the kernel's generator.
	if err := b.opt.Entropy(); err != nil {
		return fmt.Errorf("boot: %w: %w", refusal.EntropyWeak, err)
	}

	// Identity of this boot: its clock, receipt key, boot id and ticket secret.
	var err error
	b.clock, err = startClock(b.opt.NSM, b.opt.Mono)
	if err != nil {
		return fmt.Errorf("boot: %w: %w", refusal.NSMFailed, err)
	}
	b.engine, err = sign.New(sign.Options{
		Clock: b.clock, MaxLanes: b.opt.MaxLanes, Logger: b.opt.Logger, BeforeRecord: b.opt.BeforeRecord,
	})
	if err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	defer b.engine.Close()
	close(b.started)

	// Config: the first bytes that come are it, whatever they are.
	first, err := b.nextOf(ctx, wire.TypeConfigure)
	if err != nil {
		return ended(ctx, err)
	}
	raw := first.body

	// Measured and locked first, parsed after. From here on a failure is final:
	// PCR16 says which config this boot stands for.
	if err := measure(b.opt.NSM, raw); err != nil {
		b.opt.Logger.ErrorContext(ctx, "config not measured", slog.Any("error", err))
		first.answer(refusal.ConfigMeasure)
		return b.refuseAll(ctx, refusal.ConfigMeasure)
	}
	cfg, err := config.Parse(raw)
	if err != nil {
		b.opt.Logger.ErrorContext(ctx, "config refused", slog.Any("error", err))
		first.answer(refusal.ConfigInvalid)
		return b.refuseAll(ctx, refusal.ConfigInvalid)
	}
	client, err := b.opt.KMS(cfg.KMSKeyARN, b.clock.Wall)
	if err != nil {
		b.opt.Logger.ErrorContext(ctx, "config refused", slog.Any("error", err))
		first.answer(refusal.ConfigInvalid)
		return b.refuseAll(ctx, refusal.ConfigInvalid)
	}
	b.configured(raw)
	b.opt.Logger.InfoContext(ctx, "config measured", slog.String("keyring", cfg.Keyring))
	first.answer(nil)

	// Keyring: made or opened with a data key that KMS gives to this image and
	// config only. That it gives it to nobody else is proved first, of what KMS
	// says of its key over the same client. What failed may be asked again.
	var open *opened
	prove := func(ctx context.Context) (*keypolicy.Result, error) { return b.proveLock(ctx, client, cfg) }
	created := false
	for open == nil {
		q, err := b.next(ctx)
		if err != nil {
			return ended(ctx, err)
		}
		switch q.typ { //nolint:exhaustive // no other type is asked of Run
		case wire.TypeConfigure:
			q.answer(b.sameConfig(q.body))
			continue
		case wire.TypeCreateKeyring:
			open, err = createKeyring(ctx, b.opt.NSM, client, cfg, prove)
		case wire.TypeLoad:
			open, err = openKeyring(ctx, b.opt.NSM, client, cfg, q.body, prove)
		default:
			err = refusal.UnknownType
		}
		if err == nil {
			// Boot statement and document: what this boot is, vouched for by the NSM.
			err = b.state(raw, cfg, open)
		}
		if err == nil {
			err = b.engine.Open(cfg, open.ring)
		}
		if err != nil {
			b.opt.Logger.WarnContext(ctx, "no keyring", slog.String("code", string(refusal.Of(err))))
			if open != nil {
				open.ring.Destroy()
				open = nil
			}
			q.answer(err)
			continue
		}
		created = q.typ == wire.TypeCreateKeyring
		b.ready()
		b.opt.Logger.InfoContext(ctx, "keyring open", slog.String("keyring", open.header.ID()), slog.Bool("created", created))
		q.answer(nil)
	}

	// Ready. The same again is answered, another is refused. What let this enclave
	// in is asked about again and again; where it would no more, the keys go.
	guard, stop := context.WithCancel(ctx)
	over := make(chan error, 1)
	go func() { over <- b.revalidate(guard, client, cfg, open.header) }()
	defer func() {
		stop()
		<-over //nolint:errcheck // it was told to end
	}()
	for {
		var q *ask
		select {
		case q = <-b.asks:
		case err := <-over:
			over <- nil // for the deferred wait
			return ended(ctx, err)
		}
		switch {
		case q.typ == wire.TypeConfigure:
			q.answer(b.sameConfig(q.body))
		case q.typ == wire.TypeLoad:
			q.answer(b.sameHeader(q.body))
		case created: // the answer was lost, or another parent asked first
			q.answer(errAlready)
		default:
			q.answer(refusal.KeyringConflict)
		}
	}
}

// state makes the statement and document of this boot.
func (b *Boot) state(raw []byte, cfg *config.Config, o *opened) error {
	statement := receipt.Encode(&receipt.Statement{
		Domain: receipt.StatementDomain, Version: 1, Kind: receipt.KindBoot,
		BootID: b.engine.BootID(), ConfigHash: config.Hash(raw),
		Keyring: o.header.Keyring, Fingerprint: o.header.Fingerprint(), Epoch: o.header.Epoch,
		KMSKeyARN: cfg.KMSKeyARN, PolicyHash: o.lock.Hash, Pairs: pairsOf(o.lock), Mode: o.lock.Mode,
	})
	document, err := b.opt.NSM.Attest(nsm.AttestRequest{
		PublicKey: b.engine.ReceiptKey(), UserData: receipt.UserData(receipt.KindBoot, statement),
	})
	if err != nil || len(document) == 0 {
		return fmt.Errorf("attest boot: %w", errors.Join(refusal.NSMFailed, err))
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.progress.Header = sealed.EncodeHeader(o.header)
	b.progress.Document, b.progress.Statement = document, statement
	return nil
}

// Challenge returns a fresh document with that nonce over the receipt key. It
// takes nothing else from the caller. Before there is a config to attest it is
// refused.
func (b *Boot) Challenge(nonce []byte) ([]byte, error) {
	if len(nonce) == 0 || len(nonce) > wire.MaxNonce {
		return nil, refusal.BadMessage
	}
	if b.Progress().State == wire.StateWaiting {
		return nil, refusal.NotConfigured
	}
	document, err := b.opt.NSM.Attest(nsm.AttestRequest{
		PublicKey: b.engine.ReceiptKey(), UserData: receipt.UserData(receipt.KindChallenge, nil), Nonce: nonce,
	})
	if err != nil || len(document) == 0 {
		return nil, fmt.Errorf("attest: %w", errors.Join(refusal.NSMFailed, err))
	}
	return document, nil
}
