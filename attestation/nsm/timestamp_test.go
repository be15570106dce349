package nsm_test

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/keyhold/keyhold/attestation/nsm"
)

func encode(t testing.TB, v any) []byte {
	t.Helper()
	out, err := cbor.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func document(t testing.TB, payload []byte) []byte {
	t.Helper()
	return encode(t, []any{[]byte{0xa1, 0x01, 0x38, 0x22}, map[int]int{}, payload, make([]byte, 96)})
}

func TestTimestampIsReadToTheMillisecond(t *testing.T) {
	want := time.Date(2026, 5, 1, 12, 34, 56, 789e6, time.UTC)
	pairs := append([]byte{0xbf}, encode(t, "timestamp")...)
	pairs = append(append(pairs, encode(t, want.UnixMilli())...), 0xff)
	plain := document(t, encode(t, map[string]any{"timestamp": want.UnixMilli(), "module_id": "i-1-enc1", "pcrs": map[int][]byte{0: nil}}))
	for name, doc := range map[string][]byte{
		"plain":             plain,
		"tag 18":            append([]byte{0xd2}, plain...),
		"indefinite length": document(t, pairs),
	} {
		got, err := nsm.Timestamp(doc)
		if err != nil || !got.Equal(want) || got.Location() != time.UTC {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func TestTimestampRefusesWhatIsNoDocument(t *testing.T) {
	payload := func(v any) []byte { return document(t, encode(t, v)) }
	good := payload(map[string]any{"timestamp": 1})
	twice := append([]byte{0xa2}, bytes.Repeat(append(encode(t, "timestamp"), 1), 2)...)
	for name, doc := range map[string][]byte{
		"nothing":               nil,
		"a bare tag":            {0xd2},
		"null":                  {0xf6},
		"too long":              append(bytes.Clone(good), make([]byte, 16<<10)...),
		"a trailing byte":       append(bytes.Clone(good), 0),
		"another tag":           append([]byte{0xd1}, good...),
		"an array of three":     encode(t, []any{[]byte{}, map[int]int{}, []byte{}}),
		"an empty payload":      document(t, []byte{}),
		"a null payload":        document(t, []byte{0xf6}),
		"no timestamp":          payload(map[string]any{"module_id": "x"}),
		"TIMESTAMP":             payload(map[string]any{"TIMESTAMP": 1}),
		"a null timestamp":      payload(map[string]any{"timestamp": nil}),
		"a zero timestamp":      payload(map[string]any{"timestamp": 0}),
		"a negative timestamp":  payload(map[string]any{"timestamp": -1}),
		"a timestamp as text":   payload(map[string]any{"timestamp": "1"}),
		"a timestamp of 2^64-1": payload(map[string]any{"timestamp": ^uint64(0)}),
		"two timestamps":        document(t, twice),
	} {
		if got, err := nsm.Timestamp(doc); !errors.Is(err, nsm.ErrDocument) || !got.IsZero() {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func FuzzTimestamp(f *testing.F) {
	f.Add(document(f, encode(f, map[string]any{"timestamp": 1723012992231})))
	f.Add([]byte{0xd2, 0x84})
	f.Fuzz(func(t *testing.T, doc []byte) {
		got, err := nsm.Timestamp(doc)
		if (err == nil) == got.IsZero() {
			t.Errorf("time %v with error %v", got, err)
		}
		if err == nil && got.UnixMilli() < 1 {
			t.Errorf("time %v", got)
		}
	})
}
