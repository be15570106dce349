// Package sign holds the batch rules of an enclave: tickets and deadlines,
// fences, one user per key, verification of every signature, receipts in lanes.
// It refuses to release what is late, fenced off, unverified or without a
// receipt.
package sign

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/keyhold/keyhold/enclave/internal/keyring"
	"github.com/keyhold/keyhold/enclave/internal/logring"
	"github.com/keyhold/keyhold/enclave/internal/secret"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

// Clock is the enclave's time. Neither function is the parent's word.
type Clock struct {
	// Mono is the time since some moment before boot. It never goes back and
	// goes on while the machine is suspended.
	Mono func() time.Duration
	// Wall is the NSM's time, carried on by Mono.
	Wall func() time.Time
}

// Options say what an Engine starts with.
type Options struct {
	Clock    Clock
	MaxLanes int // bounds the memory for receipts; more than there can be connections
	Logger   *slog.Logger

	// BeforeRecord, where set, is called with each payload about to be signed.
	// Simulators let an enclave crash in it; boot.Run, and so every program,
	// leaves it nil.
	BeforeRecord func(payload []byte)
}

// Engine signs for one boot of an enclave. It has no keys until Open.
type Engine struct {
	clock        Clock
	log          *slog.Logger
	beforeRecord func([]byte)
	// verify says whether a signature just made is good. It is Signer.Verify in
	// everything that can be linked: only export_test.go sets it, for the
	// benchmark that measures what it costs and for the test of a bad signature.
	verify func(s *keyring.Signer, sig []byte) bool

	bootID     record.BootID
	receiptKey ed25519.PublicKey
	tickets    tickets
	open       atomic.Pointer[opened]
	gates      gates
	lanes      lanes
	alone      solo // every batch has a share of it, a suspect has all

	signed, refused, batches atomic.Uint64
	refusals                 logring.Tally // records, by code
}

// opened is what the engine signs with. It is set once.
type opened struct {
	cfg  *config.Config
	ring *keyring.Ring
}

// New makes the receipt key, and so the boot id, and the ticket secret. The
// kernel's generator must have been checked before.
func New(o Options) (*Engine, error) {
	if o.Clock.Mono == nil || o.Clock.Wall == nil || o.Logger == nil || o.MaxLanes < 1 {
		return nil, errors.New("sign: options are incomplete")
	}
	seed := make([]byte, ed25519.SeedSize)
	ticketSecret := make([]byte, ticketSecretLen)
	for _, b := range [][]byte{seed, ticketSecret} {
		if _, err := rand.Read(b); err != nil {
			return nil, fmt.Errorf("make the secrets of this boot: %w", err)
		}
	}
	private := ed25519.NewKeyFromSeed(seed)
	clear(seed)
	public, ok := private.Public().(ed25519.PublicKey)
	if !ok {
		return nil, errors.New("sign: receipt key has no public key")
	}
	id := receipt.BootIDOf(public)
	return &Engine{
		clock: o.Clock, log: o.Logger, beforeRecord: o.BeforeRecord, verify: (*keyring.Signer).Verify,
		bootID: id, receiptKey: public,
		tickets: tickets{bootID: id, secret: secret.New(ticketSecret)},
		gates:   gates{keys: make(map[record.KeyID]*gate)},
		lanes:   lanes{bootID: id, key: secret.New(private), limit: o.MaxLanes},
		alone:   newSolo(),
	}, nil
}

// Open gives the engine its config and keyring, once.
func (e *Engine) Open(cfg *config.Config, ring *keyring.Ring) error {
	if !e.open.CompareAndSwap(nil, &opened{cfg: cfg, ring: ring}) {
		return refusal.KeyringConflict
	}
	return nil
}

// Close erases the secrets of this boot and of its keyring. What is still at
// work, and whatever comes later, is refused.
func (e *Engine) Close() {
	if o := e.open.Load(); o != nil {
		o.ring.Destroy()
	}
	e.lanes.key.Destroy()
	e.tickets.secret.Destroy()
}

// BootID names this boot.
func (e *Engine) BootID() record.BootID { return e.bootID }

// ReceiptKey is the public receipt key of this boot.
func (e *Engine) ReceiptKey() ed25519.PublicKey { return e.receiptKey }

