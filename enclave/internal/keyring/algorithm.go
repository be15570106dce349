package keyring

import (
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"

	"github.com/keyhold/keyhold/enclave/internal/keyring/secp"
	"github.com/keyhold/keyhold/internal/record"
)

// errPrivate stands for every reason why bytes are no private key: the reasons
// of the libraries may quote it.
var errPrivate = errors.New("keyring: not a private key of this algorithm")

const rsaBits = 2048

// generate makes a private key: 32 bytes, or PKCS #8 for RSA. All randomness is
// the kernel's generator.
func generate(a record.Algorithm) ([]byte, error) {
	switch a {
	case record.Secp256k1:
		return generateSecp256k1(), nil
	case record.Ed25519:
		seed := make([]byte, ed25519.SeedSize)
		rand.Read(seed) // never fails: it ends the program instead
		return seed, nil
	case record.P256:
		key, err := ecdh.P256().GenerateKey(rand.Reader)
		if err != nil {
			return nil, fmt.Errorf("generate P-256 key: %w", err)
		}
		return key.Bytes(), nil
	case record.RSA2048:
		key, err := rsa.GenerateKey(rand.Reader, rsaBits)
		if err != nil {
			return nil, fmt.Errorf("generate RSA key: %w", err)
		}
		return x509.MarshalPKCS8PrivateKey(key) //nolint:wrapcheck // cannot fail for an RSA key
	}
	return nil, errPrivate
}

// generateSecp256k1 draws until the scalar is in range: a second draw comes once
// in 2^127.
func generateSecp256k1() []byte {
	scalar := make([]byte, secp.ScalarLen)
	for {
		rand.Read(scalar)
		if _, err := secp.Derive((*[secp.ScalarLen]byte)(scalar)); err == nil {
			return scalar
		}
	}
}

// derive returns the public key in the form of sealed.Public.PublicKey.
func derive(a record.Algorithm, private []byte) ([]byte, error) {
	if a != record.RSA2048 && len(private) != 32 {
		return nil, errPrivate
	}
	switch a {
	case record.Secp256k1:
		public, err := secp.Derive((*[secp.ScalarLen]byte)(private))
		if err != nil {
			return nil, errPrivate
		}
		return public[:], nil
	case record.Ed25519:
		key := ed25519.NewKeyFromSeed(private)
		defer clear(key)
		return append([]byte(nil), key[ed25519.SeedSize:]...), nil
	case record.P256:
		key, err := ecdh.P256().NewPrivateKey(private)
		if err != nil {
			return nil, errPrivate
		}
		return key.PublicKey().Bytes(), nil
	case record.RSA2048:
		key, err := parseRSA(private)
		if err != nil {
			return nil, err
		}
		return x509.MarshalPKIXPublicKey(&key.PublicKey) //nolint:wrapcheck // cannot fail for an RSA key
	}
	return nil, errPrivate
}

func parseRSA(private []byte) (*rsa.PrivateKey, error) {
	parsed, err := x509.ParsePKCS8PrivateKey(private)
	if err != nil {
		return nil, errPrivate
	}
	key, ok := parsed.(*rsa.PrivateKey)
	if !ok || key.N.BitLen() != rsaBits {
		return nil, errPrivate
	}
	return key, nil
}

// scheme signs and verifies what payload.Hasher gives for one key.
type scheme struct {
	sign   func(signed []byte) ([]byte, error)
	verify func(signed, sig []byte) bool
}

// newScheme prepares a key for many signatures. private must stay as it is while
// the scheme is used.
func newScheme(a record.Algorithm, private, public []byte) (scheme, error) {
	switch a {
	case record.Secp256k1:
		return newSecp256k1(private, public)
	case record.Ed25519:
		key := ed25519.NewKeyFromSeed(private)
		return scheme{
			func(signed []byte) ([]byte, error) { return ed25519.Sign(key, signed), nil },
			func(signed, sig []byte) bool { return ed25519.Verify(public, signed, sig) },
		}, nil
	case record.P256:
		return newP256(private)
	case record.RSA2048:
		key, err := parseRSA(private)
		if err != nil {
			return scheme{}, err
		}
		return scheme{
			func(signed []byte) ([]byte, error) { return rsa.SignPKCS1v15(nil, key, crypto.SHA256, signed) },
			func(signed, sig []byte) bool {
				return rsa.VerifyPKCS1v15(&key.PublicKey, crypto.SHA256, signed, sig) == nil
			},
		}, nil
	}
	return scheme{}, errPrivate
}

// recoveryBase is what Ethereum adds to the recovery id 0 or 1 to get v.
const recoveryBase = 27

func newSecp256k1(private, public []byte) (scheme, error) {
	scalar := (*[secp.ScalarLen]byte)(private)
	parsed, err := secp.Parse((*[secp.PublicLen]byte)(public))
	if err != nil {
		return scheme{}, errPrivate
	}
	sign := func(signed []byte) ([]byte, error) {
		var sig [secp.SignatureLen]byte
		if err := secp.Sign(&sig, (*[secp.DigestLen]byte)(signed), scalar); err != nil {
			return nil, errPrivate
		}
		sig[64] += recoveryBase
		return sig[:], nil
	}
	verify := func(signed, sig []byte) bool {
		v := sig[64]
		return (v == recoveryBase || v == recoveryBase+1) &&
			parsed.Verify((*[secp.DigestLen]byte)(signed), (*[64]byte)(sig[:64])) // refuses a high s
	}
	return scheme{sign, verify}, nil
}

func newP256(private []byte) (scheme, error) {
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), private)
	if err != nil {
		return scheme{}, errPrivate
	}
	sign := func(signed []byte) ([]byte, error) {
		der, err := key.Sign(nil, signed, crypto.SHA256) // no reader: deterministic, RFC 6979
		if err != nil {
			return nil, errPrivate
		}
		var rs struct{ R, S *big.Int }
		if rest, err := asn1.Unmarshal(der, &rs); err != nil || len(rest) != 0 {
			return nil, errPrivate
		}
		sig := make([]byte, 2*sha256.Size)
		rs.R.FillBytes(sig[:32])
		rs.S.FillBytes(sig[32:])
		return sig, nil
	}
	verify := func(signed, sig []byte) bool {
		r, s := new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])
		return ecdsa.Verify(&key.PublicKey, signed, r, s)
	}
	return scheme{sign, verify}, nil
}
