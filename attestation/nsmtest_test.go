package attestation_test

import (
	"bytes"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"testing"
	"time"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/attestation/nsmtest"
)

// booted is a software NSM whose enclave measured a config and locked it.
type booted struct {
	nsm    *nsmtest.NSM
	policy attestation.LivePolicy
}

func boot(t *testing.T, opt nsmtest.Options) booted {
	t.Helper()
	now := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	ca, err := nsmtest.NewCA(func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	opt.PCRs = nsmtest.Measurements("image")
	device, err := nsmtest.New(ca, opt)
	if err != nil {
		t.Fatal(err)
	}
	config := sha512.Sum384([]byte("config"))
	pcr16, err := device.ExtendPCR(16, config[:])
	if err != nil {
		t.Fatal(err)
	}
	if err := device.LockPCRs(17); err != nil {
		t.Fatal(err)
	}
	image := attestation.Image{PCRs: nsmtest.Measurements("image")}
	image.PCRs[16] = pcr16
	return booted{device, attestation.LivePolicy{
		Root: attestation.TestRoot(ca.Root()), Images: []attestation.Image{image}, Nonce: []byte(forgedNonce), Now: now,
	}}
}

func (b booted) attest(t *testing.T) []byte {
	t.Helper()
	doc, err := b.nsm.Attest(nsm.AttestRequest{PublicKey: []byte("key"), UserData: []byte("data"), Nonce: b.policy.Nonce})
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

func TestSoftwareNSMVerifiesUnderItsOwnRootOnly(t *testing.T) {
	b := boot(t, nsmtest.Options{})
	raw := b.attest(t)
	live, err := attestation.VerifyLive(raw, b.policy)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := live.Document()
	if err != nil {
		t.Fatal(err)
	}
	if string(doc.PublicKey) != "key" || string(doc.UserData) != "data" || doc.ModuleID != b.nsm.ModuleID() || len(doc.PCRs) != 17 {
		t.Errorf("document holds %q, %q, %q, %d registers", doc.PublicKey, doc.UserData, doc.ModuleID, len(doc.PCRs))
	}
	if _, err := attestation.VerifyRecorded(raw, attestation.RecordedPolicy{Root: b.policy.Root, Images: b.policy.Images}); err != nil {
		t.Errorf("recorded: %v", err)
	}
	b.policy.Root = attestation.AWSRoot()
	_, err = attestation.VerifyLive(raw, b.policy)
	check(t, "under Amazon's root", err, attestation.ErrRoot)
}

func TestSoftwareNSMFaultsAreRefused(t *testing.T) {
	for _, tc := range []struct {
		name string
		opt  nsmtest.Options
		want *attestation.Error
	}{
		{"debug mode", nsmtest.Options{Debug: true}, attestation.ErrDebug},
		{"an empty document", nsmtest.Options{Faults: nsmtest.Faults{EmptyDocument: true}}, attestation.ErrSize},
		{"another nonce", nsmtest.Options{Faults: nsmtest.Faults{Nonce: []byte("another")}}, attestation.ErrNonce},
		{"another register", nsmtest.Options{Faults: nsmtest.Faults{PCRs: map[int][]byte{16: value(1)}}}, attestation.ErrPCRMismatch},
		{"a mangled signature", nsmtest.Options{Faults: nsmtest.Faults{MangledSignature: true}}, attestation.ErrSignature},
		{"another key", nsmtest.Options{Faults: nsmtest.Faults{WrongKey: true}}, attestation.ErrSignature},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := boot(t, tc.opt)
			_, err := attestation.VerifyLive(b.attest(t), b.policy)
			check(t, "VerifyLive", err, tc.want)
		})
	}
}

