package wire_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

// bodies holds every body with no field left at zero, so that no field can be
// forgotten in the encoding.
func bodies() []any {
	ticket := wire.Ticket(bytes.Repeat([]byte{7}, wire.TicketLen))
	key, boot, b := record.KeyID{1}, record.BootID{2}, []byte{3}
	return []any{
		&wire.Hello{},
		&wire.HelloReply{BootID: boot, Lane: 1, State: wire.StateReady, ConfigHash: b, Document: b, Statement: b, Ticket: ticket},
		&wire.Configure{Config: b},
		&wire.ConfigureReply{Already: true, PCR16: b},
		&wire.CreateKeyring{},
		&wire.CreateKeyringReply{Header: b, Document: b, Statement: b},
		&wire.Load{Header: b, Keys: [][]byte{b, b}},
		&wire.LoadReply{Already: true, Loaded: 1, Total: 2, Refused: []uint32{3}, Document: b, Statement: b},
		&wire.AddKeys{Algorithm: record.Ed25519, Policy: "all", Count: 1, Ack: 2},
		&wire.AddKeysReply{Keys: [][]byte{b}, Receipt: b},
		&wire.GetTicket{},
		&wire.TicketReply{Ticket: ticket},
		&wire.Sign{
			Ticket: ticket, BatchID: "i-b0000001", ImportID: "i", BatchFence: 1, KeyID: key, KeyFence: 2, LeaseMS: 10_000,
			Kind: record.Message, Payload: b, Refuse: []uint32{4}, Alone: true, Probe: wire.NoProbe, Ack: 5,
		},
		&wire.SignReply{Result: b, Receipt: b, Ticket: ticket},
		&wire.Cancel{KeyID: key, KeyFence: 1},
		&wire.Fence{KeyID: key, Fence: 1},
		&wire.FenceReply{Ticket: ticket},
		&wire.Receipts{Ack: []wire.LaneSeq{{Lane: 1, Seq: 2}}},
		&wire.ReceiptsReply{Receipts: [][]byte{b}, Ticket: ticket},
		&wire.Attest{Nonce: b},
		&wire.AttestReply{Document: b, Heads: b},
		&wire.GetStatus{After: 1, Lines: 2},
		&wire.StatusReply{
			State: wire.StateReady, Keys: 1, Signed: 2, Refused: 3, Batches: 4, Panics: 5, Connections: 6, Lanes: 7, UptimeMS: 8, TimeMS: 9, Proofs: 13, ProvedMS: 14,
			RecordRefusals: []wire.CodeCount{{Code: "payload_invalid", Count: 1}}, RequestRefusals: []wire.CodeCount{{Code: "deadline", Count: 2}}, HeapBytes: 10,
			Lines:  []wire.LogLine{{Seq: 11, UptimeMS: 12, Level: "INFO", Event: "config measured", Attrs: []wire.LogAttr{{Key: "keyring", Value: "main"}}}},
			Newest: 13, Dropped: 14,
		},
		&wire.Error{Code: "busy", Text: "text", Ticket: ticket},
	}
}

func encode(tb testing.TB, id uint64, t wire.Type, body any) []byte {
	tb.Helper()
	b, err := wire.Encode(id, t, body)
	if err != nil {
		tb.Fatalf("Encode %T: %v", body, err)
	}
	return b
}

func blank(body any) any { return reflect.New(reflect.TypeOf(body).Elem()).Interface() }

func TestEveryMessageComesBackAsItWas(t *testing.T) {
	t.Parallel()
	for i, body := range bodies() {
		b := encode(t, uint64(i), "type", body)
		m, err := wire.Decode(b)
		if err != nil {
			t.Errorf("%T: %v", body, err)
			continue
		}
		if m.V != wire.Version || m.ID != uint64(i) || m.Type != "type" {
			t.Errorf("%T came in message %d, %d, %s", body, m.V, m.ID, m.Type)
		}
		got := blank(body)
		if err := wire.DecodeBody(m, got); err != nil {
			t.Errorf("%T: %v", body, err)
		}
		if diff := cmp.Diff(body, got); diff != "" {
			t.Errorf("%T: %s", body, diff)
		}
	}
}

func TestTheTestsBodiesLeaveNoFieldAtZero(t *testing.T) {
	t.Parallel()
	for _, body := range bodies() {
		v := reflect.ValueOf(body).Elem()
		for i := range v.NumField() {
			if v.Field(i).IsZero() {
				t.Errorf("%T.%s", body, v.Type().Field(i).Name)
			}
		}
	}
}

