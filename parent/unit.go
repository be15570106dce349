package parent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/signclient"
	"github.com/keyhold/keyhold/parent/store"
)

// Times of bringing an enclave up.
const (
	retryFirst  = 250 * time.Millisecond // after a failure; doubles
	retryMost   = 10 * time.Second
	keyringPoll = 2 * time.Second // how often to look for a keyring that nobody has made yet
	otherBoot   = 1 * time.Second // how long a worker waits for another boot to be brought up before it looks again
)

// Phases of an enclave, as /readyz tells them.
const (
	phaseConnecting = "connecting"
	phaseNoKeyring  = "waiting_for_keyring" // make one: keyhold keyring create
	phaseFailed     = "failed"
	phaseReady      = "ready"
)

// unit keeps one enclave up, over a connection of its own. Workers wait here for
// a boot that is verified, and connect to that boot only.
type unit struct {
	p    *process
	name string
	dial signclient.Dialer
	log  *slog.Logger

	mu         sync.Mutex
	phase      string
	code       string        // why it failed
	boot       record.BootID // while ready
	lastLive   time.Time     // newest challenge that was answered
	changed    chan struct{} // closed at every change
	unfinished record.BootID // whose keys this process has not loaded to the end
}

func newUnit(p *process, e Enclave) *unit {
	p.metrics.up.WithLabelValues(e.Name).Set(0)
	return &unit{
		p: p, name: e.Name, dial: e.Dial, phase: phaseConnecting, changed: make(chan struct{}),
		log: p.cfg.Logger.With(slog.String("enclave", e.Name)),
	}
}

// run brings the enclave up again and again until ctx ends.
func (u *unit) run(ctx context.Context) error {
	wait := retryFirst
	for {
		wasReady, err := u.session(ctx)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // being told to stop is how this ends well
		}
		u.failed(ctx, err)
		if wasReady {
			wait = retryFirst
		}
		if pause(ctx, u.p.jitter(wait)) != nil {
			return nil //nolint:nilerr // being told to stop is how this ends well
		}
		wait = min(2*wait, retryMost)
	}
}

// session is the life of one connection: bring up, then a challenge every so
// often until the connection or ctx ends.
func (u *unit) session(ctx context.Context) (wasReady bool, err error) {
	c, err := signclient.Connect(ctx, u.dial, u.options())
	if err != nil {
		return false, err
	}
	defer c.Close()
	b, fresh, err := u.bringUp(ctx, c)
	if err != nil {
		return false, err
	}
	if err := u.check(ctx, c, b); err != nil {
		return false, err
	}
	u.ready(ctx, b)
	if fresh || u.leftOff(b.id) {
		// Workers sign meanwhile: a key that is not there yet is loaded on demand.
		if err := u.loadAll(ctx, c, b.id); err != nil {
			return true, err
		}
	}
	tick := time.NewTicker(u.p.cfg.ChallengeEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-c.Done():
			return true, fmt.Errorf("control connection: %w", signclient.ErrLost)
		case <-ctx.Done():
			return true, ctx.Err()
		}
		if err := u.check(ctx, c, b); err != nil {
			return true, err
		}
	}
}

// check challenges the enclave, and stores the receipts that lost connections
// left behind. A store that fails now takes nothing from the enclave: the
// receipts come again next time.
func (u *unit) check(ctx context.Context, c *signclient.Client, b boot) error {
	if err := u.p.challenge(ctx, c, b); err != nil {
		return err
	}
	u.mu.Lock()
	u.lastLive = u.p.cfg.Now()
	u.mu.Unlock()
	err := u.collect(ctx, c, b)
	if errors.Is(err, errStore) && !errors.Is(err, store.ErrDiffers) && ctx.Err() == nil {
		u.log.WarnContext(ctx, "receipts not kept yet", slog.Any("error", err))
		return nil
	}
	return err
}

func (u *unit) options() signclient.Options {
	return signclient.Options{Logger: u.log, Trace: u.p.metrics.trace}
}

// Connect returns a connection to the boot that is up and verified, and waits
// where there is none.
func (u *unit) connect(ctx context.Context) (*signclient.Client, error) {
	for {
		id, err := u.awaitReady(ctx)
		if err != nil {
			return nil, err
		}
		c, err := signclient.Connect(ctx, u.dial, u.options())
		if err != nil {
			return nil, err
		}
		if c.BootID() == id && c.Hello().State == wire.StateReady {
			return c, nil
		}
		c.Close()
		if err := pause(ctx, otherBoot); err != nil {
			return nil, err
		}
	}
}

func (u *unit) awaitReady(ctx context.Context) (record.BootID, error) {
	for {
		u.mu.Lock()
		id, ready, changed := u.boot, u.phase == phaseReady, u.changed
		u.mu.Unlock()
		if ready {
			return id, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return record.BootID{}, fmt.Errorf("wait for enclave %s: %w", u.name, ctx.Err())
		}
	}
}

// status is what /readyz tells of one enclave.
type status struct {
	Name   string `json:"name"`
	Phase  string `json:"phase"`
	Code   string `json:"code,omitempty"`
	BootID string `json:"boot_id,omitempty"`
	Live   bool   `json:"live"` // answered a challenge of the last two rounds
}

func (u *unit) status() status {
	u.mu.Lock()
	defer u.mu.Unlock()
	s := status{Name: u.name, Phase: u.phase, Code: u.code}
	if u.phase == phaseReady {
		s.BootID = u.boot.String()
		s.Live = u.p.cfg.Now().Sub(u.lastLive) < 2*u.p.cfg.ChallengeEvery+signclient.DefaultTimeout
	}
	return s
}

func (u *unit) set(phase, code string, id record.BootID) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.phase, u.code, u.boot = phase, code, id
	close(u.changed)
	u.changed = make(chan struct{})
}

func (u *unit) ready(ctx context.Context, b boot) {
	u.set(phaseReady, "", b.id)
	u.p.metrics.up.WithLabelValues(u.name).Set(1)
	u.log.InfoContext(ctx, "enclave ready", slog.String("boot_id", b.id.String()))
}

func (u *unit) failed(ctx context.Context, err error) {
	code := codeOf(err)
	u.set(phaseFailed, code, record.BootID{})
	u.p.metrics.up.WithLabelValues(u.name).Set(0)
	if errors.Is(err, refusal.AttestFailed) {
		u.p.metrics.attestFailed.WithLabelValues(u.name, code).Inc()
		u.log.ErrorContext(ctx, "enclave not trusted", slog.String("code", code), slog.Any("error", err))
		return
	}
	u.log.WarnContext(ctx, "enclave not up", slog.String("code", code), slog.Any("error", err))
}

// Words for failures that are neither refusals nor of an attestation.
const (
	codeUnreachable = "enclave_unreachable"
	codeInternal    = string(refusal.Internal)
)

// codeOf names the reason of a failure, the most telling one first.
func codeOf(err error) string {
	if c := attestation.Code(err); c != "" {
		return c
	}
	var c refusal.Code
	switch {
	case errors.As(err, &c):
		return string(c)
	case errors.Is(err, signclient.ErrLost):
		return codeUnreachable
	case errors.Is(err, store.ErrNoTables):
		return string(refusal.TablesMissing)
	case errors.Is(err, errStore):
		return string(refusal.StoreUnreachable)
	}
	return codeInternal
}

// pause waits for d, or returns why ctx ended.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("pause: %w", ctx.Err())
	}
}
