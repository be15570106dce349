package nsmtest_test

import (
	"bytes"
	"crypto/sha512"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/attestation/nsmtest"
)

func newNSM(t *testing.T, opt nsmtest.Options) *nsmtest.NSM {
	t.Helper()
	ca, err := nsmtest.NewCA(nil)
	if err != nil {
		t.Fatal(err)
	}
	if opt.PCRs == nil {
		opt.PCRs = nsmtest.Measurements("image")
	}
	n, err := nsmtest.New(ca, opt)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestExtendHashesOldValueAndData(t *testing.T) {
	n := newNSM(t, nsmtest.Options{})
	want := make([]byte, nsm.PCRSize)
	for _, data := range []string{"first", "second"} {
		sum := sha512.Sum384(slices.Concat(want, []byte(data)))
		want = sum[:]
		got, err := n.ExtendPCR(16, []byte(data))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("after %q (-want +got):\n%s", data, diff)
		}
	}
	got, locked, err := n.DescribePCR(16)
	if err != nil || locked {
		t.Fatalf("locked %v, error %v", locked, err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("described value (-want +got):\n%s", diff)
	}
}

func TestLockPCRsLocksEveryRegisterBelowItsArgument(t *testing.T) {
	n := newNSM(t, nsmtest.Options{})
	if err := n.LockPCRs(18); err != nil {
		t.Fatal(err)
	}
	for i := range uint16(nsm.PCRCount) {
		_, locked, err := n.DescribePCR(i)
		if err != nil {
			t.Fatal(err)
		}
		if want := i < 18; locked != want {
			t.Errorf("PCR%d locked: %v, want %v", i, locked, want)
		}
		_, err = n.ExtendPCR(i, []byte("x"))
		if i < 18 && !errors.Is(err, nsm.ErrReadOnlyIndex) {
			t.Errorf("extending locked PCR%d: %v", i, err)
		}
		if i >= 18 && err != nil {
			t.Errorf("extending PCR%d: %v", i, err)
		}
	}
	if err := n.LockPCRs(17); err != nil {
		t.Errorf("locking again: %v", err)
	}
}

func TestBootRegistersAreLockedFromTheStart(t *testing.T) {
	n := newNSM(t, nsmtest.Options{})
	for i := range uint16(nsm.PCRCount) {
		_, locked, err := n.DescribePCR(i)
		if err != nil {
			t.Fatal(err)
		}
		if want := i < nsm.BootPCRs; locked != want {
			t.Errorf("PCR%d locked: %v, want %v", i, locked, want)
		}
	}
}

func TestDeviceLimitsAreRefusedWithTheirOwnCode(t *testing.T) {
	n := newNSM(t, nsmtest.Options{})
	long := make([]byte, nsm.MaxFieldSize+1)
	attest := func(req nsm.AttestRequest) error { _, err := n.Attest(req); return err }
	extend := func(i uint16, data []byte) error { _, err := n.ExtendPCR(i, data); return err }
	describe := func(i uint16) error { _, _, err := n.DescribePCR(i); return err }
	for _, tc := range []struct {
		name string
		got  error
		want error
	}{
		{"public key of 1025 bytes", attest(nsm.AttestRequest{PublicKey: long}), nsm.ErrInputTooLarge},
		{"user data of 1025 bytes", attest(nsm.AttestRequest{UserData: long}), nsm.ErrInputTooLarge},
		{"nonce of 1025 bytes", attest(nsm.AttestRequest{Nonce: long}), nsm.ErrInputTooLarge},
		{"extend PCR32", extend(32, []byte("x")), nsm.ErrInvalidIndex},
		{"extend with nothing", extend(16, nil), nsm.ErrInvalidArgument},
		{"extend with too much", extend(16, make([]byte, nsm.MaxExtendData+1)), nsm.ErrInputTooLarge},
		{"describe PCR32", describe(32), nsm.ErrInvalidIndex},
		{"lock 33 registers", n.LockPCRs(33), nsm.ErrInvalidIndex},
	} {
		if !errors.Is(tc.got, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, tc.got, tc.want)
		}
	}
	if err := attest(nsm.AttestRequest{PublicKey: long[1:], UserData: long[1:], Nonce: long[1:]}); err != nil {
		t.Errorf("three fields of 1024 bytes: %v", err)
	}
}

