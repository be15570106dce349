package nsmdev_test

import (
	"bytes"
	"crypto/sha512"
	"errors"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"
	"github.com/hf/nsm/request"
	"github.com/hf/nsm/response"
	"go.uber.org/goleak"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/internal/vmtest/fakeguest"
	"github.com/keyhold/keyhold/internal/vmtest/nsmdev"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func module(t *testing.T, faults nsmtest.Faults) (*nsmtest.NSM, *nsmtest.CA) {
	t.Helper()
	ca, err := nsmtest.NewCA(nil)
	if err != nil {
		t.Fatal(err)
	}
	m, err := nsmtest.New(ca, nsmtest.Options{PCRs: nsmtest.Measurements("image"), Faults: faults})
	if err != nil {
		t.Fatal(err)
	}
	return m, ca
}

// ask speaks with the module through the encodings of hf/nsm, which the enclave
// uses.
func ask(t *testing.T, m nsmdev.Module, r request.Request) response.Response {
	t.Helper()
	raw, err := cbor.Marshal(r.Encoded())
	if err != nil {
		t.Fatal(err)
	}
	var res response.Response
	if err := cbor.Unmarshal(nsmdev.Answer(m, raw), &res); err != nil {
		t.Fatal(err)
	}
	return res
}

func TestEveryRequestOfTheLibraryIsAnswered(t *testing.T) {
	m, ca := module(t, nsmtest.Faults{})
	first := sha512.Sum384(append(make([]byte, 48), "config"...))
	pcr0 := nsmtest.Measurements("image")[0]

	if got := ask(t, m, &request.DescribePCR{Index: 0}); got.DescribePCR == nil || !got.DescribePCR.Lock || !cmp.Equal(got.DescribePCR.Data, pcr0) {
		t.Errorf("PCR0: %+v", got)
	}
	if got := ask(t, m, &request.ExtendPCR{Index: 16, Data: []byte("config")}); got.ExtendPCR == nil || !cmp.Equal(got.ExtendPCR.Data, first[:]) {
		t.Errorf("extend: %+v", got)
	}
	if got := ask(t, m, &request.LockPCR{Index: 20}); got.LockPCR == nil {
		t.Errorf("lock one: %+v", got)
	}
	if got := ask(t, m, &request.LockPCRs{Range: 17}); got.LockPCRs == nil {
		t.Errorf("lock: %+v", got)
	}
	got := ask(t, m, &request.DescribeNSM{}).DescribeNSM
	want := &response.DescribeNSM{
		VersionMajor: 1, ModuleID: m.ModuleID(), MaxPCRs: 32, Digest: response.DigestSHA384,
		LockedPCRs: []uint16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 20},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("describe (-want +got):\n%s", diff)
	}
	if got := ask(t, m, &request.GetRandom{}); got.GetRandom == nil || len(got.GetRandom.Random) != 256 {
		t.Errorf("random: %+v", got)
	}
	doc := ask(t, m, &request.Attestation{Nonce: []byte("sixteen byte nonce"), UserData: []byte("user"), PublicKey: []byte("key")}).Attestation
	if doc == nil {
		t.Fatal("no document")
	}
	image := attestation.Image{PCRs: map[int][]byte{0: pcr0, 16: first[:]}}
	_, err := attestation.VerifyLive(doc.Document, attestation.LivePolicy{
		Root:   attestation.TestRoot(ca.Root()),
		Images: []attestation.Image{image}, Nonce: []byte("sixteen byte nonce"), Now: time.Now(),
	})
	if err != nil {
		t.Errorf("the document: %v", err)
	}
}

func TestRefusalsOfTheModuleReachTheDriver(t *testing.T) {
	m, _ := module(t, nsmtest.Faults{})
	for name, tc := range map[string]struct {
		r    request.Request
		want nsm.Refusal
	}{
		"extending a locked register": {&request.ExtendPCR{Index: 0, Data: []byte("x")}, nsm.ErrReadOnlyIndex},
		"a register beyond the last":  {&request.DescribePCR{Index: 32}, nsm.ErrInvalidIndex},
		"locking one beyond the last": {&request.LockPCR{Index: 32}, nsm.ErrInvalidIndex},
		"locking too many":            {&request.LockPCRs{Range: 33}, nsm.ErrInvalidIndex},
		"extending by nothing":        {&request.ExtendPCR{Index: 16}, nsm.ErrInvalidArgument},
		"a nonce that is too long":    {&request.Attestation{Nonce: make([]byte, 1025)}, nsm.ErrInputTooLarge},
	} {
		if got := ask(t, m, tc.r); got.Error != response.ErrorCode(tc.want) {
			t.Errorf("%s: %+v, want %s", name, got, tc.want)
		}
	}
	broken, _ := module(t, nsmtest.Faults{Fault: func(string) error { return errors.New("out of order") }})
	for _, r := range []request.Request{&request.DescribeNSM{}, &request.GetRandom{}, &request.Attestation{}} {
		if got := ask(t, broken, r); got.Error != response.ECInternalError {
			t.Errorf("a broken module answers %+v", got)
		}
	}
}

