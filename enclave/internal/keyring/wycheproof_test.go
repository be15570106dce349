package keyring_test

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/keyhold/keyhold/enclave/internal/keyring"
	"github.com/keyhold/keyhold/internal/sealed"
)

// gcmCase is one test of Wycheproof's aes_gcm_test.json; byte strings are hex.
type gcmCase struct {
	TcID                                        int
	Comment, Key, IV, AAD, Msg, Ct, Tag, Result string
}

// check reports whether the case is of the lengths that sealed entries know.
func (c gcmCase) check(t *testing.T) bool {
	t.Helper()
	unhex := func(s string) []byte {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	key, nonce := unhex(c.Key), unhex(c.IV)
	if len(key) != 32 || len(nonce) != sealed.NonceLen {
		return false
	}
	aead, err := keyring.TestingOnlyGCM(key)
	if err != nil {
		t.Fatal(err)
	}
	msg, box, aad := unhex(c.Msg), append(unhex(c.Ct), unhex(c.Tag)...), unhex(c.AAD)
	got, err := aead.Open(nil, nonce, box, aad)
	if valid := c.Result == "valid"; (err == nil) != valid || valid && (!slices.Equal(got, msg) || !slices.Equal(aead.Seal(nil, nonce, msg, aad), box)) {
		t.Errorf("case %d (%s): %v, want %s", c.TcID, c.Comment, err, c.Result)
	}
	return true
}

func TestWycheproofGCM(t *testing.T) {
	t.Parallel()
	const name = "aes_gcm_test.json"
	raw, err := os.ReadFile(filepath.Join("..", "..", "..", "..", "shared", "vectors", "wycheproof", name))
	if errors.Is(err, fs.ErrNotExist) {
		t.Skip("the public test vectors are not there: put Wycheproof's file at shared/vectors/wycheproof/" + name + " beside the module")
	}
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		TestGroups []struct{ Tests []gcmCase }
	}
	if err := json.Unmarshal(raw, &file); err != nil {
		t.Fatal(err)
	}
	verdicts := map[string]int{}
	for _, g := range file.TestGroups {
		for _, c := range g.Tests {
			if c.check(t) {
				verdicts[c.Result]++
			}
		}
	}
	if verdicts["valid"] == 0 || verdicts["invalid"] == 0 {
		t.Errorf("vectors of one kind only: %v", verdicts)
	}
	t.Logf("%v", verdicts)
}
