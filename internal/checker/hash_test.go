package checker_test

import (
	"encoding/hex"
	"strings"
	"testing"

	"github.com/ethereum/go-ethereum/crypto"

	"github.com/keyhold/keyhold/internal/checker"
)

// The first two are of the Keccak submission's known answers.
func TestKeccakIsEthereums(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"":    "c5d2460186f7233c927e7db2dcc703c0e500b653ca82273b7bfad8045d85a470",
		"abc": "4e03657aea45a94fc7d47ba826c8d667c0d1e6e33a64a036ec44f58fa12d6c45",
	} {
		if got := checker.TestingOnlyKeccak([]byte(in)); hex.EncodeToString(got[:]) != want {
			t.Errorf("%q: %x, want %s", in, got, want)
		}
	}
	for n := range 300 { // around the block of 136 bytes, one and two of them
		in := []byte(strings.Repeat("k", n))
		if got, want := checker.TestingOnlyKeccak(in), [32]byte(crypto.Keccak256(in)); got != want {
			t.Errorf("%d bytes: %x, want %x", n, got, want)
		}
	}
}