// The protocol is spoken between releases: these bytes must not change.
func TestAMessageHasTheseBytes(t *testing.T) {
	t.Parallel()
	want := "a4" + "6176" + "01" + "626964" + "07" +
		"64" + hex.EncodeToString([]byte("body")) + "a1" + "65" + hex.EncodeToString([]byte("nonce")) + "42abcd" +
		"64" + hex.EncodeToString([]byte("type")) + "66" + hex.EncodeToString([]byte("attest"))
	if diff := cmp.Diff(want, hex.EncodeToString(encode(t, 7, wire.TypeAttest, &wire.Attest{Nonce: []byte{0xab, 0xcd}}))); diff != "" {
		t.Error(diff)
	}
}

// message builds the CBOR of a message by hand, fields in the given order.
func message(fields ...[]byte) []byte {
	return append([]byte{0xa0 + byte(len(fields))}, bytes.Join(fields, nil)...)
}

func TestOtherEncodingsOfAMessageAreRefused(t *testing.T) {
	t.Parallel()
	v, id, body, typ := []byte("\x61v\x01"), []byte("\x62id\x07"), []byte("\x64body\xa0"), []byte("\x64type\x65hello")
	good := message(v, id, body, typ)
	if diff := cmp.Diff(encode(t, 7, wire.TypeHello, &wire.Hello{}), good); diff != "" {
		t.Fatalf("the test's own encoding is not canonical: %s", diff)
	}
	for name, tt := range map[string]struct {
		b    []byte
		want refusal.Code
	}{
		"nothing":         {nil, refusal.BadMessage},
		"null":            {[]byte{0xf6}, refusal.BadMessage},
		"a list":          {[]byte{0x80}, refusal.BadMessage},
		"no fields":       {message(), refusal.BadMessage},
		"version 0":       {message([]byte("\x61v\x00"), id, body, typ), refusal.BadVersion},
		"version 2":       {message([]byte("\x61v\x02"), id, body, typ), refusal.BadVersion},
		"version 256":     {message([]byte("\x61v\x19\x01\x00"), id, body, typ), refusal.BadMessage},
		"no version":      {message(id, body, typ), refusal.BadMessage},
		"no id":           {message(v, body, typ), refusal.BadMessage},
		"no body":         {message(v, id, typ), refusal.BadMessage},
		"no type":         {message(v, id, body), refusal.BadMessage},
		"unknown field":   {message(v, id, body, typ, []byte("\x65extra\x01")), refusal.BadMessage},
		"doubled field":   {message(v, id, id, body, typ), refusal.BadMessage},
		"doubled version": {message(v, []byte("\x61v\x02"), id, body, typ), refusal.BadMessage},
		"other order":     {message(id, v, body, typ), refusal.BadMessage},
		"other capitals":  {message(v, []byte("\x62ID\x07"), body, typ), refusal.BadMessage},
		"longer number":   {message(v, []byte("\x62id\x18\x07"), body, typ), refusal.BadMessage},
		"float number":    {message(v, []byte("\x62id\xf9\x47\x00"), body, typ), refusal.BadMessage},
		"negative id":     {message(v, []byte("\x62id\x20"), body, typ), refusal.BadMessage},
		"bytes as type":   {message(v, id, body, []byte("\x64type\x45hello")), refusal.BadMessage},
		"bad UTF-8":       {message(v, id, body, []byte("\x64type\x65hel\xffo")), refusal.BadMessage},
		"tagged":          {append([]byte{0xc1}, good...), refusal.BadMessage},
		"trailing byte":   {append(bytes.Clone(good), 0), refusal.BadMessage},
		"a second one":    {append(bytes.Clone(good), good...), refusal.BadMessage},
		"indefinite":      {append(append([]byte{0xbf}, good[1:]...), 0xff), refusal.BadMessage},
		"too deep":        {message(v, id, append([]byte("\x64body"), append(bytes.Repeat([]byte{0x81}, 20), 0)...), typ), refusal.BadMessage},
		"broken body":     {message(v, id, []byte("\x64body\x5a\xff\xff\xff\xff"), typ), refusal.BadMessage},
	} {
		if _, err := wire.Decode(tt.b); !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, want %s", name, err, tt.want)
		}
	}
	for n := range good {
		if _, err := wire.Decode(good[:n]); !errors.Is(err, refusal.BadMessage) {
			t.Errorf("cut off after %d bytes: got %v", n, err)
		}
	}
}