// Ticket says what time it is here.
func (e *Engine) Ticket() wire.Ticket { return e.tickets.issue(e.clock.Mono()) }

// Load opens sealed keys and returns the places of those that are refused.
func (e *Engine) Load(ctx context.Context, entries [][]byte) (refused []uint32, err error) {
	o := e.open.Load()
	if o == nil {
		return nil, refusal.NoKeyring
	}
	refused = []uint32{}
	for i, entry := range entries {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("load keys: %w", err)
		}
		if err := o.ring.Open(entry); err != nil {
			refused = append(refused, uint32(i))
			e.log.WarnContext(ctx, "sealed key refused", slog.Int("place", i), slog.String("code", string(refusal.Of(err))))
		}
	}
	return refused, nil
}

// AddKeys makes keys and their receipt.
func (e *Engine) AddKeys(ctx context.Context, lane *Lane, m *wire.AddKeys) (*wire.AddKeysReply, error) {
	o := e.open.Load()
	if o == nil {
		return nil, refusal.NoKeyring
	}
	if m.Count < 1 || m.Count > wire.MaxAddKeys {
		return nil, refusal.TooLarge
	}
	if err := e.lanes.ackOwn(lane, m.Ack); err != nil {
		return nil, err
	}
	if e.lanes.full(lane) {
		return nil, refusal.LaneFull
	}
	policy, ok := o.cfg.Policy(m.Policy)
	if !ok {
		return nil, refusal.CreateDenied
	}
	entries, err := o.ring.Create(m.Algorithm, m.Policy, int(m.Count))
	if err != nil {
		return nil, fmt.Errorf("create keys: %w", err)
	}
	r := receipt.Receipt{
		Subject: receipt.SubjectKeys, Algorithm: m.Algorithm, PublicKey: []byte{},
		PolicyHash: policy.Hash(), Count: m.Count, ResultRoot: receipt.KeysRoot(entries),
	}
	signed, err := e.lanes.release(lane, &r, func() (time.Time, error) { return e.clock.Wall(), nil })
	if err != nil {
		return nil, err
	}
	e.log.InfoContext(ctx, "keys created", slog.String("algorithm", string(m.Algorithm)), slog.Int("keys", len(entries)))
	return &wire.AddKeysReply{Keys: entries, Receipt: signed}, nil
}

// Cancel makes sure that nothing under m.KeyFence or an older fence of the key
// is released any more. It does not wait for a batch that is being signed: the
// last check of that batch finds the fence revoked.
func (e *Engine) Cancel(m *wire.Cancel) (*wire.FenceReply, error) {
	return e.revoke(m.KeyID, m.KeyFence)
}

// Fence makes sure that nothing under a fence lower than m.Fence is released
// any more.
func (e *Engine) Fence(m *wire.Fence) (*wire.FenceReply, error) {
	if m.Fence == 0 {
		return nil, refusal.BadMessage
	}
	return e.revoke(m.KeyID, m.Fence-1)
}

// revoke refuses keys that are not open, which bounds the memory for fences. A
// key that is not open has nothing in work, but may be loaded later.
func (e *Engine) revoke(id record.KeyID, fence record.Fence) (*wire.FenceReply, error) {
	o := e.open.Load()
	if o == nil {
		return nil, refusal.NoKeyring
	}
	if _, err := o.ring.Key(id); err != nil {
		return nil, fmt.Errorf("fence key: %w", err)
	}
	e.gates.revoke(id, fence)
	return &wire.FenceReply{Ticket: e.Ticket()}, nil
}

// Keys returns how many keys are open.
func (e *Engine) Keys() uint64 {
	if o := e.open.Load(); o != nil {
		return uint64(o.ring.Len()) //nolint:gosec // a count
	}
	return 0
}

// Status fills in the counters that the engine keeps.
func (e *Engine) Status() wire.StatusReply {
	return wire.StatusReply{
		Keys: e.Keys(), Signed: e.signed.Load(), Refused: e.refused.Load(), RecordRefusals: e.refusals.Counts(), Batches: e.batches.Load(),
		Lanes: e.lanes.count(), UptimeMS: e.clock.Mono().Milliseconds(), TimeMS: e.clock.Wall().UnixMilli(),
	}
}
