package canonical_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"testing"

	"github.com/keyhold/keyhold/internal/canonical"
)

type pair struct {
	A uint64 `cbor:"a"`
	B []byte `cbor:"b"`
}

func TestOnlyTheOneEncodingIsRead(t *testing.T) {
	t.Parallel()
	const good = "a2616101616241ff" // {"a": 1, "b": h'ff'}
	if got := hex.EncodeToString(canonical.Encode(&pair{1, []byte{0xff}})); got != good {
		t.Fatalf("encoded as %s", got)
	}
	for _, tc := range []struct{ name, in string }{
		{"empty", ""},
		{"trailing byte", good + "00"},
		{"cut off", good[:len(good)-2]},
		{"keys in another order", "a2616241ff616101"},
		{"a key twice", "a3616101616101616241ff"},
		{"an unknown key", "a3616101616241ff616300"},
		{"a key missing", "a1616101"},
		{"a key in another case", "a2614101616241ff"},
		{"a longer number", "a261611801616241ff"},
		{"an indefinite map", "bf616101616241ffff"},
		{"an indefinite byte string", "a261610161625f41ffff"},
		{"a tag", "c0" + good},
		{"a tag inside", "a26161c001616241ff"},
		{"a float", "a26161f93c00616241ff"},
		{"a text for bytes", "a26161016162617a"},
		{"an array", "820141ff"},
	} {
		b, err := hex.DecodeString(tc.in)
		if err != nil {
			t.Fatal(err)
		}
		if err := canonical.Decode(b, &pair{}); !errors.Is(err, canonical.ErrForm) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(canonical.Encode(&pair{1, []byte{0xff}}))
	f.Add([]byte{0xa0})
	f.Fuzz(func(t *testing.T, b []byte) {
		var p pair
		if canonical.Decode(b, &p) == nil && !bytes.Equal(canonical.Encode(&p), b) { //nolint:forbidigo // public bytes
			t.Fatalf("%x was read and is written as %x", b, canonical.Encode(&p))
		}
	})
}
