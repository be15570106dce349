package keyring

import (
	"fmt"

	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/payload"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
)

// Key is one open key. It is safe for concurrent use.
type Key struct {
	ring      hidden[ring]
	id        record.KeyID
	algorithm record.Algorithm
	public    []byte
	policy    *policy
	at        span
}

// ID returns the hash of algorithm and public key.
func (k *Key) ID() record.KeyID { return k.id }

// Algorithm returns what the key signs with.
func (k *Key) Algorithm() record.Algorithm { return k.algorithm }

// PublicKey returns the public key in the form of sealed.Public.PublicKey. It is
// shared: the caller must not change it.
func (k *Key) PublicKey() []byte { return k.public }

// Policy returns what the key may sign. It is shared: the caller must not change it.
func (k *Key) Policy() config.Policy { return k.policy.Policy }

// PolicyHash returns the hash of Policy that receipts carry.
func (k *Key) PolicyHash() [32]byte { return k.policy.hash }

// Signer signs payloads of one kind with one key. It keeps buffers between
// signatures, so it is for one goroutine.
type Signer struct{ in hidden[signer] }

type signer struct {
	ring   *ring
	sigLen int
	hasher *payload.Hasher
	scheme scheme
	signed []byte // of the last Sign, nil where that failed
}

// NewSigner prepares a batch. It refuses a kind that the key's policy does not
// grant or its algorithm does not sign with refusal.PolicyDenied.
func (k *Key) NewSigner(kind record.Kind) (*Signer, error) {
	if !k.policy.Permits(kind) {
		return nil, fmt.Errorf("prepare signer: %w", refusal.PolicyDenied)
	}
	h, err := payload.NewHasher(k.algorithm, kind)
	if err != nil {
		return nil, fmt.Errorf("prepare signer: %w", refusal.PolicyDenied)
	}
	s := k.ring()
	s.life.RLock()
	defer s.life.RUnlock()
	if s.gone {
		return nil, fmt.Errorf("prepare signer: %w", refusal.NoKeyring)
	}
	s.mu.RLock()
	private := s.vault.get(k.at)
	s.mu.RUnlock()
	sch, err := newScheme(k.algorithm, private, k.public)
	if err != nil {
		return nil, fmt.Errorf("prepare signer: %w", refusal.Internal)
	}
	return &Signer{hide(&signer{ring: s, sigLen: k.algorithm.SignatureLen(), hasher: h, scheme: sch})}, nil
}

// Sign returns the signature of payload. It is deterministic. An error carries
// refusal.DigestLength where payload should be a digest and is not, or
// refusal.NoKeyring after Ring.Destroy.
func (s *Signer) Sign(payload []byte) ([]byte, error) {
	in := s.in()
	in.signed = nil
	signed, err := in.hasher.Sum(payload)
	if err != nil {
		return nil, err //nolint:wrapcheck // a refusal, once per record
	}
	in.ring.life.RLock()
	defer in.ring.life.RUnlock()
	if in.ring.gone {
		return nil, refusal.NoKeyring
	}
	sig, err := in.scheme.sign(signed)
	if err != nil {
		return nil, refusal.Internal
	}
	in.signed = signed
	return sig, nil
}

// Verify reports whether sig is a signature of what Sign was last asked to sign,
// whose payload must still be unchanged. It is false when that Sign failed.
func (s *Signer) Verify(sig []byte) bool {
	in := s.in()
	return in.signed != nil && len(sig) == in.sigLen && in.scheme.verify(in.signed, sig)
}
