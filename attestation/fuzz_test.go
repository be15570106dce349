package attestation_test

import (
	"slices"
	"testing"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/attestation"
)

// reencode writes a parsed document in one canonical form.
func reencode(t *testing.T, d *attestation.Document) []byte {
	t.Helper()
	mode, err := cbor.CanonicalEncOptions().EncMode()
	if err != nil {
		t.Fatal(err)
	}
	payload, err := mode.Marshal(map[string]any{
		"module_id": d.ModuleID, "timestamp": d.Timestamp.UnixMilli(), "digest": d.Digest, "pcrs": d.PCRs,
		"public_key": d.PublicKey, "user_data": d.UserData, "nonce": d.Nonce,
		"certificate": d.Certificate, "cabundle": d.CABundle,
	})
	if err != nil {
		t.Fatal(err)
	}
	out, err := mode.Marshal([]any{protectedES384, map[int]int{}, payload, make([]byte, 96)})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// seeds adds documents of our own and, where present, real ones.
func seeds(f *testing.F) *forger {
	f.Helper()
	forger := newForger(f)
	f.Add(forger.document(forger.fields()))
	f.Add(append([]byte{0xd2}, forger.document(forger.with("pcrs", registers(32, 48, 7)))...))
	f.Add(forger.signed(forger.indefinitePairs(forger.with("user_data", make([]byte, 1024)))))
	for _, v := range readVectors(f) {
		f.Add(v.raw)
	}
	return forger
}

func FuzzParse(f *testing.F) {
	forger := seeds(f)
	fuzzForm(f, func(raw []byte) []byte { return raw }, forger.document(smallest(forger)))
}

// FuzzParsePayload reaches the fields without having to keep the envelope
// whole.
func FuzzParsePayload(f *testing.F) {
	forger := newForger(f)
	head := append(append([]byte{0x84, 0x44}, protectedES384...), 0xa0)
	tail := append([]byte{0x58, 0x60}, make([]byte, 96)...)
	wrap := func(payload []byte) []byte {
		length := []byte{0x5a, 0, byte(len(payload) >> 16), byte(len(payload) >> 8), byte(len(payload))}
		return slices.Concat(head, length, payload, tail)
	}
	fuzzForm(f, wrap, forger.pairs(smallest(forger)), forger.indefinitePairs(smallest(forger)))
}

// smallest has the shortest certificates that have the form of some.
func smallest(f *forger) []field {
	out := f.with("certificate", []byte{1})
	for i := range out {
		if out[i].name == "cabundle" {
			out[i].value = [][]byte{{1}}
		}
	}
	return out
}

// fuzzForm holds Parse to one canonical form of whatever it accepts.
func fuzzForm(f *testing.F, wrap func([]byte) []byte, small ...[]byte) {
	f.Helper()
	for _, s := range small {
		if _, err := attestation.Parse(wrap(s)); err != nil {
			f.Fatalf("a seed: %v", err)
		}
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		doc, err := attestation.Parse(wrap(raw))
		if err != nil {
			if doc != nil || attestation.Code(err) == "" {
				t.Fatalf("document %v, code %q", doc, attestation.Code(err))
			}
			return
		}
		canonical := reencode(t, doc)
		if len(canonical) > 16<<10 {
			return // indefinite lengths can be shorter than the definite ones
		}
		again, err := attestation.Parse(canonical)
		if err != nil {
			t.Fatalf("the canonical form: %v", err)
		}
		if diff := cmp.Diff(doc, again); diff != "" {
			t.Fatalf("the canonical form says otherwise (-raw +canonical):\n%s", diff)
		}
		if diff := cmp.Diff(canonical, reencode(t, again)); diff != "" {
			t.Fatalf("two encodings of one document (-first +second):\n%s", diff)
		}
	})
}

func FuzzVerifyRecorded(f *testing.F) {
	forger := seeds(f)
	genuine := map[string]bool{forgedModule + forger.now.String(): true}
	for _, v := range readVectors(f) {
		doc, err := attestation.Parse(v.raw)
		if err != nil {
			f.Fatal(err)
		}
		genuine[doc.ModuleID+doc.Timestamp.String()] = !v.debug()
	}
	roots := []attestation.Root{forger.trusted(), attestation.AWSRoot()}
	f.Fuzz(func(t *testing.T, raw []byte) {
		doc, err := attestation.Parse(raw)
		if err != nil {
			return
		}
		for _, root := range roots {
			policy := attestation.RecordedPolicy{
				Root: root, Images: []attestation.Image{{PCRs: map[int][]byte{0: doc.PCRs[0]}}},
			}
			recorded, err := attestation.VerifyRecorded(raw, policy)
			if err != nil {
				if attestation.Code(err) == "" {
					t.Fatalf("no code: %v", err)
				}
				continue
			}
			got, err := recorded.Document()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(*doc, got); diff != "" {
				t.Fatalf("verified something else than parsed (-parsed +verified):\n%s", diff)
			}
			if !genuine[got.ModuleID+got.Timestamp.String()] {
				t.Fatal("a forgery was verified")
			}
		}
	})
}
