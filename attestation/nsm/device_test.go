package nsm_test

import (
	"bytes"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hf/nsm/request"
	"github.com/hf/nsm/response"

	"github.com/keyhold/keyhold/attestation/nsm"
)

// fakeDevice answers every request with one answer, and notes what was asked.
type fakeDevice struct {
	answer   func(request.Request) (response.Response, error)
	asked    []request.Request
	inside   atomic.Int32
	overlaps atomic.Int32
	closed   int
	closeErr error
}

func (d *fakeDevice) Send(req request.Request) (response.Response, error) {
	if d.inside.Add(1) > 1 {
		d.overlaps.Add(1)
	}
	defer d.inside.Add(-1)
	if d.closed > 0 {
		panic("hf/nsm panics here")
	}
	d.asked = append(d.asked, req)
	return d.answer(req)
}

func (d *fakeDevice) Close() error {
	d.closed++
	return d.closeErr
}

func answering(res response.Response, err error) *fakeDevice {
	return &fakeDevice{answer: func(request.Request) (response.Response, error) { return res, err }}
}

// calls are all the methods that ask the device.
func calls(s nsm.Session) map[string]error {
	_, attest := s.Attest(nsm.AttestRequest{})
	_, extend := s.ExtendPCR(16, []byte("x"))
	_, _, describe := s.DescribePCR(16)
	return map[string]error{
		"Attest": attest, "ExtendPCR": extend, "DescribePCR": describe,
		"LockPCRs": s.LockPCRs(17), "Random": s.Random(make([]byte, 8)),
	}
}

func TestRefusalOfTheDeviceIsAnError(t *testing.T) {
	for code, want := range map[response.ErrorCode]nsm.Refusal{
		"InvalidArgument":  nsm.ErrInvalidArgument,
		"InvalidIndex":     nsm.ErrInvalidIndex,
		"InvalidResponse":  nsm.ErrInvalidResponse,
		"ReadOnlyIndex":    nsm.ErrReadOnlyIndex,
		"InvalidOperation": nsm.ErrInvalidOperation,
		"BufferTooSmall":   nsm.ErrBufferTooSmall,
		"InputTooLarge":    nsm.ErrInputTooLarge,
		"InternalError":    nsm.ErrInternal,
		"\x1b[2Jnew one":   nsm.ErrUnknownCode,
	} {
		for name, err := range calls(nsm.TestingOnlySession(answering(response.Response{Error: code}, nil))) {
			if !errors.Is(err, want) {
				t.Errorf("%s answered %q: %v", name, code, err)
			}
			if err != nil && bytes.ContainsRune([]byte(err.Error()), '\x1b') {
				t.Errorf("%s: the device's bytes are in the error", name)
			}
		}
	}
}