func TestOtherEncodingsOfABodyAreRefused(t *testing.T) {
	t.Parallel()
	good := []byte("\xa1\x65nonce\x42\xab\xcd")
	for name, b := range map[string][]byte{
		"nothing":          nil,
		"null":             {0xf6},
		"no fields":        {0xa0},
		"unknown field":    []byte("\xa2\x61x\x01\x65nonce\x42\xab\xcd"),
		"doubled field":    []byte("\xa2\x65nonce\x42\xab\xcd\x65nonce\x42\xab\xcd"),
		"other capitals":   []byte("\xa1\x65Nonce\x42\xab\xcd"),
		"longer length":    []byte("\xa1\x65nonce\x58\x02\xab\xcd"),
		"text":             []byte("\xa1\x65nonce\x62ab"),
		"list of numbers":  []byte("\xa1\x65nonce\x82\x01\x02"),
		"indefinite bytes": []byte("\xa1\x65nonce\x5f\x42\xab\xcd\xff"),
		"trailing byte":    append(bytes.Clone(good), 0),
		"another body":     []byte("\xa1\x66config\x42\xab\xcd"),
	} {
		var got wire.Attest
		if err := wire.DecodeBody(&wire.Message{Body: b}, &got); !errors.Is(err, refusal.BadMessage) {
			t.Errorf("%s: got %v, want bad_message", name, err)
		}
	}
	var got wire.Attest
	if err := wire.DecodeBody(&wire.Message{Body: good}, &got); err != nil || string(got.Nonce) != "\xab\xcd" {
		t.Errorf("the canonical body: %+v, %v", got, err)
	}
}

func TestABodyIsNotReadAsAnother(t *testing.T) {
	t.Parallel()
	all := bodies()
	for _, body := range all {
		m, err := wire.Decode(encode(t, 1, "type", body))
		if err != nil {
			t.Fatalf("Decode: %v", err)
		}
		for _, other := range all {
			same := fields(other) == fields(body)
			if err := wire.DecodeBody(m, blank(other)); (err == nil) != same {
				t.Errorf("%T read as %T: %v", body, other, err)
			}
		}
	}
}

// fields names what a body holds: bodies of the same fields are one on the wire,
// and the type of the message tells them apart.
func fields(body any) string {
	var b strings.Builder
	v := reflect.TypeOf(body).Elem()
	for i := range v.NumField() {
		fmt.Fprint(&b, v.Field(i).Tag.Get("cbor"), v.Field(i).Type.Kind(), ",")
	}
	return b.String()
}

func TestAMessageThatFitsNoFrameIsNotEncoded(t *testing.T) {
	t.Parallel()
	if _, err := wire.Encode(1, wire.TypeSign, &wire.Sign{Payload: make([]byte, wire.MaxFrame)}); !errors.Is(err, refusal.TooLarge) {
		t.Errorf("got %v, want too_large", err)
	}
}

// What the enclave answers at most must fit: the largest segments and what
// surrounds them.
func TestTheLargestMessagesFitAFrame(t *testing.T) {
	t.Parallel()
	keys := make([][]byte, wire.MaxLoadKeys)
	for i := range keys {
		keys[i] = make([]byte, 1900) // an RSA entry with the longest names has 1860
	}
	for _, body := range []any{
		&wire.Sign{Payload: make([]byte, record.MaxSegmentLen), Refuse: make([]uint32, record.MaxBatchSize)},
		&wire.SignReply{Result: make([]byte, record.MaxSegmentLen), Receipt: make([]byte, 4096)},
		&wire.Load{Header: make([]byte, 8<<10), Keys: keys},
		&wire.AddKeysReply{Keys: keys[:wire.MaxAddKeys], Receipt: make([]byte, 4096)},
	} {
		if _, err := wire.Encode(1<<63, wire.TypeSign, body); err != nil {
			t.Errorf("%T: %v", body, err)
		}
	}
}

func TestFramesComeBackAsTheyWere(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	sizes := []int{1, 2, 255, 65_536, wire.MaxFrame}
	for _, n := range sizes {
		if err := wire.WriteFrame(&b, bytes.Repeat([]byte{byte(n)}, n)); err != nil {
			t.Fatalf("WriteFrame: %v", err)
		}
	}
	r := iotest.HalfReader(&b) // a connection gives what has come, not what was asked for
	for _, n := range sizes {
		got, err := wire.ReadFrame(r)
		if err != nil || !slices.Equal(got, bytes.Repeat([]byte{byte(n)}, n)) {
			t.Errorf("frame of %d bytes: %d bytes, %v", n, len(got), err)
		}
	}
	if _, err := wire.ReadFrame(r); err != io.EOF { //nolint:errorlint // exactly EOF is promised
		t.Errorf("after the last frame: %v, want EOF", err)
	}
}

