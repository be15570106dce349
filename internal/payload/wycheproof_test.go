package payload_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	ethcrypto "github.com/ethereum/go-ethereum/crypto"

	"github.com/keyhold/keyhold/internal/payload"
	"github.com/keyhold/keyhold/internal/record"
)

type wycheproof struct {
	Groups []struct {
		PublicKey struct {
			Uncompressed string `json:"uncompressed"`
		} `json:"publicKey"`
		Tests []struct {
			ID      int    `json:"tcId"`
			Comment string `json:"comment"`
			Message string `json:"msg"`
			Sig     string `json:"sig"`
			Result  string `json:"result"`
		} `json:"tests"`
	} `json:"testGroups"`
}

func readWycheproof(t *testing.T, name string) wycheproof {
	t.Helper()
	path := filepath.Join("..", "..", "..", "shared", "vectors", "wycheproof", name)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		t.Skip("the public test vectors are not there: put Wycheproof's file at shared/vectors/wycheproof/" + name + " beside the module")
	}
	if err != nil {
		t.Fatalf("read vectors: %v", err)
	}
	var w wycheproof
	if err := json.Unmarshal(b, &w); err != nil {
		t.Fatalf("read vectors: %v", err)
	}
	return w
}

// The Bitcoin variant asks for a low s, as we do. Wycheproof knows no v: a valid
// signature must verify under exactly one, an invalid one under none.
func TestWycheproofSecp256k1(t *testing.T) {
	t.Parallel()
	valid, invalid := 0, 0
	for _, g := range readWycheproof(t, "ecdsa_secp256k1_sha256_bitcoin_test.json").Groups {
		public := unhex(t, g.PublicKey.Uncompressed)
		for _, c := range g.Tests {
			digest := sha256.Sum256(unhex(t, c.Message))
			accepted := 0
			if rs, ok := strictDER(unhex(t, c.Sig)); ok {
				for _, v := range []byte{27, 28} {
					if payload.Verify(record.Secp256k1, public, record.Digest, digest[:], append(bytes.Clone(rs), v)) == nil {
						accepted++
					}
				}
				accepted += overflowed(public, digest[:], rs)
			}
			want := 0
			if c.Result == "valid" {
				want = 1
				valid++
			} else {
				invalid++
			}
			if accepted != want {
				t.Errorf("test %d (%s, %s): accepted under %d values of v", c.ID, c.Comment, c.Result, accepted)
			}
		}
	}
	if valid == 0 || invalid == 0 {
		t.Errorf("%d valid and %d invalid vectors: the file was not understood", valid, invalid)
	}
}

// overflowed counts the recovery ids 2 and 3, for points whose x is not below the
// order. Nobody meets one by chance (1 in 2^127), Ethereum has no v for them and
// Verify refuses them; some vectors are made so.
func overflowed(public, digest, rs []byte) int {
	n := 0
	for id := byte(2); id < 4; id++ {
		got, err := ethcrypto.Ecrecover(digest, append(bytes.Clone(rs), id))
		if err == nil && slices.Equal(got, public) && ethcrypto.VerifySignature(public, digest, rs) {
			n++
		}
	}
	return n
}