func TestRequestsThatAreNoneAreRefused(t *testing.T) {
	m, _ := module(t, nsmtest.Faults{})
	pair := func(name string, v any) []byte {
		b, err := cbor.Marshal(map[string]any{name: v})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	two, err := cbor.Marshal(map[string]any{"DescribePCR": map[string]int{"index": 0}, "LockPCR": map[string]int{"index": 16}})
	if err != nil {
		t.Fatal(err)
	}
	describe := pair("DescribePCR", map[string]int{"index": 0})
	for name, raw := range map[string][]byte{
		"nothing":                  {},
		"an unknown word":          {0x61, 'x'},
		"a number":                 {0x01},
		"an empty map":             {0xa0},
		"two requests":             two,
		"an unknown request":       pair("Format", map[string]int{}),
		"a request of null":        pair("DescribePCR", nil),
		"an unknown parameter":     pair("DescribePCR", map[string]int{"index": 0, "size": 1}),
		"an index beyond 16 bits":  pair("DescribePCR", map[string]int{"index": 1 << 16}),
		"bytes behind the request": append(bytes.Clone(describe), 0),
		"half a request":           describe[:len(describe)-1],
		"more than 4096 bytes":     pair("ExtendPCR", map[string]any{"index": 16, "data": make([]byte, 4096)}),
	} {
		var res response.Response
		if err := cbor.Unmarshal(nsmdev.Answer(m, raw), &res); err != nil || res.Error == "" {
			t.Errorf("%s: %+v, %v", name, res, err)
		}
	}
	if value, _, err := m.DescribePCR(16); err != nil || !cmp.Equal(value, make([]byte, 48)) {
		t.Errorf("PCR16 is %x, %v", value, err)
	}
}

// boot starts a guest with the device's one queue.
func boot(t *testing.T) (*fakeguest.Guest, *fakeguest.Queue) {
	t.Helper()
	m, _ := module(t, nsmtest.Faults{})
	g := fakeguest.Attach(t, nsmdev.New(m).Backend())
	g.Negotiate(fakeguest.Features)
	return g, g.Start(0, 16)
}

var describeNSM = append([]byte{0x6b}, "DescribeNSM"...)

// The kernel's driver takes both chains at the first interrupt after a request;
// one that is not there then is an error.
func TestBothChainsComeBackUnderOneInterrupt(t *testing.T) {
	_, q := boot(t)
	for q.Interrupted(10 * time.Millisecond) { // the one of the start
	}
	for range 50 {
		before := q.Interrupts()
		req := q.Add(fakeguest.Part{Out: describeNSM})
		res := q.Add(fakeguest.Part{In: 0x3000})
		q.Kick()
		if !q.Interrupted(time.Minute) {
			t.Fatal("no interrupt")
		}
		first, n1, ok1 := q.Used()
		second, n2, ok2 := q.Used()
		if !ok1 || !ok2 {
			t.Fatal("a chain is missing at the interrupt")
		}
		if first != req || n1 != 0 || second != res || n2 == 0 {
			t.Errorf("chains %d (%d bytes) and %d (%d bytes) came for %d and %d", first, n1, second, n2, req, res)
		}
		if got := q.Interrupts() - before; got != 1 {
			t.Errorf("%d interrupts", got)
		}
	}
}

func TestARequestWaitsForRoomForItsAnswer(t *testing.T) {
	_, q := boot(t)
	q.Add(fakeguest.Part{Out: describeNSM})
	q.Kick()
	for q.Interrupted(20 * time.Millisecond) { // that of the start comes in any case
	}
	if _, _, ok := q.Used(); ok {
		t.Error("it came back alone")
	}
	q.Add(fakeguest.Part{In: 0x3000})
	q.Kick()
	q.Await()
	if _, n := q.Await(); n == 0 {
		t.Error("no answer")
	}
}

func TestAnAnswerThatDoesNotFitIsRefused(t *testing.T) {
	_, q := boot(t)
	q.Add(fakeguest.Part{Out: describeNSM})
	res := q.Add(fakeguest.Part{In: 64})
	q.Kick()
	q.Await()
	_, n := q.Await()
	var got response.Response
	if err := cbor.Unmarshal(q.Buffer(res)[:n], &got); err != nil || got.Error != response.ECBufferTooSmall {
		t.Errorf("answered %+v, %v", got, err)
	}
}

func TestChainsOutOfTurnEndTheDevice(t *testing.T) {
	out, in := fakeguest.Part{Out: describeNSM}, fakeguest.Part{In: 100}
	for name, chains := range map[string][][]fakeguest.Part{
		"room first":         {{in}},
		"both in one":        {{out, in}},
		"two requests":       {{out}, {out}},
		"an answer of no in": {{out}, {out, in}},
	} {
		t.Run(name, func(t *testing.T) {
			g, q := boot(t)
			for _, c := range chains {
				q.Add(c...)
			}
			q.Kick()
			if err := g.Wait(); err == nil {
				t.Error("it went on")
			}
		})
	}
}