func TestBadFramesAreRefused(t *testing.T) {
	t.Parallel()
	for name, b := range map[string][]byte{
		"empty":            {0, 0, 0, 0},
		"one over":         {0, 0x10, 0, 1},
		"longest length":   {0xff, 0xff, 0xff, 0xff},
		"cut in the head":  {0, 0, 0},
		"cut after head":   {0, 0, 0, 5},
		"cut in the frame": {0, 0, 0, 5, 1, 2, 3, 4},
	} {
		if got, err := wire.ReadFrame(bytes.NewReader(b)); !errors.Is(err, refusal.BadFrame) || got != nil {
			t.Errorf("%s: got %d bytes, %v; want bad_frame", name, len(got), err)
		}
	}
	for _, n := range []int{0, wire.MaxFrame + 1} {
		var b bytes.Buffer
		if err := wire.WriteFrame(&b, make([]byte, n)); !errors.Is(err, refusal.BadFrame) || b.Len() != 0 {
			t.Errorf("WriteFrame of %d bytes wrote %d: %v", n, b.Len(), err)
		}
	}
}

// A length that lies must not cost memory.
func TestTheLengthIsCheckedBeforeAnythingIsAllocated(t *testing.T) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 100 {
		if _, err := wire.ReadFrame(bytes.NewReader([]byte{0x7f, 0xff, 0xff, 0xff})); err == nil {
			t.Fatal("accepted")
		}
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > wire.MaxFrame {
		t.Errorf("%d bytes for 100 lengths of 2 GiB", n)
	}
}

func TestAnErrorOfTheConnectionIsNotABadFrame(t *testing.T) {
	t.Parallel()
	reset := errors.New("connection reset")
	for name, r := range map[string]io.Reader{
		"in the head":  iotest.ErrReader(reset),
		"in the frame": io.MultiReader(bytes.NewReader([]byte{0, 0, 0, 5, 1}), iotest.ErrReader(reset)),
	} {
		if _, err := wire.ReadFrame(r); !errors.Is(err, reset) || errors.Is(err, refusal.BadFrame) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if err := wire.WriteFrame(failing{reset}, []byte{1}); !errors.Is(err, reset) {
		t.Errorf("WriteFrame: got %v", err)
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

// counting counts writes: a frame in two of them costs two packets.
type counting struct{ writes int }

func (c *counting) Write(b []byte) (int, error) { c.writes++; return len(b), nil }

func TestAFrameIsOneWrite(t *testing.T) {
	t.Parallel()
	var c counting
	if err := wire.WriteFrame(&c, make([]byte, 100_000)); err != nil || c.writes != 1 {
		t.Errorf("%d writes, %v", c.writes, err)
	}
}

func FuzzReadFrame(f *testing.F) {
	f.Add([]byte{0, 0, 0, 2, 7, 8})
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := wire.ReadFrame(bytes.NewReader(b))
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, refusal.BadFrame) {
				t.Errorf("got %v", err)
			}
			return
		}
		var again bytes.Buffer
		if err := wire.WriteFrame(&again, got); err != nil || !bytes.HasPrefix(b, again.Bytes()) {
			t.Errorf("writes another frame: %v", err)
		}
	})
}

func FuzzDecodeTakesOnlyWhatEncodeGives(f *testing.F) {
	for _, body := range bodies() {
		f.Add(encode(f, 1, wire.TypeSign, body))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := wire.Decode(b)
		if err != nil {
			if !errors.Is(err, refusal.BadMessage) && !errors.Is(err, refusal.BadVersion) {
				t.Errorf("got %v", err)
			}
			return
		}
		if again, err := wire.Encode(m.ID, m.Type, m.Body); err != nil || !slices.Equal(again, b) {
			t.Errorf("encodes to other bytes: %v", err)
		}
	})
}

func FuzzDecodeBodyTakesOnlyWhatEncodeGives(f *testing.F) {
	for _, body := range bodies() {
		m, err := wire.Decode(encode(f, 1, wire.TypeSign, body))
		if err != nil {
			f.Fatalf("Decode: %v", err)
		}
		f.Add([]byte(m.Body))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, body := range bodies() {
			got := blank(body)
			err := wire.DecodeBody(&wire.Message{Body: cbor.RawMessage(b)}, got)
			if err != nil {
				if !errors.Is(err, refusal.BadMessage) {
					t.Errorf("%T: got %v", body, err)
				}
				continue
			}
			m, err := wire.Decode(encode(t, 1, wire.TypeSign, got))
			if err != nil || !slices.Equal([]byte(m.Body), b) {
				t.Errorf("%T encodes to other bytes: %v", body, err)
			}
		}
	})
}
