package archtest_test

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/internal/canonical"
	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/eif/cpio"
	"github.com/keyhold/keyhold/internal/payload"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/intake"
)

// marker is planted in every input. Letters and digits only, so that it fits wherever a name does.
const marker = "Marker7f3aPlanted0InEveryInput00"

// A parser reads what a peer, a table or an operator's file holds. Error texts go to logs, terminals and
// peers, so none of them may repeat a part of the input: it can be a payload.
type parser struct {
	name  string
	valid []byte // holds the marker
	read  func([]byte) error
}

func parsers() []parser {
	planted := []byte(marker)
	segment := record.EncodePayload([]record.Record{{ID: marker, Payload: planted}, {Payload: planted}})
	sign := &wire.Sign{
		BatchID: marker + ".1", ImportID: marker, LeaseMS: 1, Kind: record.Message, Payload: segment, Refuse: []uint32{0}, Probe: wire.NoProbe,
	}
	message, err := wire.Encode(1, wire.TypeSign, sign)
	if err != nil {
		panic(err)
	}
	var frame bytes.Buffer
	if err := wire.WriteFrame(&frame, planted); err != nil {
		panic(err)
	}
	public := sealed.Public{
		Version: 1, Keyring: marker, Algorithm: record.Ed25519, PublicKey: planted, KeyID: sealed.KeyID(record.Ed25519, planted), Policy: marker,
	}
	enclaveImage, err := eif.Image{
		Arch: eif.AMD64, DefaultMemory: 1, DefaultCPUs: 1, Kernel: planted, Cmdline: marker, Metadata: planted, Ramdisks: [][]byte{planted},
	}.Encode()
	if err != nil {
		panic(err)
	}
	var archive bytes.Buffer
	if err := cpio.Write(&archive, []cpio.File{{Name: marker, Mode: cpio.Regular | 0o644, Data: planted}}); err != nil {
		panic(err)
	}
	return []parser{
		{"eif.Parse", enclaveImage, func(b []byte) error {
			m, err := eif.Parse(b)
			if err != nil {
				return err
			}
			_, err = m.Describe() // its metadata are no JSON
			return err
		}},
		{"cpio.Read", archive.Bytes(), func(b []byte) error { _, err := cpio.Read(b); return err }},
		{"wire.ReadFrame", frame.Bytes(), func(b []byte) error { _, err := wire.ReadFrame(bytes.NewReader(b)); return err }},
		{"wire.DecodeBody", message, func(b []byte) error {
			m, err := wire.Decode(b)
			if err != nil {
				return err
			}
			return wire.DecodeBody(m, new(wire.Sign))
		}},
		{"record.DecodePayload", segment, func(b []byte) error { _, err := record.DecodePayload(b); return err }},
		{"record.DecodeResult", record.EncodeResult(len(planted), []record.Outcome{{Refusal: marker}, {Signature: planted}}), func(b []byte) error {
			_, _, err := record.DecodeResult(b)
			return err
		}},
		{"sealed.DecodeHeader", sealed.EncodeHeader(&sealed.Header{Version: 1, Keyring: marker, Epoch: 1, KMSKeyARN: marker, WrappedDEK: planted}), func(b []byte) error {
			_, err := sealed.DecodeHeader(b)
			return err
		}},
		{"sealed.DecodeEntry", sealed.EncodeEntry(&sealed.Entry{Public: public, Nonce: planted[:sealed.NonceLen], Ciphertext: planted}), func(b []byte) error {
			_, err := sealed.DecodeEntry(b)
			return err
		}},
		{"receipt.Decode", receipt.Encode(&receipt.Receipt{Domain: receipt.ReceiptDomain, Version: 1, ImportID: marker, PublicKey: planted}), func(b []byte) error {
			_, err := receipt.Decode[receipt.Receipt](b)
			return err
		}},
		{"receipt.Decode signed", receipt.Encode(&receipt.Signed{Body: planted, Signature: planted}), func(b []byte) error {
			_, err := receipt.Decode[receipt.Signed](b)
			return err
		}},
		{"attestation.Parse", append([]byte{0xd2, 0x84, 0x44, 0xa1, 0x01, 0x38, 0x22, 0xa0, 0x58, byte(len(planted))}, planted...), func(b []byte) error {
			_, err := attestation.Parse(b)
			return err
		}},
		{"canonical.Decode", canonical.Encode(&wire.SignReply{Result: planted, Receipt: planted}), func(b []byte) error { return canonical.Decode(b, new(wire.SignReply)) }},
		{"intake.ParseLine text", fmt.Appendf(nil, `{"id":%q,"text":%q}`, marker, marker), parseLine},
		{"intake.ParseLine payload", fmt.Appendf(nil, `{"id":%q,"payload":%q}`, marker, base64.StdEncoding.EncodeToString(planted)), parseLine},
		{"intake.ParseLine unknown key", fmt.Appendf(nil, `{%q:"1"}`, marker), parseLine},
		{"names", planted, func(b []byte) error {
			_, kind := record.ParseKind(string(b))
			_, algorithm := record.ParseAlgorithm(string(b))
			_, key := record.ParseKeyID(string(b))
			_, boot := record.ParseBootID(string(b))
			return errors.Join(kind, algorithm, key, boot, record.CheckID(string(b)+" "))
		}},
		{"payload.Verify", planted, func(b []byte) error {
			var all []error
			for _, a := range record.Algorithms() {
				_, digest := payload.Digest(a, record.Digest, b[:len(b)/2])
				all = append(all, digest, payload.Verify(a, b, record.Message, b, b))
			}
			return errors.Join(all...)
		}},
	}
}

