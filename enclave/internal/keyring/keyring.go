// Package keyring holds the plaintext private keys of one sealed keyring: it
// makes, opens and uses them. It does no I/O and no logging, and returns a
// private key to nobody.
//
// Erasure is best effort. Scalars are kept in memory that Destroy overwrites,
// and copies made here are cleared; but the standard library keeps its own copy
// of an Ed25519, P-256 or RSA key while a Signer is in use and of AES key
// schedules while an entry is opened, and these stay until the garbage
// collector hands their memory out again.
package keyring

import (
	"crypto/hkdf"
	"crypto/sha256"
	"fmt"
	"sync"

	"github.com/keyhold/keyhold/enclave/internal/secret"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
)

const dekLen = 32 // bytes of the data key: AES-256

// hidden keeps what it holds from package fmt: fmt follows pointers in
// unexported fields under verbs that do not fit, but prints a function as an
// address under every verb.
type hidden[T any] func() *T

func hide[T any](v *T) hidden[T] { return func() *T { return v } }

// Ring is one open keyring. It is safe for concurrent use.
type Ring struct{ in hidden[ring] }

type ring struct {
	self        hidden[ring] // shared by all keys, so a key costs 8 bytes for it
	keyring     string
	epoch       uint32
	fingerprint sealed.Fingerprint
	canSeal     bool
	cfg         *config.Config
	policies    map[string]*policy
	deny        map[record.KeyID]struct{}
	root        *secret.Bytes // HKDF's extracted key; every entry's key expands from it

	// life is held for reading while a scalar is used and for writing by
	// Destroy only. It is apart from mu, so that loading never waits for signing.
	life sync.RWMutex
	gone bool // under life

	mu    sync.RWMutex // guards what follows
	keys  map[record.KeyID]*Key
	held  map[pair]int // keys of each pair, with those that are being made
	vault vault
}

type policy struct {
	config.Policy
	hash [32]byte
}

// pair is what config.Create permits and counts.
type pair struct {
	algorithm record.Algorithm
	policy    string
}

// New returns an empty ring for the keyring of h, whose data key is dek. It
// refuses a header that is not the config's keyring under the config's KMS key
// (refusal.KeyringInvalid) or whose epoch the config does not open
// (refusal.EpochClosed). It owns dek, also when it fails, and destroys it: the
// ring keeps only what HKDF extracts from it.
func New(cfg *config.Config, h *sealed.Header, dek *secret.Bytes) (*Ring, error) {
	defer dek.Destroy()
	if err := checkHeader(cfg, h); err != nil {
		return nil, fmt.Errorf("open keyring: %w", err)
	}
	r := &ring{
		keyring: h.Keyring, epoch: h.Epoch, fingerprint: h.Fingerprint(), canSeal: h.Epoch == cfg.SealEpoch, cfg: cfg,
		policies: make(map[string]*policy), deny: make(map[record.KeyID]struct{}),
		keys: make(map[record.KeyID]*Key), held: make(map[pair]int),
	}
	r.self = hide(r)
	for _, p := range cfg.Policies {
		r.policies[p.Name] = &policy{p, p.Hash()}
	}
	for _, s := range cfg.DenyKeys {
		id, err := record.ParseKeyID(s)
		if err != nil {
			return nil, fmt.Errorf("open keyring: deny list: %w", refusal.ConfigInvalid)
		}
		r.deny[id] = struct{}{}
	}
	err := dek.Use(func(b []byte) error {
		if len(b) != dekLen {
			return refusal.KMSReply
		}
		root, err := hkdf.Extract(sha256.New, b, nil)
		r.root = secret.New(root)
		return err //nolint:wrapcheck // wrapped below
	})
	if err != nil {
		return nil, fmt.Errorf("open keyring: %w", err)
	}
	return &Ring{r.self}, nil
}

func checkHeader(cfg *config.Config, h *sealed.Header) error {
	if h.Version != 1 || h.Keyring != cfg.Keyring || h.KMSKeyARN != cfg.KMSKeyARN || len(h.WrappedDEK) == 0 {
		return refusal.KeyringInvalid
	}
	for _, e := range cfg.Epochs {
		if e == h.Epoch {
			return nil
		}
	}
	return refusal.EpochClosed
}

