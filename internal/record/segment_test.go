package record_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/keyhold/keyhold/internal/record"
)

func manyRecords(n, payloadLen int) []record.Record {
	rs := make([]record.Record, n)
	for i := range rs {
		rs[i] = record.Record{Payload: bytes.Repeat([]byte{byte(i)}, payloadLen)}
	}
	return rs
}

func TestPayloadSegmentsComeBackAsTheyWere(t *testing.T) {
	t.Parallel()
	for name, rs := range map[string][]record.Record{
		"one empty record":  {{}},
		"with and without":  {{ID: "a", Payload: []byte("x")}, {Payload: []byte("y")}, {ID: "b"}},
		"longest id":        {{ID: strings.Repeat("i", record.MaxIDLen), Payload: []byte{0}}},
		"longest payload":   {{ID: "p", Payload: make([]byte, record.MaxPayloadLen)}},
		"largest batch":     manyRecords(record.MaxBatchSize, 60),
		"lengths 127 and 8": {{Payload: make([]byte, 127)}, {Payload: make([]byte, 128)}, {Payload: make([]byte, 16384)}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := record.EncodePayload(rs)
			got, err := record.DecodePayload(b)
			if err != nil {
				t.Fatalf("DecodePayload: %v", err)
			}
			same := func(a, b record.Record) bool { return a.ID == b.ID && slices.Equal(a.Payload, b.Payload) }
			if !slices.EqualFunc(rs, got, same) { // cmp alone takes a second for the largest batch
				t.Error(cmp.Diff(rs, got, cmpopts.EquateEmpty()))
			}
		})
	}
}

// The formats are stored for good: these bytes must never read otherwise.
func TestSegmentsHaveTheseBytes(t *testing.T) {
	t.Parallel()
	payload := record.EncodePayload([]record.Record{{ID: "ab", Payload: []byte{0xee}}, {Payload: make([]byte, 200)}})
	wantPayload := "01" + "02" + "02" + "6162" + "01" + "ee" + "00" + "c801" + strings.Repeat("00", 200)
	if diff := cmp.Diff(wantPayload, hex.EncodeToString(payload)); diff != "" {
		t.Errorf("payload: %s", diff)
	}
	result := record.EncodeResult(2, []record.Outcome{{Signature: []byte{1, 2}}, {Refusal: "no"}, {Signature: []byte{3, 4}}})
	if diff := cmp.Diff("01"+"03"+"02"+"01"+"01"+"02"+"6e6f"+"0102"+"0304", hex.EncodeToString(result)); diff != "" {
		t.Errorf("result: %s", diff)
	}
}

func TestMalformedPayloadSegmentsAreRefused(t *testing.T) {
	t.Parallel()
	good := record.EncodePayload([]record.Record{{ID: "a", Payload: []byte("x")}})
	for name, b := range map[string][]byte{
		"nothing":            nil,
		"version only":       {1},
		"other version":      append([]byte{2}, good[1:]...),
		"no records":         {1, 0},
		"too many records":   record.EncodePayload(manyRecords(record.MaxBatchSize+1, 1)),
		"longer varint":      {1, 0x81, 0x00, 1, 'a', 1, 'x'},
		"endless varint":     append([]byte{1}, bytes.Repeat([]byte{0xff}, 12)...),
		"trailing byte":      append(bytes.Clone(good), 0),
		"cut off":            good[:len(good)-1],
		"id too long":        record.EncodePayload([]record.Record{{ID: strings.Repeat("a", record.MaxIDLen+1)}}),
		"payload too long":   record.EncodePayload([]record.Record{{Payload: make([]byte, record.MaxPayloadLen+1)}}),
		"segment too long":   record.EncodePayload(manyRecords(6, record.MaxPayloadLen)),
		"id with a space":    record.EncodePayload([]record.Record{{ID: "a b"}}),
		"id of another kind": record.EncodePayload([]record.Record{{ID: "i-b0000001.3"}}),
	} {
		if rs, err := record.DecodePayload(b); !errors.Is(err, record.ErrSegment) || rs != nil {
			t.Errorf("%s: got %d records, %v", name, len(rs), err)
		}
	}
}