func TestSoftwareNSMRenewsItsLeafForAsLongAsItRuns(t *testing.T) {
	now := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	b := boot(t, nsmtest.Options{Now: func() time.Time { return now }})
	leaves := make(map[string]bool)
	for range 40 {
		b.policy.Now = now
		live, err := attestation.VerifyLive(b.attest(t), b.policy)
		if err != nil {
			t.Fatalf("at %v: %v", now, err)
		}
		doc, err := live.Document()
		if err != nil {
			t.Fatal(err)
		}
		leaves[hex.EncodeToString(doc.Certificate)] = true
		now = now.Add(time.Hour)
	}
	if len(leaves) < 13 || len(leaves) == 40 {
		t.Errorf("%d leaves in 40 hours; one lasts three", len(leaves))
	}
}

func TestSoftwareNSMsOfOneSavedAuthorityHaveOneRoot(t *testing.T) {
	b := boot(t, nsmtest.Options{})
	ca, err := nsmtest.NewCA(nil)
	if err != nil {
		t.Fatal(err)
	}
	saved, err := ca.MarshalPEM()
	if err != nil {
		t.Fatal(err)
	}
	again, err := nsmtest.ParseCA(saved, func() time.Time { return time.Now() })
	if err != nil {
		t.Fatal(err)
	}
	device, err := nsmtest.New(again, nsmtest.Options{PCRs: nsmtest.Measurements("image")})
	if err != nil {
		t.Fatal(err)
	}
	raw, err := device.Attest(nsm.AttestRequest{})
	if err != nil {
		t.Fatal(err)
	}
	p := attestation.RecordedPolicy{Root: attestation.TestRoot(ca.Root()), Images: []attestation.Image{{PCRs: nsmtest.Measurements("image")}}}
	if _, err := attestation.VerifyRecorded(raw, p); err != nil {
		t.Error(err)
	}
	p.Root = b.policy.Root
	_, err = attestation.VerifyRecorded(raw, p)
	check(t, "under another authority", err, attestation.ErrRoot)
}

// AWS's own documents begin with the same bytes, and have the fields in the
// same order.
func TestSoftwareNSMWritesTheFormOfAWS(t *testing.T) {
	b := boot(t, nsmtest.Options{})
	raw := b.attest(t)
	for name, want := range map[string][]byte{
		"untagged envelope and header": {0x84, 0x44, 0xa1, 0x01, 0x38, 0x22, 0xa0, 0x59},
		"module id first, of nine":     append([]byte{0xa9, 0x69}, "module_id"...),
		"timestamp in eight bytes":     append(append([]byte{0x69}, "timestamp"...), 0x1b),
		"registers from the first":     append(append([]byte{0x64}, "pcrs"...), 0xb1, 0x00, 0x58, 0x30),
		"a signature of 96 bytes":      {0x58, 0x60},
	} {
		if !bytes.Contains(raw, want) {
			t.Errorf("%s: %x is not in the document", name, want)
		}
	}
	last := -1
	for _, name := range []string{"module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle", "public_key", "user_data", "nonce"} {
		at := bytes.Index(raw, append([]byte{0x60 | byte(len(name))}, name...))
		if at <= last {
			t.Errorf("%s at %d, the field before it at %d", name, at, last)
		}
		last = at
	}
}

func TestSoftwareNSMShowsLockedRegistersOnly(t *testing.T) {
	ca, err := nsmtest.NewCA(nil)
	if err != nil {
		t.Fatal(err)
	}
	device, err := nsmtest.New(ca, nsmtest.Options{PCRs: nsmtest.Measurements("image")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := device.ExtendPCR(16, []byte("x")); err != nil {
		t.Fatal(err)
	}
	for _, want := range []int{16, 17} {
		if err := device.LockPCRs(uint16(want)); err != nil {
			t.Fatal(err)
		}
		raw, err := device.Attest(nsm.AttestRequest{})
		if err != nil {
			t.Fatal(err)
		}
		doc, err := attestation.Parse(raw)
		if err != nil {
			t.Fatal(err)
		}
		if len(doc.PCRs) != want {
			t.Errorf("%d registers with %d locked", len(doc.PCRs), want)
		}
	}
	_, err = device.ExtendPCR(16, []byte("x"))
	if !errors.Is(err, nsm.ErrReadOnlyIndex) {
		t.Errorf("extending after the lock: %v", err)
	}
}
