package attestation_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/keyhold/keyhold/attestation"
)

func TestWycheproofES384(t *testing.T) {
	const name = "ecdsa_secp384r1_sha384_p1363_test.json"
	raw, err := os.ReadFile(filepath.Join("..", "..", "shared", "vectors", "wycheproof", name))
	if errors.Is(err, fs.ErrNotExist) {
		t.Skip("the public test vectors are not there: put Wycheproof's file at shared/vectors/wycheproof/" + name + " beside the module")
	}
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		TestGroups []struct {
			PublicKey struct{ Uncompressed string }
			Tests     []struct {
				TcID                      int
				Comment, Msg, Sig, Result string
			}
		}
	}
	if err := json.Unmarshal(raw, &file); err != nil {
		t.Fatal(err)
	}
	unhex := func(s string) []byte {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	verdicts := map[string]int{}
	for _, g := range file.TestGroups {
		key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P384(), unhex(g.PublicKey.Uncompressed))
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range g.Tests {
			if got := attestation.TestingOnlyVerifyES384(key, unhex(c.Msg), unhex(c.Sig)); got != (c.Result == "valid") {
				t.Errorf("case %d (%s): %v, want %s", c.TcID, c.Comment, got, c.Result)
			}
			verdicts[c.Result]++
		}
	}
	if verdicts["valid"] == 0 || verdicts["invalid"] == 0 {
		t.Errorf("vectors of one kind only: %v", verdicts)
	}
	t.Logf("%v", verdicts)
}
