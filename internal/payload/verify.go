package payload

import (
	"bytes"
	stdcrypto "crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"

	"github.com/ethereum/go-ethereum/crypto"

	"github.com/keyhold/keyhold/internal/record"
)

// Errors of Verify.
var (
	ErrPublicKey = errors.New("payload: not a public key of this algorithm")
	ErrSignature = errors.New("payload: signature does not verify")
)

// halfOrder is half the order of secp256k1, rounded down: a higher s is refused.
//
//nolint:gochecknoglobals // a constant of the curve
var halfOrder = [32]byte{
	0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
	0x5d, 0x57, 0x6e, 0x73, 0x57, 0xa4, 0x50, 0x1d, 0xdf, 0xe9, 0x2f, 0x46, 0x68, 0x1b, 0x20, 0xa0,
}

// LowS reports whether a secp256k1 signature that starts with r || s has the
// lower of the two s that verify. Of two valid forms only this one is valid here.
func LowS(sig []byte) bool { return len(sig) >= 64 && bytes.Compare(sig[32:64], halfOrder[:]) <= 0 }

// Verify reports whether sig is the signature of payload, as kind k, by the key
// with that public key. Nil means yes; ErrSignature, ErrPublicKey,
// ErrCombination and refusal.DigestLength say why not.
func Verify(a record.Algorithm, public []byte, k record.Kind, payload, sig []byte) error {
	h, err := NewHasher(a, k)
	if err != nil {
		return err
	}
	signed, err := h.Sum(payload)
	if err != nil {
		return err
	}
	if len(sig) != a.SignatureLen() {
		return fmt.Errorf("%w: %d bytes instead of %d", ErrSignature, len(sig), a.SignatureLen())
	}
	switch a {
	case record.Secp256k1:
		return verifySecp256k1(public, signed, sig)
	case record.Ed25519:
		if len(public) != ed25519.PublicKeySize {
			return ErrPublicKey
		}
		return verdict(ed25519.Verify(public, signed, sig))
	case record.P256:
		return verifyP256(public, signed, sig)
	case record.RSA2048:
		return verifyRSA(public, signed, sig)
	}
	return ErrCombination
}

func verdict(ok bool) error {
	if !ok {
		return ErrSignature
	}
	return nil
}

// verifySecp256k1 recovers the public key from digest and signature. That it is
// the given one says that r and s verify and that v leads to the key's address.
func verifySecp256k1(public, digest, sig []byte) error {
	if _, err := crypto.UnmarshalPubkey(public); err != nil {
		return ErrPublicKey
	}
	v := sig[64]
	if v != 27 && v != 28 {
		return fmt.Errorf("%w: v must be 27 or 28", ErrSignature)
	}
	if !LowS(sig) {
		return fmt.Errorf("%w: s is not the lower one", ErrSignature)
	}
	rsv := [65]byte(sig)
	rsv[64] = v - 27
	got, err := crypto.Ecrecover(digest, rsv[:])
	return verdict(err == nil && bytes.Equal(got, public)) //nolint:forbidigo // public keys
}

func verifyP256(public, digest, sig []byte) error {
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), public)
	if err != nil {
		return ErrPublicKey
	}
	r, s := new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])
	return verdict(ecdsa.Verify(key, digest, r, s))
}

func verifyRSA(public, digest, sig []byte) error {
	parsed, err := x509.ParsePKIXPublicKey(public)
	if err != nil {
		return ErrPublicKey
	}
	key, ok := parsed.(*rsa.PublicKey)
	if !ok || key.N.BitLen() != 2048 {
		return ErrPublicKey
	}
	return verdict(rsa.VerifyPKCS1v15(key, stdcrypto.SHA256, digest, sig) == nil)
}