func parseLine(b []byte) error {
	_, err := intake.ParseLine(b, record.Message)
	return err
}

func TestNoErrorTextRepeatsItsInput(t *testing.T) {
	for _, p := range parsers() {
		t.Run(p.name, func(t *testing.T) {
			refused := 0
			for input := range damaged(p.valid) {
				err := p.read([]byte(input))
				if err == nil {
					continue
				}
				refused++
				if part := repeated(err.Error()); part != "" {
					t.Fatalf("the error repeats %q: %q", part, err)
				}
			}
			if refused == 0 {
				t.Error("nothing was refused: there was no error to look at")
			}
			t.Logf("looked at %d errors", refused)
		})
	}
}

// What the search is for does happen: the standard library's errors repeat their input.
func TestTheSearchFindsAnInputHoweverItIsSpelled(t *testing.T) {
	dec := json.NewDecoder(strings.NewReader(`{"` + marker + `":1}`))
	dec.DisallowUnknownFields()
	unknown := dec.Decode(&struct{}{})
	for name, text := range map[string]string{
		"unknown field of encoding/json": unknown.Error(),
		"quoted":                         fmt.Sprintf("%q", marker),
		"cut":                            "..." + marker[9:20],
		"hex":                            fmt.Sprintf("%x", marker),
		"upper hex":                      fmt.Sprintf("%X", marker),
		"base64":                         base64.StdEncoding.EncodeToString([]byte("x" + marker)),
		"numbers":                        fmt.Sprintf("%d", []byte(marker)),
	} {
		if repeated(text) == "" {
			t.Errorf("%s: not found in %q", name, text)
		}
	}
	if part := repeated("the input is malformed"); part != "" {
		t.Errorf("found %q in a text without any of it", part)
	}
}

// damaged yields an input as it is, cut off at every offset, and with each byte changed in three ways.
func damaged(valid []byte) func(func(string) bool) {
	return func(yield func(string) bool) {
		if !yield(string(valid)) || !yield(string(valid)+marker) {
			return
		}
		for i := range valid {
			if !yield(string(valid[:i])) {
				return
			}
			for _, change := range []byte{0x01, 0x20, 0xff} {
				b := bytes.Clone(valid)
				b[i] ^= change
				if !yield(string(b)) {
					return
				}
			}
		}
	}
}

// repeated returns a part of the marker that text shows: 8 bytes of it in a row, as they are, in hex, in
// base64 or as numbers.
func repeated(text string) string {
	const window = 8
	for i := range len(marker) - window + 1 {
		part := []byte(marker[i : i+window])
		numbers := strings.Trim(fmt.Sprintf("%d", part), "[]")
		// Base64 of the part in each of the three places it can have; the characters that depend on its neighbours are cut off.
		spellings := []string{string(part), hex.EncodeToString(part), strings.ToUpper(hex.EncodeToString(part)), numbers}
		for shift := range 3 {
			code := base64.RawStdEncoding.EncodeToString(append(make([]byte, shift), part...))
			spellings = append(spellings, code[(shift*8+5)/6:len(code)-1])
		}
		for _, s := range spellings {
			if strings.Contains(text, s) {
				return s
			}
		}
	}
	return ""
}