func TestResultSegmentsComeBackAsTheyWere(t *testing.T) {
	t.Parallel()
	sig := func(n int, b byte) []byte { return bytes.Repeat([]byte{b}, n) }
	many := make([]record.Outcome, record.MaxBatchSize)
	for i := range many {
		many[i] = record.Outcome{Signature: sig(65, byte(i))}
		if i%7 == 0 {
			many[i] = record.Outcome{Refusal: "digest_length"}
		}
	}
	for name, tt := range map[string]struct {
		sigLen int
		out    []record.Outcome
	}{
		"one signature": {65, []record.Outcome{{Signature: sig(65, 1)}}},
		"one refusal":   {65, []record.Outcome{{Refusal: "digest_length"}}},
		"mixed":         {256, []record.Outcome{{Refusal: "x"}, {Signature: sig(256, 2)}, {Refusal: "y"}, {Signature: sig(256, 3)}}},
		"largest batch": {65, many},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n, got, err := record.DecodeResult(record.EncodeResult(tt.sigLen, tt.out))
			if err != nil || n != tt.sigLen {
				t.Fatalf("DecodeResult: %d, %v", n, err)
			}
			same := func(a, b record.Outcome) bool {
				return a.Refusal == b.Refusal && slices.Equal(a.Signature, b.Signature)
			}
			if !slices.EqualFunc(tt.out, got, same) {
				t.Error(cmp.Diff(tt.out, got))
			}
		})
	}
}

func TestTheLargestBatchOfEthereumSignaturesFitsASegment(t *testing.T) {
	t.Parallel()
	out := make([]record.Outcome, record.MaxBatchSize)
	for i := range out {
		out[i].Signature = make([]byte, record.Secp256k1.SignatureLen())
	}
	if n := len(record.EncodeResult(65, out)); n > record.MaxSegmentLen {
		t.Errorf("%d bytes, more than %d", n, record.MaxSegmentLen)
	}
}

func TestMalformedResultSegmentsAreRefused(t *testing.T) {
	t.Parallel()
	for name, b := range map[string][]byte{
		"nothing":                   nil,
		"other version":             {2, 1, 1, 0, 9},
		"no records":                {1, 0, 1, 0},
		"no signature length":       {1, 1, 0, 0},
		"signature length over 512": {1, 1, 0x81, 0x04, 0},
		"more refused than records": {1, 1, 1, 2, 0, 1, 'x', 0, 1, 'x'},
		"index out of range":        {1, 1, 1, 1, 1, 1, 'x'},
		"index twice":               {1, 2, 1, 2, 0, 1, 'x', 0, 1, 'x'},
		"indexes descending":        {1, 2, 1, 2, 1, 1, 'x', 0, 1, 'x'},
		"empty code":                {1, 1, 1, 1, 0, 0},
		"code too long":             append([]byte{1, 1, 1, 1, 0, 65}, bytes.Repeat([]byte{'x'}, 65)...),
		"signature cut off":         {1, 1, 2, 0, 9},
		"trailing byte":             {1, 1, 1, 0, 9, 9},
		"signature of a refused":    {1, 1, 1, 1, 0, 1, 'x', 9},
		"longer varint":             {1, 0x81, 0x00, 1, 0, 9},
	} {
		if n, out, err := record.DecodeResult(b); !errors.Is(err, record.ErrSegment) || n != 0 || out != nil {
			t.Errorf("%s: got %d, %d outcomes, %v", name, n, len(out), err)
		}
	}
}

func TestASignatureOfAnotherLengthPanics(t *testing.T) {
	t.Parallel()
	defer func() {
		if recover() == nil {
			t.Error("EncodeResult took a signature of another length")
		}
	}()
	record.EncodeResult(65, []record.Outcome{{Signature: make([]byte, 64)}})
}

func FuzzDecodePayloadTakesOnlyWhatEncodeGives(f *testing.F) {
	f.Add(record.EncodePayload([]record.Record{{ID: "a", Payload: []byte("x")}, {Payload: make([]byte, 200)}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		rs, err := record.DecodePayload(b)
		if err != nil {
			if !errors.Is(err, record.ErrSegment) {
				t.Errorf("got %v, want ErrSegment", err)
			}
			return
		}
		if !slices.Equal(record.EncodePayload(rs), b) {
			t.Error("encodes to other bytes")
		}
	})
}

func FuzzDecodeResultTakesOnlyWhatEncodeGives(f *testing.F) {
	f.Add(record.EncodeResult(4, []record.Outcome{{Signature: []byte("abcd")}, {Refusal: "digest_length"}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		n, out, err := record.DecodeResult(b)
		if err != nil {
			if !errors.Is(err, record.ErrSegment) {
				t.Errorf("got %v, want ErrSegment", err)
			}
			return
		}
		if !slices.Equal(record.EncodeResult(n, out), b) {
			t.Error("encodes to other bytes")
		}
	})
}
