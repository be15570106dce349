package payload_test

import (
	"bytes"
	stdcrypto "crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"math/big"
	"slices"
	"sync"
	"testing"

	ethcrypto "github.com/ethereum/go-ethereum/crypto"

	"github.com/keyhold/keyhold/internal/payload"
	"github.com/keyhold/keyhold/internal/record"
)

// signed is one signature that another implementation made.
type signed struct {
	algorithm record.Algorithm
	public    []byte
	kind      record.Kind
	payload   []byte
	signature []byte
}

func (s signed) verify() error {
	return payload.Verify(s.algorithm, s.public, s.kind, s.payload, s.signature)
}

// web3Vector is the example of web3.js, accounts.sign.
func web3Vector(tb testing.TB) signed {
	tb.Helper()
	key, err := ethcrypto.HexToECDSA("4c0883a69102937d6231471b5dbb6204fe5129617082792ae468d01a3f362318")
	if err != nil {
		tb.Fatalf("key: %v", err)
	}
	return signed{
		record.Secp256k1, ethcrypto.FromECDSAPub(&key.PublicKey), record.Message, []byte("Some data"),
		unhex(tb, "b91467e570a6466aa9e9876cbcd013baba02900b8979d43fe208a4a4f339f5fd"+
			"6007e74cd82e037b800186422fc2da167c747ef045e5d18a5f5d4300f8e1a0291c"),
	}
}

// rfc6979Vector is A.2.5, P-256 with SHA-256, message "sample".
func rfc6979Vector(tb testing.TB) signed {
	tb.Helper()
	return signed{
		record.P256, unhex(tb, "04"+
			"60fed4ba255a9d31c961eb74c6356d68c049b8923b61fa6ce669622e60f29fb6"+
			"7903fe1008b8bc99a41ae9e95628bc64f2f1b20c2d7e9f5177a3c294d4462299"),
		record.Raw, []byte("sample"),
		unhex(tb, "efd48b2aacb6a8fd1140dd9cd45e81d69d2c877b56aaf991c34d0ea84eaf3716"+
			"f7cb1c942d657c41d436c7a1b6e29f65f3e900dbb9aff4064dc4ab2f843acda8"),
	}
}

// rfc8032Vector is 7.1, TEST 2.
func rfc8032Vector(tb testing.TB) signed {
	tb.Helper()
	return signed{
		record.Ed25519, unhex(tb, "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"),
		record.Raw,
		[]byte{0x72},
		unhex(tb, "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"+
			"085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"),
	}
}

var rsaKey = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })

func rsaVector(tb testing.TB) signed {
	tb.Helper()
	key, err := rsaKey()
	if err != nil {
		tb.Fatalf("key: %v", err)
	}
	digest := sha256.Sum256([]byte("\x19Keyhold Signed Message:\n6sample"))
	sig, err := rsa.SignPKCS1v15(nil, key, stdcrypto.SHA256, digest[:])
	if err != nil {
		tb.Fatalf("sign: %v", err)
	}
	return signed{record.RSA2048, pkix(tb, &key.PublicKey), record.Message, []byte("sample"), sig}
}

func pkix(tb testing.TB, public any) []byte {
	tb.Helper()
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		tb.Fatalf("PKIX: %v", err)
	}
	return der
}

func vectors(tb testing.TB) []signed {
	tb.Helper()
	return []signed{web3Vector(tb), rfc6979Vector(tb), rfc8032Vector(tb), rsaVector(tb)}
}

func TestSignaturesOfOtherImplementationsVerify(t *testing.T) {
	t.Parallel()
	for _, s := range vectors(t) {
		if err := s.verify(); err != nil {
			t.Errorf("%s: %v", s.algorithm, err)
		}
	}
	if got, want := payload.Address(web3Vector(t).public), "0x2c7536E3605D9C16a7a3D7b1898e529396a65c23"; got != want {
		t.Errorf("address %s, want %s", got, want)
	}
}

func TestOnePayloadHasOneSignatureAndOneKind(t *testing.T) {
	t.Parallel()
	for _, s := range vectors(t) {
		for i := range s.signature {
			bad := s
			bad.signature = bytes.Clone(s.signature)
			bad.signature[i] ^= 1
			if err := bad.verify(); !errors.Is(err, payload.ErrSignature) {
				t.Errorf("%s, signature byte %d changed: got %v", s.algorithm, i, err)
			}
		}
		for name, sig := range map[string][]byte{
			"none": nil, "cut": s.signature[:len(s.signature)-1], "longer": append(bytes.Clone(s.signature), 0),
		} {
			bad := s
			bad.signature = sig
			if err := bad.verify(); !errors.Is(err, payload.ErrSignature) {
				t.Errorf("%s, signature %s: got %v", s.algorithm, name, err)
			}
		}
		bad := s
		bad.payload = append(bytes.Clone(s.payload), 0)
		if err := bad.verify(); !errors.Is(err, payload.ErrSignature) {
			t.Errorf("%s, another payload: got %v", s.algorithm, err)
		}
		bad = s
		bad.kind = map[record.Kind]record.Kind{record.Message: record.Raw, record.Raw: record.Message}[s.kind]
		if err := bad.verify(); !errors.Is(err, payload.ErrSignature) {
			t.Errorf("%s, another kind: got %v", s.algorithm, err)
		}
	}
}

