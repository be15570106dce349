package record_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/record"
)

func TestRecordIDsFromOutside(t *testing.T) {
	t.Parallel()
	for id, good := range map[string]bool{
		"a":                         true,
		"Order/2026.07:17@x+y=z_-":  true,
		strings.Repeat("a", 256):    true,
		"v1.2":                      true,
		"batch-b0000001.x":          true,
		"batch-b0000001.":           true,
		"batch-b1.2":                true, // a batch number has at least 7 digits
		"batch-b00000001.2":         true, // and no needless zero before them
		"Batch-b0000001.2":          true, // an import id has no capitals
		"":                          false,
		strings.Repeat("a", 257):    false,
		"a b":                       false,
		"a\n":                       false,
		"a\x00":                     false,
		"ä":                         false,
		"a#b":                       false,
		"a,b":                       false,
		`a"b`:                       false,
		"batch-b0000001.0":          false,
		"batch-b0000001.499":        false,
		"batch-b12345678.5":         false,
		"x-b0000000-b0000001.2":     false,
		string("\xff"):              false,
		"record-1/../../etc/passwd": true, // ids are never paths
	} {
		err := record.CheckID(id)
		if good && err != nil {
			t.Errorf("%q: %v", id, err)
		}
		if !good && !errors.Is(err, record.ErrID) {
			t.Errorf("%q: got %v, want ErrID", id, err)
		}
	}
}

func TestNoOutsideIDIsADefaultID(t *testing.T) {
	t.Parallel()
	for _, imp := range []record.ImportID{"a", "import-2026", "x-b0000001", "-", "b"} {
		for _, n := range []int{0, 1, 9_999_999, 10_000_000, 2_000_000_000} {
			for _, i := range []int{0, 1, 499, record.MaxBatchSize} {
				id := record.DefaultID(record.MakeBatchID(imp, n), i)
				if err := record.CheckID(id); !errors.Is(err, record.ErrID) {
					t.Errorf("%s may come from outside: %v", id, err)
				}
			}
		}
	}
}

func TestBatchIDsSplitIntoWhatTheyAreMadeOf(t *testing.T) {
	t.Parallel()
	for _, imp := range []record.ImportID{"a", "import-2026", "x-b0000001", "a-b", record.ImportID(strings.Repeat("z", 64))} {
		for _, n := range []int{0, 7, 9_999_999, 10_000_000, 2_147_483_647} {
			id := record.MakeBatchID(imp, n)
			gotImp, gotN, err := id.Split()
			if err != nil || gotImp != imp || gotN != n {
				t.Errorf("%s splits into %q and %d: %v", id, gotImp, gotN, err)
			}
		}
	}
}

func TestWhatIsNoBatchIDIsRefused(t *testing.T) {
	t.Parallel()
	for _, id := range []record.BatchID{
		"", "a", "-b0000001", "a-b", "a-b000001", "a-b00000001", "a-b0000001x", "a-b+000001", "a-b-000001",
		"A-b0000001", "a_b0000001", "a b-b0000001", "a-b99999999999", "a-b0000001 ",
	} {
		if imp, n, err := id.Split(); !errors.Is(err, record.ErrID) {
			t.Errorf("%q splits into %q and %d: %v", id, imp, n, err)
		}
	}
}

func FuzzBatchIDSplitTakesOnlyWhatWasMade(f *testing.F) {
	f.Add("import-b0000001")
	f.Add("x-b0000001-b12345678")
	f.Fuzz(func(t *testing.T, s string) {
		imp, n, err := record.BatchID(s).Split()
		if err == nil && string(record.MakeBatchID(imp, n)) != s {
			t.Errorf("%q was taken for batch %d of %q", s, n, imp)
		}
	})
}

func TestImportIDsAndPools(t *testing.T) {
	t.Parallel()
	for s, good := range map[string]bool{
		"a": true, "a-1": true, "0": true, strings.Repeat("a", 64): true,
		"": false, strings.Repeat("a", 65): false, "A": false, "a_b": false, "a b": false, "a#b": false, "ä": false,
	} {
		if err := record.CheckImportID(record.ImportID(s)); (err == nil) != good || err != nil && !errors.Is(err, record.ErrID) {
			t.Errorf("CheckImportID(%q): %v", s, err)
		}
		if err := record.CheckPool(s); (err == nil) != good || err != nil && !errors.Is(err, record.ErrID) {
			t.Errorf("CheckPool(%q): %v", s, err)
		}
	}
}

func TestKeyAndBootIDsReadOnlyLowerCaseHex(t *testing.T) {
	t.Parallel()
	good := "00ff" + strings.Repeat("1a", 30)
	key, err := record.ParseKeyID(good)
	if err != nil || key.String() != good || key.IsZero() {
		t.Errorf("key %s: %v", key, err)
	}
	boot, err := record.ParseBootID(good)
	if err != nil || boot.String() != good || boot.IsZero() {
		t.Errorf("boot %s: %v", boot, err)
	}
	for _, bad := range []string{"", good[:63], good + "0", good[:62], strings.ToUpper(good), "0x" + good[:62], good[:63] + "g", good[:63] + " "} {
		if _, err := record.ParseKeyID(bad); !errors.Is(err, record.ErrID) {
			t.Errorf("ParseKeyID(%q): %v", bad, err)
		}
		if _, err := record.ParseBootID(bad); !errors.Is(err, record.ErrID) {
			t.Errorf("ParseBootID(%q): %v", bad, err)
		}
	}
	if !(record.KeyID{}).IsZero() || !(record.BootID{}).IsZero() {
		t.Error("a zero id is not zero")
	}
}

func TestIDsAreHexInJSON(t *testing.T) {
	t.Parallel()
	type ids struct {
		Key  record.KeyID
		Boot record.BootID
	}
	want := ids{record.KeyID{1}, record.BootID{0xab}}
	b, err := json.Marshal(want)
	if err != nil {
		t.Fatalf("Marshal: %v", err)
	}
	zeros := strings.Repeat("0", 62)
	if diff := cmp.Diff(`{"Key":"01`+zeros+`","Boot":"ab`+zeros+`"}`, string(b)); diff != "" {
		t.Error(diff)
	}
	var got ids
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatalf("Unmarshal: %v", err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestOnlyKnownNamesParse(t *testing.T) {
	t.Parallel()
	for _, a := range record.Algorithms() {
		if got, err := record.ParseAlgorithm(string(a)); err != nil || got != a {
			t.Errorf("ParseAlgorithm(%s) = %s, %v", a, got, err)
		}
	}
	for _, k := range record.Kinds() {
		if got, err := record.ParseKind(string(k)); err != nil || got != k {
			t.Errorf("ParseKind(%s) = %s, %v", k, got, err)
		}
	}
	for _, s := range []string{"", "SECP256K1", "rsa", "message ", "Message", "transaction", "typed_data"} {
		if _, err := record.ParseAlgorithm(s); !errors.Is(err, record.ErrUnknown) {
			t.Errorf("ParseAlgorithm(%q): %v", s, err)
		}
		if _, err := record.ParseKind(s); !errors.Is(err, record.ErrUnknown) {
			t.Errorf("ParseKind(%q): %v", s, err)
		}
	}
}

func TestSignatureLengths(t *testing.T) {
	t.Parallel()
	want := map[record.Algorithm]int{record.Secp256k1: 65, record.Ed25519: 64, record.P256: 64, record.RSA2048: 256, "": 0, "dsa": 0}
	got := make(map[record.Algorithm]int)
	for a := range want {
		got[a] = a.SignatureLen()
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