// Create makes n keys, adds them and returns their sealed entries: all of them,
// or none and an error. It refuses a pair that the config does not let be made
// (refusal.CreateDenied), more keys than it permits (refusal.CreateLimit) and an
// epoch that is open but no longer seals (refusal.EpochClosed). RSA takes some
// tenths of a second per key.
func (r *Ring) Create(a record.Algorithm, policyName string, n int) ([][]byte, error) {
	s := r.in()
	p := pair{a, policyName}
	if err := s.reserve(p, n); err != nil {
		return nil, fmt.Errorf("create %d keys: %w", n, err)
	}
	entries, made, err := s.makeKeys(p, n)
	if err == nil {
		err = s.add(made, false)
	}
	for _, o := range made {
		clear(o.scalar)
	}
	if err != nil {
		s.release(p, n)
		return nil, fmt.Errorf("create %d keys: %w", n, err)
	}
	return entries, nil
}

// Open adds the key of a sealed entry. It refuses what this ring did not seal
// (refusal.SealedInvalid), keys on the deny list (refusal.KeyDenied) and keys
// whose policy the config no longer has (refusal.PolicyDenied). Opening a key
// again changes nothing.
func (r *Ring) Open(entry []byte) error {
	s := r.in()
	o, err := s.unseal(entry)
	if err != nil {
		return fmt.Errorf("open sealed key: %w", err)
	}
	defer clear(o.scalar)
	if err := s.add([]*opened{o}, true); err != nil {
		return fmt.Errorf("open sealed key: %w", err)
	}
	return nil
}

// Key returns an open key, or refusal.KeyDenied or refusal.KeyUnknown.
func (r *Ring) Key(id record.KeyID) (*Key, error) {
	s := r.in()
	if _, denied := s.deny[id]; denied {
		return nil, refusal.KeyDenied
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	k, ok := s.keys[id]
	if !ok {
		return nil, refusal.KeyUnknown
	}
	return k, nil
}

// Len returns the number of open keys.
func (r *Ring) Len() int {
	s := r.in()
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.keys)
}

// Fingerprint names the keyring: the hash of its wrapped data key.
func (r *Ring) Fingerprint() sealed.Fingerprint { return r.in().fingerprint }

// Epoch is the epoch of the keyring's header.
func (r *Ring) Epoch() uint32 { return r.in().epoch }

// Destroy waits for signatures that are being made, erases all private keys and
// leaves a ring that refuses everything with refusal.NoKeyring or
// refusal.KeyUnknown. It may be called more than once.
func (r *Ring) Destroy() {
	s := r.in()
	s.life.Lock()
	defer s.life.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gone = true
	s.root.Destroy()
	s.vault.erase()
	clear(s.keys)
	clear(s.held)
}

// reserve counts n keys in advance, so that makers at the same time cannot pass
// the limit together.
func (s *ring) reserve(p pair, n int) error {
	limit := s.cfg.MaxCreate(p.algorithm, p.policy)
	if limit == 0 {
		return refusal.CreateDenied
	}
	if !s.canSeal {
		return refusal.EpochClosed
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if n < 1 || n > limit-s.held[p] {
		return refusal.CreateLimit
	}
	s.held[p] += n
	return nil
}

func (s *ring) release(p pair, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held[p] -= n
}

// makeKeys opens every entry it sealed, as Open would, before it is handed out.
func (s *ring) makeKeys(p pair, n int) (entries [][]byte, made []*opened, err error) {
	for range n {
		entry, err := s.makeEntry(p)
		if err != nil {
			return nil, made, err
		}
		o, err := s.unseal(entry)
		if err != nil {
			return nil, made, err
		}
		entries, made = append(entries, entry), append(made, o)
	}
	return entries, made, nil
}

// add moves opened keys into the ring; count is false where reserve has counted.
func (s *ring) add(keys []*opened, count bool) error {
	s.life.RLock()
	defer s.life.RUnlock()
	if s.gone {
		return refusal.NoKeyring
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range keys {
		if old, ok := s.keys[o.id]; ok {
			// The ring seals a key once, so another policy is nothing it made.
			if old.policy != o.policy {
				return refusal.SealedInvalid
			}
			continue
		}
		if count {
			s.held[pair{o.algorithm, o.policy.Name}]++
		}
		s.keys[o.id] = &Key{
			ring: s.self, id: o.id, algorithm: o.algorithm, public: o.public, policy: o.policy, at: s.vault.put(o.scalar),
		}
	}
	return nil
}
