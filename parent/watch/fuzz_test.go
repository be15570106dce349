package watch_test

import (
	"encoding/json"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/parent/watch"
)

// What nitro-cli prints comes from processes that any member of group ne can have
// started: it is read, never believed beyond its form.
func FuzzParseEnclaves(f *testing.F) {
	for _, seed := range []string{
		"[]", "null", "{}", "[{}]", `[{"EnclaveCID":-1}]`, `[{"EnclaveCID":4294967296}]`, enclaveJSON("keyhold-16", 16, "RUNNING", "NONE", goodPCR),
		enclaveJSON("x", 4, "TERMINATING", "DEBUG_MODE", otherPCR),
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		list, err := watch.TestingOnlyParseEnclaves(raw)
		if err != nil {
			if list != nil {
				t.Fatal("a list came with an error")
			}
			return
		}
		again, err := json.Marshal(list)
		if err != nil {
			t.Fatal(err)
		}
		back, err := watch.TestingOnlyParseEnclaves(again)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(list, back); diff != "" {
			t.Fatal(diff)
		}
	})
}
