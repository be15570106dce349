package checker

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"

	"github.com/decred/dcrd/dcrec/secp256k1/v4"
	k1 "github.com/decred/dcrd/dcrec/secp256k1/v4/ecdsa"
)

var errSignature = errors.New("the signature is not valid")

// verifier returns what checks signatures of messages under a public key.
func verifier(algorithm string, public []byte) (func(message, signature []byte) error, error) {
	switch algorithm {
	case "secp256k1":
		key, err := secp256k1.ParsePubKey(public)
		if err != nil {
			return nil, fmt.Errorf("public key: %w", err)
		}
		return func(m, s []byte) error { return verifySecp256k1(key, m, s) }, nil
	case "ed25519":
		if len(public) != ed25519.PublicKeySize {
			return nil, errors.New("public key: another length")
		}
		return func(m, s []byte) error { return valid(ed25519.Verify(public, framed("Keyhold", m), s)) }, nil
	case "p256":
		key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), public)
		if err != nil {
			return nil, fmt.Errorf("public key: %w", err)
		}
		return func(m, s []byte) error {
			sum := sha256.Sum256(framed("Keyhold", m))
			return valid(len(s) == 64 && ecdsa.Verify(key, sum[:], new(big.Int).SetBytes(s[:32]), new(big.Int).SetBytes(s[32:])))
		}, nil
	case "rsa2048":
		parsed, err := x509.ParsePKIXPublicKey(public)
		key, ok := parsed.(*rsa.PublicKey)
		if err != nil || !ok {
			return nil, errors.New("public key: not an RSA key")
		}
		return func(m, s []byte) error {
			sum := sha256.Sum256(framed("Keyhold", m))
			return rsa.VerifyPKCS1v15(key, crypto.SHA256, sum[:], s)
		}, nil
	}
	return nil, errors.New("the algorithm is not known here")
}

// verifySecp256k1 wants r||s||v with v 27 or 28, a low s, and v that leads back to the key.
func verifySecp256k1(key *secp256k1.PublicKey, message, signature []byte) error {
	if len(signature) != 65 || signature[64] != 27 && signature[64] != 28 {
		return errSignature
	}
	var r, s secp256k1.ModNScalar
	if r.SetByteSlice(signature[:32]) || s.SetByteSlice(signature[32:64]) || r.IsZero() || s.IsZero() || s.IsOverHalfOrder() {
		return errSignature
	}
	sum := keccak256(framed("Ethereum", message))
	recovered, _, err := k1.RecoverCompact(append([]byte{signature[64]}, signature[:64]...), sum[:])
	return valid(err == nil && recovered.IsEqual(key))
}

func valid(ok bool) error {
	if !ok {
		return errSignature
	}
	return nil
}

// framed is what is signed of a message.
func framed(who string, message []byte) []byte {
	return append(fmt.Appendf(nil, "\x19%s Signed Message:\n%d", who, len(message)), message...)
}