func TestBytesThatAreNoPublicKeyAreRefused(t *testing.T) {
	t.Parallel()
	small, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatalf("key: %v", err)
	}
	curve, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatalf("key: %v", err)
	}
	odd := map[record.Algorithm][][]byte{
		record.RSA2048: {pkix(t, &small.PublicKey), pkix(t, &curve.PublicKey)},
	}
	for _, s := range vectors(t) {
		off := bytes.Clone(s.public)
		off[len(off)-1] ^= 1
		bad := append(odd[s.algorithm], nil, s.public[1:], append(bytes.Clone(s.public), 0))
		if s.algorithm == record.Secp256k1 || s.algorithm == record.P256 {
			bad = append(bad, off, make([]byte, 65))
		}
		for i, public := range bad {
			wrong := s
			wrong.public = public
			if err := wrong.verify(); !errors.Is(err, payload.ErrPublicKey) {
				t.Errorf("%s, case %d: got %v, want ErrPublicKey", s.algorithm, i, err)
			}
		}
	}
}

func TestAnotherKeysSignatureIsRefused(t *testing.T) {
	t.Parallel()
	s := web3Vector(t)
	key, err := ethcrypto.GenerateKey()
	if err != nil {
		t.Fatalf("key: %v", err)
	}
	s.public = ethcrypto.FromECDSAPub(&key.PublicKey)
	if err := s.verify(); !errors.Is(err, payload.ErrSignature) {
		t.Errorf("secp256k1: got %v", err)
	}
	e := rfc8032Vector(t)
	e.public = bytes.Clone(e.public)
	e.public[0] ^= 1
	if err := e.verify(); !errors.Is(err, payload.ErrSignature) {
		t.Errorf("ed25519: got %v", err)
	}
}

func TestTheHigherSAndTheOtherVAreRefused(t *testing.T) {
	t.Parallel()
	order := ethcrypto.S256().Params().N
	s := web3Vector(t)
	high := bytes.Clone(s.signature)
	new(big.Int).Sub(order, new(big.Int).SetBytes(high[32:64])).FillBytes(high[32:64])
	digest, err := payload.Digest(s.algorithm, s.kind, s.payload)
	if err != nil {
		t.Fatalf("Digest: %v", err)
	}
	for v := range 256 {
		bad := s
		bad.signature = bytes.Clone(s.signature)
		bad.signature[64] = byte(v)
		if err := bad.verify(); (err == nil) != (v == 28) {
			t.Errorf("v %d: got %v", v, err)
		}
		bad.signature = bytes.Clone(high)
		bad.signature[64] = byte(v)
		if err := bad.verify(); !errors.Is(err, payload.ErrSignature) {
			t.Errorf("higher s, v %d: got %v", v, err)
		}
	}
	// The higher s with the other v is a valid signature to whoever does not look.
	rsv := bytes.Clone(high)
	rsv[64] = 0
	if got, err := ethcrypto.Ecrecover(digest, rsv); err != nil || !slices.Equal(got, s.public) {
		t.Errorf("the test's higher s is not one that verifies elsewhere: %v", err)
	}
}

func TestLowSDrawsTheLineAtHalfTheOrder(t *testing.T) {
	t.Parallel()
	half := new(big.Int).Rsh(ethcrypto.S256().Params().N, 1)
	sigWith := func(s *big.Int) []byte { return append(make([]byte, 32), s.FillBytes(make([]byte, 32))...) }
	for _, tt := range []struct {
		sig  []byte
		want bool
	}{
		{sigWith(new(big.Int)), true},
		{sigWith(half), true},
		{sigWith(new(big.Int).Add(half, big.NewInt(1))), false},
		{bytes.Repeat([]byte{0xff}, 64), false},
		{make([]byte, 63), false},
	} {
		if got := payload.LowS(tt.sig); got != tt.want {
			t.Errorf("LowS(%x) = %v", tt.sig, got)
		}
	}
}

func FuzzVerifyAcceptsOnlyTheOneSignature(f *testing.F) {
	known := vectors(f)
	for i, s := range known {
		f.Add(i, s.public, s.payload, s.signature)
	}
	f.Fuzz(func(t *testing.T, i int, public, p, sig []byte) {
		if i < 0 || i >= len(known) {
			return
		}
		s := known[i]
		err := payload.Verify(s.algorithm, public, s.kind, p, sig)
		same := slices.Equal(public, s.public) && slices.Equal(p, s.payload) && slices.Equal(sig, s.signature)
		if same && err != nil {
			t.Errorf("the known signature was refused: %v", err)
		}
		if !same && err == nil && slices.Equal(public, s.public) {
			t.Errorf("another signature of %s was accepted", s.algorithm)
		}
	})
}

// strictDER reads a signature as Bitcoin does, into 64 bytes.
func strictDER(der []byte) (rs []byte, ok bool) {
	var sig struct{ R, S *big.Int }
	rest, err := asn1.Unmarshal(der, &sig)
	if err != nil || len(rest) != 0 || sig.R.Sign() < 0 || sig.S.Sign() < 0 || sig.R.BitLen() > 256 || sig.S.BitLen() > 256 {
		return nil, false
	}
	again, err := asn1.Marshal(sig)
	if err != nil || !slices.Equal(again, der) {
		return nil, false
	}
	return append(sig.R.FillBytes(make([]byte, 32)), sig.S.FillBytes(make([]byte, 32))...), true
}
