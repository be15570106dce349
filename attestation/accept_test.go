package attestation_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/attestation"
)

func TestEveryFormThatAWSMayWriteIsAccepted(t *testing.T) {
	f := newForger(t)
	full := bytes.Repeat([]byte{1}, 1024)
	payload := f.pairs(f.fields())
	reversed := f.fields()
	for i, j := 0, len(reversed)-1; i < j; i, j = i+1, j-1 {
		reversed[i], reversed[j] = reversed[j], reversed[i]
	}
	envelope := func(payload, signature []byte) []byte {
		return cose(f.encode(protectedES384), []byte{0xa0}, f.encode(payload), f.encode(signature))
	}
	indefinite := append(append([]byte{0x9f}, f.document(f.fields())[1:]...), 0xff)
	wide := append([]byte{0x1b, 0, 0, 0, 0, 0, 0, 0, 0}, f.encode(make([]byte, 48))...)
	long := append([]byte{0xb1}, wide...)
	for i := 1; i <= 16; i++ {
		long = append(append(long, byte(i)), f.encode(bytes.Repeat([]byte{7}, 48))...)
	}
	copy(long[12:], bytes.Repeat([]byte{7}, 48))
	deepest := f.certify(&f.regional, "deepest", asCA(0))
	for name, raw := range map[string][]byte{
		"untagged":                         f.document(f.fields()),
		"tag 18":                           append([]byte{0xd2}, f.document(f.fields())...),
		"a payload of indefinite length":   f.signed(f.indefinitePairs(f.fields())),
		"an envelope of indefinite length": indefinite,
		"fields in another order":          f.document(reversed),
		"unknown fields":                   f.document(append(f.fields(), field{"future", map[string]int{"a": 1}}, field{7, true})),
		"17 registers":                     f.document(f.with("pcrs", registers(17, 48, 7))),
		"32 registers":                     f.document(f.with("pcrs", registers(32, 48, 7))),
		"an index in nine bytes":           f.document(f.with("pcrs", cbor.RawMessage(long))),
		"public_key of 1024 bytes":         f.document(f.with("public_key", full)),
		"user_data of 1024 bytes":          f.document(f.with("user_data", full)),
		"empty user_data":                  f.document(f.with("user_data", []byte{})),
		"no public_key":                    f.document(f.without("public_key")),
		"the other s":                      envelope(payload, f.otherHalf(f.sign(protectedES384, payload))),
		"other intermediates":              f.from(f.certify(&deepest, forgedName, asLeaf), f.regional, deepest),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := attestation.VerifyLive(raw, f.live()); err != nil {
				t.Errorf("VerifyLive: %v", err)
			}
			if _, err := attestation.VerifyRecorded(raw, f.recorded()); err != nil {
				t.Errorf("VerifyRecorded: %v", err)
			}
		})
	}
}

func TestDocumentHoldsWhatWasSigned(t *testing.T) {
	f := newForger(t)
	pcrs := make(map[int][]byte)
	for i := range 16 {
		pcrs[i] = bytes.Repeat([]byte{7}, 48)
	}
	want := attestation.Document{
		ModuleID:    forgedModule,
		Timestamp:   f.now,
		Digest:      "SHA384",
		PCRs:        pcrs,
		PublicKey:   []byte("public key"),
		Nonce:       []byte(forgedNonce),
		Certificate: f.leaf.cert.Raw,
		CABundle:    [][]byte{f.root.cert.Raw, f.regional.cert.Raw, f.zone.cert.Raw},
	}
	raw := f.document(f.fields())
	live, err := attestation.VerifyLive(raw, f.live())
	if err != nil {
		t.Fatal(err)
	}
	recorded, err := attestation.VerifyRecorded(raw, f.recorded())
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := attestation.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	for name, get := range map[string]func() (attestation.Document, error){
		"Live":     live.Document,
		"Recorded": recorded.Document,
		"Parse":    func() (attestation.Document, error) { return *parsed, nil },
	} {
		got, err := get()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestAccessorsReturnCopies(t *testing.T) {
	f := newForger(t)
	live, err := attestation.VerifyLive(f.document(f.fields()), f.live())
	if err != nil {
		t.Fatal(err)
	}
	first, err := live.Document()
	if err != nil {
		t.Fatal(err)
	}
	clear(first.PCRs[0])
	delete(first.PCRs, 1)
	clear(first.Nonce)
	clear(first.PublicKey)
	clear(first.Certificate)
	clear(first.CABundle[0])
	first.CABundle[1] = nil
	second, err := live.Document()
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := attestation.Parse(f.document(f.fields()))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(*parsed, second); diff != "" {
		t.Errorf("a caller changed the verified document (-want +got):\n%s", diff)
	}
}

func TestRecordedDocumentVerifiesLongAfterItsLeafExpired(t *testing.T) {
	f := newForger(t)
	raw := f.document(f.fields())
	if _, err := attestation.VerifyRecorded(raw, f.recorded()); err != nil {
		t.Errorf("recorded: %v", err)
	}
	late := f.live()
	late.Now = f.now.Add(5 * time.Hour)
	_, err := attestation.VerifyLive(raw, late)
	check(t, "live, five hours later", err, attestation.ErrCertificateTime)
	stale := f.with("timestamp", uint64(f.now.Add(5*time.Hour).UnixMilli()))
	_, err = attestation.VerifyRecorded(f.document(stale), f.recorded())
	check(t, "recorded, with a time after its leaf's end", err, attestation.ErrCertificateTime)
}
