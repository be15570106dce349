// Package payload says which bytes each kind of record signs, and verifies
// signatures over them. It holds no private key and refuses what has no single
// meaning: unknown kinds, digests of another length, a second form of a
// signature.
package payload

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"strconv"

	"github.com/ethereum/go-ethereum/crypto"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
)

// What a message is prefixed with, before its length in decimal.
const (
	ethereumPrefix = "\x19Ethereum Signed Message:\n" // EIP-191, version 0x45
	keyholdPrefix  = "\x19Keyhold Signed Message:\n"
)

// DigestLen is the length of a digest in bytes, of every hash used here.
const DigestLen = 32

// ErrCombination refuses an algorithm with a kind it cannot sign.
var ErrCombination = errors.New("payload: this algorithm does not sign this kind")

// Hasher computes what an algorithm signs for payloads of one kind. It keeps
// its memory, so it is for one goroutine.
type Hasher struct {
	algorithm record.Algorithm
	kind      record.Kind
	keccak    crypto.KeccakState // secp256k1 only
	sha       hash.Hash          // P-256 and RSA only
	buf       []byte             // message prefix and length; for Ed25519 the message too
	sum       [DigestLen]byte
}

// NewHasher returns the hasher of that algorithm and kind. It refuses Ed25519
// digests: Ed25519 hashes itself, so a digest would be a raw payload under
// another name.
func NewHasher(a record.Algorithm, k record.Kind) (*Hasher, error) {
	if _, err := record.ParseKind(string(k)); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCombination, err)
	}
	h := &Hasher{algorithm: a, kind: k}
	switch a {
	case record.Secp256k1:
		h.keccak = crypto.NewKeccakState()
	case record.P256, record.RSA2048:
		h.sha = sha256.New()
	case record.Ed25519:
		if k == record.Digest {
			return nil, fmt.Errorf("%w: %s, %s", ErrCombination, a, k)
		}
	default:
		return nil, fmt.Errorf("%w: unknown algorithm", ErrCombination)
	}
	return h, nil
}

// Sum returns what the algorithm signs for payload: a digest of 32 bytes, or
// for Ed25519 the whole message. It is valid until the next Sum and may alias
// payload.
func (h *Hasher) Sum(payload []byte) ([]byte, error) {
	switch h.kind {
	case record.Message:
		h.prefix(len(payload))
		if h.algorithm == record.Ed25519 {
			h.buf = append(h.buf, payload...)
			return h.buf, nil
		}
		return h.digest(h.buf, payload), nil
	case record.Raw:
		if h.algorithm == record.Ed25519 {
			return payload, nil
		}
		return h.digest(nil, payload), nil
	case record.Digest:
		if len(payload) != DigestLen {
			return nil, refusal.DigestLength
		}
		return payload, nil
	}
	return nil, ErrCombination
}

func (h *Hasher) prefix(n int) {
	if h.algorithm == record.Secp256k1 {
		h.buf = append(h.buf[:0], ethereumPrefix...)
	} else {
		h.buf = append(h.buf[:0], keyholdPrefix...)
	}
	h.buf = strconv.AppendInt(h.buf, int64(n), 10)
}

// digest hashes prefix || payload. Hashes never fail to write or read.
func (h *Hasher) digest(prefix, payload []byte) []byte {
	if h.keccak != nil {
		h.keccak.Reset()
		_, _ = h.keccak.Write(prefix)
		_, _ = h.keccak.Write(payload)
		_, _ = h.keccak.Read(h.sum[:]) // Sum would copy the state
		return h.sum[:]
	}
	h.sha.Reset()
	_, _ = h.sha.Write(prefix)
	_, _ = h.sha.Write(payload)
	return h.sha.Sum(h.sum[:0])
}

// Digest returns the digest that a signs for payload, nil where the algorithm
// hashes itself.
func Digest(a record.Algorithm, k record.Kind, payload []byte) ([]byte, error) {
	h, err := NewHasher(a, k)
	if err != nil {
		return nil, err
	}
	sum, err := h.Sum(payload)
	if err != nil || a == record.Ed25519 {
		return nil, err
	}
	return append([]byte(nil), sum...), nil
}
