package keyring

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"

	"github.com/keyhold/keyhold/internal/payload"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
)

// sealDomain starts the HKDF info of every entry's key.
const sealDomain = "keyhold-seal-v1\x00"

// opened is an entry that was opened and checked. Its owner clears scalar.
type opened struct {
	id        record.KeyID
	algorithm record.Algorithm
	public    []byte
	policy    *policy
	scalar    []byte // scalar, seed or PKCS #8
}

// makeEntry makes one key and seals it.
func (s *ring) makeEntry(p pair) ([]byte, error) {
	scalar, err := generate(p.algorithm)
	if err != nil {
		return nil, err
	}
	defer clear(scalar)
	public, err := derive(p.algorithm, scalar)
	if err != nil {
		return nil, err
	}
	return s.seal(sealed.Public{
		Version: 1, Keyring: s.keyring, Fingerprint: s.fingerprint, Epoch: s.epoch,
		KeyID: sealed.KeyID(p.algorithm, public), Algorithm: p.algorithm, PublicKey: public,
		Address: address(p.algorithm, public), Policy: p.policy,
	}, scalar)
}

func (s *ring) seal(p sealed.Public, scalar []byte) ([]byte, error) {
	aead, err := s.aead(p.KeyID)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, sealed.NonceLen)
	rand.Read(nonce)
	return sealed.EncodeEntry(&sealed.Entry{
		Public: p, Nonce: nonce, Ciphertext: aead.Seal(nil, nonce, scalar, p.AAD()),
	}), nil
}

// unseal opens entry. It takes nothing from the public part on trust: what
// follows from the private key is derived again and compared, the rest is
// authenticated.
func (s *ring) unseal(entry []byte) (*opened, error) {
	e, err := sealed.DecodeEntry(entry)
	if err != nil {
		return nil, refusal.SealedInvalid
	}
	p := &e.Public
	if p.Keyring != s.keyring || p.Epoch != s.epoch || p.Fingerprint != s.fingerprint {
		return nil, refusal.SealedInvalid
	}
	if _, denied := s.deny[p.KeyID]; denied {
		return nil, refusal.KeyDenied
	}
	aead, err := s.aead(p.KeyID)
	if err != nil {
		return nil, err
	}
	scalar, err := aead.Open(nil, e.Nonce, e.Ciphertext, p.AAD())
	if err != nil {
		return nil, refusal.SealedInvalid
	}
	public, err := derive(p.Algorithm, scalar)
	if err != nil || !bytes.Equal(public, p.PublicKey) || //nolint:forbidigo // public keys
		sealed.KeyID(p.Algorithm, public) != p.KeyID || address(p.Algorithm, public) != p.Address {
		clear(scalar)
		return nil, refusal.SealedInvalid
	}
	rules, ok := s.policies[p.Policy]
	if !ok {
		clear(scalar)
		return nil, refusal.PolicyDenied
	}
	return &opened{p.KeyID, p.Algorithm, public, rules, scalar}, nil
}

// aead returns the cipher of one key's entry. Each key is sealed under an AES
// key of its own, so random nonces cannot meet.
func (s *ring) aead(id record.KeyID) (cipher.AEAD, error) {
	info := make([]byte, 0, len(sealDomain)+len(id)+len(s.fingerprint))
	info = append(append(append(info, sealDomain...), id[:]...), s.fingerprint[:]...)
	var key []byte
	err := s.root.Use(func(root []byte) (err error) {
		key, err = hkdf.Expand(sha256.New, root, string(info), 32)
		return err //nolint:wrapcheck // replaced below
	})
	if err != nil {
		return nil, refusal.NoKeyring
	}
	defer clear(key)
	return newGCM(key)
}

func newGCM(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, refusal.Internal
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, refusal.Internal
	}
	return aead, nil
}

func address(a record.Algorithm, public []byte) string {
	if a != record.Secp256k1 {
		return ""
	}
	return payload.Address(public)
}