func TestFailureOfTheDeviceIsAnError(t *testing.T) {
	broken := errors.New("ioctl failed")
	for name, err := range calls(nsm.TestingOnlySession(answering(response.Response{}, broken))) {
		if !errors.Is(err, broken) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMalformedAnswersAreRefused(t *testing.T) {
	short := make([]byte, 47)
	for name, res := range map[string]response.Response{
		"nothing": {},
		"empty parts": {
			Attestation: &response.Attestation{}, ExtendPCR: &response.ExtendPCR{},
			DescribePCR: &response.DescribePCR{}, GetRandom: &response.GetRandom{},
		},
		"short registers": {
			ExtendPCR: &response.ExtendPCR{Data: short}, DescribePCR: &response.DescribePCR{Data: short},
		},
	} {
		for call, err := range calls(nsm.TestingOnlySession(answering(res, nil))) {
			if !errors.Is(err, nsm.ErrMalformed) {
				t.Errorf("%s answered %s: %v", call, name, err)
			}
		}
	}
}

func TestSessionAsksWhatItsCallerWants(t *testing.T) {
	register := bytes.Repeat([]byte{9}, nsm.PCRSize)
	d := answering(response.Response{
		Attestation: &response.Attestation{Document: []byte("doc")},
		ExtendPCR:   &response.ExtendPCR{Data: register},
		DescribePCR: &response.DescribePCR{Data: register, Lock: true},
		LockPCRs:    &response.LockPCRs{},
		GetRandom:   &response.GetRandom{Random: []byte("12345")},
	}, nil)
	s := nsm.TestingOnlySession(d)
	doc, err := s.Attest(nsm.AttestRequest{PublicKey: []byte("k"), UserData: []byte{}, Nonce: []byte("n")})
	if err != nil || string(doc) != "doc" {
		t.Errorf("Attest: %q, %v", doc, err)
	}
	value, err := s.ExtendPCR(16, []byte("data"))
	if err != nil || !cmp.Equal(value, register) {
		t.Errorf("ExtendPCR: %x, %v", value, err)
	}
	value, locked, err := s.DescribePCR(3)
	if err != nil || !locked || !cmp.Equal(value, register) {
		t.Errorf("DescribePCR: %x, %v, %v", value, locked, err)
	}
	if err := s.LockPCRs(17); err != nil {
		t.Errorf("LockPCRs: %v", err)
	}
	random := make([]byte, 8)
	if err := s.Random(random); err != nil || string(random[:5]) != "12345" {
		t.Errorf("Random: %q, %v", random, err)
	}
	want := []request.Request{
		&request.Attestation{PublicKey: []byte("k"), Nonce: []byte("n")}, // empty user data is left out
		&request.ExtendPCR{Index: 16, Data: []byte("data")},
		&request.DescribePCR{Index: 3},
		&request.LockPCRs{Range: 17},
		&request.GetRandom{}, &request.GetRandom{}, // five bytes at a time
	}
	if diff := cmp.Diff(want, d.asked); diff != "" {
		t.Errorf("requests (-want +got):\n%s", diff)
	}
}

func TestRandomFillsTheSliceFromSeveralAnswers(t *testing.T) {
	next := byte(0)
	d := &fakeDevice{answer: func(request.Request) (response.Response, error) {
		out := make([]byte, 3)
		for i := range out {
			next++
			out[i] = next
		}
		return response.Response{GetRandom: &response.GetRandom{Random: out}}, nil
	}}
	p := make([]byte, 7)
	if err := nsm.TestingOnlySession(d).Random(p); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]byte{1, 2, 3, 4, 5, 6, 7}, p); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestOversizedRequestsAreNotSent(t *testing.T) {
	d := answering(response.Response{}, errors.New("was asked"))
	s := nsm.TestingOnlySession(d)
	long := make([]byte, nsm.MaxFieldSize+1)
	attest := func(r nsm.AttestRequest) error { _, err := s.Attest(r); return err }
	extend := func(i uint16, b []byte) error { _, err := s.ExtendPCR(i, b); return err }
	_, _, describe := s.DescribePCR(nsm.PCRCount)
	for _, tc := range []struct {
		name string
		got  error
		want nsm.Refusal
	}{
		{"public key", attest(nsm.AttestRequest{PublicKey: long}), nsm.ErrInputTooLarge},
		{"user data", attest(nsm.AttestRequest{UserData: long}), nsm.ErrInputTooLarge},
		{"nonce", attest(nsm.AttestRequest{Nonce: long}), nsm.ErrInputTooLarge},
		{"extend with nothing", extend(16, nil), nsm.ErrInvalidArgument},
		{"extend with too much", extend(16, make([]byte, nsm.MaxExtendData+1)), nsm.ErrInputTooLarge},
		{"extend PCR32", extend(nsm.PCRCount, []byte("x")), nsm.ErrInvalidIndex},
		{"describe PCR32", describe, nsm.ErrInvalidIndex},
		{"lock 33 registers", s.LockPCRs(nsm.PCRCount + 1), nsm.ErrInvalidIndex},
	} {
		if !errors.Is(tc.got, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, tc.got, tc.want)
		}
	}
	if len(d.asked) != 0 {
		t.Errorf("%d requests were sent", len(d.asked))
	}
}

func TestClosedSessionRefusesEveryCallAndNeverPanics(t *testing.T) {
	d := answering(response.Response{}, nil)
	s := nsm.TestingOnlySession(d)
	for range 2 {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if d.closed != 1 {
		t.Errorf("the device was closed %d times", d.closed)
	}
	for name, err := range calls(s) {
		if !errors.Is(err, nsm.ErrClosed) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
}

func TestFailureToCloseIsReportedOnce(t *testing.T) {
	d := answering(response.Response{}, nil)
	d.closeErr = errors.New("bad descriptor")
	s := nsm.TestingOnlySession(d)
	if err := s.Close(); !errors.Is(err, d.closeErr) {
		t.Errorf("first Close: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

func TestCallsAndCloseNeverOverlap(t *testing.T) {
	d := answering(response.Response{Attestation: &response.Attestation{Document: []byte("doc")}}, nil)
	s := nsm.TestingOnlySession(d)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				if _, err := s.Attest(nsm.AttestRequest{}); err != nil && !errors.Is(err, nsm.ErrClosed) {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	wg.Wait()
	if n := d.overlaps.Load(); n != 0 {
		t.Errorf("%d calls overlapped", n)
	}
}

func TestOpenFailsWithoutADevice(t *testing.T) {
	if _, err := os.Stat("/dev/nsm"); err == nil {
		t.Skip("this machine has an NSM")
	}
	if s, err := nsm.Open(); s != nil || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("session %v, error %v", s, err)
	}
}