func TestClosedSessionRefusesEveryCall(t *testing.T) {
	n := newNSM(t, nsmtest.Options{})
	for range 2 {
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
	}
	_, attest := n.Attest(nsm.AttestRequest{})
	_, extend := n.ExtendPCR(16, []byte("x"))
	_, _, describe := n.DescribePCR(0)
	for name, err := range map[string]error{
		"attest": attest, "extend": extend, "describe": describe,
		"lock": n.LockPCRs(17), "random": n.Random(make([]byte, 1)),
	} {
		if !errors.Is(err, nsm.ErrClosed) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
}

func TestInjectedFaultStopsTheOperation(t *testing.T) {
	var asked []string
	boom := errors.New("boom")
	n := newNSM(t, nsmtest.Options{Faults: nsmtest.Faults{Fault: func(op string) error {
		asked = append(asked, op)
		return boom
	}}})
	_, attest := n.Attest(nsm.AttestRequest{})
	_, extend := n.ExtendPCR(16, []byte("x"))
	_, _, describe := n.DescribePCR(16)
	for i, err := range []error{attest, extend, describe, n.LockPCRs(17), n.Random(make([]byte, 1))} {
		if !errors.Is(err, boom) {
			t.Errorf("operation %d: %v", i, err)
		}
	}
	want := []string{nsmtest.OpAttest, nsmtest.OpExtend, nsmtest.OpDescribe, nsmtest.OpLock, nsmtest.OpRandom}
	if diff := cmp.Diff(want, asked); diff != "" {
		t.Errorf("operations (-want +got):\n%s", diff)
	}
	n.SetFaults(nsmtest.Faults{})
	value, locked, err := n.DescribePCR(16)
	if err != nil || locked || !cmp.Equal(value, make([]byte, nsm.PCRSize)) {
		t.Errorf("the failed calls left PCR16 %x, locked %v, error %v", value, locked, err)
	}
}

func TestNewRefusesRegistersThatNoBootMeasures(t *testing.T) {
	ca, err := nsmtest.NewCA(nil)
	if err != nil {
		t.Fatal(err)
	}
	good := nsmtest.Measurements("x")[0]
	for name, opt := range map[string]nsmtest.Options{
		"no PCR0":          {},
		"zero PCR0":        {PCRs: map[int][]byte{0: make([]byte, 48)}},
		"short PCR0":       {PCRs: map[int][]byte{0: good[:32]}},
		"PCR16":            {PCRs: map[int][]byte{0: good, 16: good}},
		"negative":         {PCRs: map[int][]byte{0: good, -1: good}},
		"dotted module id": {PCRs: map[int][]byte{0: good}, ModuleID: "i-1.x"},
	} {
		if _, err := nsmtest.New(ca, opt); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestSavedAuthorityIsTheSameAuthority(t *testing.T) {
	ca, err := nsmtest.NewCA(nil)
	if err != nil {
		t.Fatal(err)
	}
	saved, err := ca.MarshalPEM()
	if err != nil {
		t.Fatal(err)
	}
	again, err := nsmtest.ParseCA(saved, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !again.Root().Equal(ca.Root()) {
		t.Error("the root changed")
	}
	other, err := nsmtest.NewCA(nil)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := other.MarshalPEM()
	if err != nil {
		t.Fatal(err)
	}
	const marker = "-----BEGIN PRIVATE KEY-----"
	cert, _, _ := bytes.Cut(saved, []byte(marker))
	_, key, _ := bytes.Cut(foreign, []byte(marker))
	for name, data := range map[string][]byte{
		"empty":              nil,
		"certificate only":   cert,
		"trailing bytes":     append(bytes.Clone(saved), 'x'),
		"another root's key": append(append(bytes.Clone(cert), marker...), key...),
	} {
		if _, err := nsmtest.ParseCA(data, nil); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestDocumentCarriesTheInjectedClock(t *testing.T) {
	at := time.Date(2031, 2, 3, 4, 5, 6, 789e6, time.UTC)
	n := newNSM(t, nsmtest.Options{Now: func() time.Time { return at }})
	for range 3 {
		doc, err := n.Attest(nsm.AttestRequest{})
		if err != nil {
			t.Fatal(err)
		}
		got, err := nsm.Timestamp(doc)
		if err != nil {
			t.Fatal(err)
		}
		if !got.Equal(at) {
			t.Errorf("timestamp %v, want %v", got, at)
		}
		at = at.Add(5 * time.Hour)
	}
}

func TestRandomFillsTheWholeSlice(t *testing.T) {
	n := newNSM(t, nsmtest.Options{})
	p := make([]byte, 1000)
	if err := n.Random(p); err != nil {
		t.Fatal(err)
	}
	if bytes.Count(p, []byte{0}) > 100 { // 4 are expected
		t.Error("the slice is mostly zero")
	}
}
