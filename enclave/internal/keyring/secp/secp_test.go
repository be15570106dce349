package secp_test

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"math/big"
	"testing"

	ethsecp "github.com/ethereum/go-ethereum/crypto/secp256k1"
	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/enclave/internal/keyring/secp"
)

func order() *big.Int { return new(big.Int).Set(ethsecp.S256().N) }

func scalarOf(n *big.Int) *[32]byte {
	var s [32]byte
	n.FillBytes(s[:])
	return &s
}

func reference(s *[32]byte) [65]byte {
	x, y := ethsecp.S256().ScalarBaseMult(s[:])
	var p [65]byte
	p[0] = 4
	x.FillBytes(p[1:33])
	y.FillBytes(p[33:])
	return p
}

func TestDeriveAgreesWithGoEthereum(t *testing.T) {
	t.Parallel()
	scalars := []*[32]byte{
		scalarOf(big.NewInt(1)), scalarOf(big.NewInt(2)), scalarOf(new(big.Int).Lsh(big.NewInt(1), 255)),
		scalarOf(new(big.Int).Rsh(order(), 1)), scalarOf(new(big.Int).Sub(order(), big.NewInt(1))),
	}
	for range 1000 {
		var s [32]byte
		rand.Read(s[:])
		scalars = append(scalars, &s)
	}
	for _, s := range scalars {
		got, err := secp.Derive(s)
		if err != nil {
			t.Fatalf("Derive: %v", err)
		}
		if want := reference(s); got != want {
			t.Fatalf("Derive disagrees with ScalarBaseMult: %s", cmp.Diff(want, got))
		}
	}
}

func TestScalarsOutOfRangeAreRefused(t *testing.T) {
	t.Parallel()
	all := new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 256), big.NewInt(1))
	for name, n := range map[string]*big.Int{
		"zero": new(big.Int), "the order": order(), "the order plus one": new(big.Int).Add(order(), big.NewInt(1)), "all ones": all,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := scalarOf(n)
			if _, err := secp.Derive(s); !errors.Is(err, secp.ErrScalar) {
				t.Errorf("Derive: got %v, want ErrScalar", err)
			}
			var sig [65]byte
			if err := secp.Sign(&sig, &[32]byte{1}, s); !errors.Is(err, secp.ErrScalar) {
				t.Errorf("Sign: got %v, want ErrScalar", err)
			}
		})
	}
}

func TestSignGivesTheBytesOfGoEthereum(t *testing.T) {
	t.Parallel()
	for range 500 {
		var s, digest [32]byte
		rand.Read(s[:])
		rand.Read(digest[:])
		want, err := ethsecp.Sign(digest[:], s[:])
		if err != nil {
			t.Fatalf("reference: %v", err)
		}
		var sig [65]byte
		if err := secp.Sign(&sig, &digest, &s); err != nil {
			t.Fatalf("Sign: %v", err)
		}
		if diff := cmp.Diff(want, sig[:]); diff != "" {
			t.Fatalf("signature differs from go-ethereum's: %s", diff)
		}
	}
}

func TestVerifyAcceptsOnlyTheLowSignatureOfThatDigestAndKey(t *testing.T) {
	t.Parallel()
	s, digest := [32]byte{7}, sha256.Sum256([]byte("digest"))
	public, err := secp.Derive(&s)
	if err != nil {
		t.Fatalf("Derive: %v", err)
	}
	p, err := secp.Parse(&public)
	if err != nil {
		t.Fatalf("Parse: %v", err)
	}
	var sig [65]byte
	if err := secp.Sign(&sig, &digest, &s); err != nil {
		t.Fatalf("Sign: %v", err)
	}
	good := [64]byte(sig[:64])
	if !p.Verify(&digest, &good) {
		t.Fatal("a good signature was refused")
	}
	for i := range good {
		bad := good
		bad[i] ^= 1
		if p.Verify(&digest, &bad) {
			t.Fatalf("accepted with byte %d changed", i)
		}
	}
	other := digest
	other[0] ^= 1
	if p.Verify(&other, &good) {
		t.Error("accepted for another digest")
	}
	high := good
	new(big.Int).Sub(order(), new(big.Int).SetBytes(good[32:])).FillBytes(high[32:])
	if p.Verify(&digest, &high) {
		t.Error("accepted with a high s")
	}
}

func TestWhatIsNoPointIsRefused(t *testing.T) {
	t.Parallel()
	s := [32]byte{9}
	public, err := secp.Derive(&s)
	if err != nil {
		t.Fatalf("Derive: %v", err)
	}
	hybrid, off := public, public
	hybrid[0] = 6 + public[64]&1 // libsecp256k1 would read this form
	off[64] ^= 1
	for name, p := range map[string][65]byte{"zeros": {}, "hybrid form": hybrid, "off the curve": off} {
		if _, err := secp.Parse(&p); !errors.Is(err, secp.ErrPoint) {
			t.Errorf("%s: got %v, want ErrPoint", name, err)
		}
	}
}

func TestNothingIsAllocated(t *testing.T) {
	s, digest := [32]byte{5}, [32]byte{6}
	var sig [65]byte
	public, err := secp.Derive(&s)
	if err != nil {
		t.Fatalf("Derive: %v", err)
	}
	p, err := secp.Parse(&public)
	if err != nil {
		t.Fatalf("Parse: %v", err)
	}
	n := testing.AllocsPerRun(100, func() {
		if secp.Sign(&sig, &digest, &s) != nil || !p.Verify(&digest, (*[64]byte)(sig[:64])) {
			t.Fatal("sign and verify failed")
		}
	})
	if n != 0 {
		t.Errorf("sign and verify allocate %v times", n)
	}
}

func BenchmarkDerive(b *testing.B) {
	s := [32]byte{3}
	for b.Loop() {
		if _, err := secp.Derive(&s); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSign(b *testing.B) {
	s, digest := [32]byte{5}, [32]byte{6}
	var sig [65]byte
	for b.Loop() {
		if err := secp.Sign(&sig, &digest, &s); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkBareSign(b *testing.B) {
	s, digest := [32]byte{5}, [32]byte{6}
	for b.Loop() {
		if _, err := ethsecp.Sign(digest[:], s[:]); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkScalarBaseMult(b *testing.B) {
	s := [32]byte{3}
	for b.Loop() {
		ethsecp.S256().ScalarBaseMult(s[:])
	}
}
