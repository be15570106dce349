package vmtest_test

import (
	"errors"
	"io"
	"syscall"
	"testing"
	"time"

	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/internal/vmtest/hostvsock"
	"github.com/keyhold/keyhold/internal/wire"
)

const (
	atRest = 5000 // records that are signed in peace, for the rate
	inRage = 5000 // and while the enclave is killed
)

// TestAnEnclaveLivesInAMachine is the whole way: boot, config, attested KMS, keys,
// signatures, receipts, death and a second boot.
func TestAnEnclaveLivesInAMachine(t *testing.T) {
	needVM(t)
	s := newSite(t)
	b := s.underTest()
	raw := s.config("vm")
	image := wanted(b.pcrs, raw)
	s.admit(b.pcrs[0], raw)
	w := s.byVsock()
	s.startParent(w, image, raw)

	began := time.Now()
	vm := s.boot(b, machine{})
	s.awaitHeartbeat(vm)
	beat := time.Since(began)
	s.connect().Close()
	serving := time.Since(began)
	s.onlyTheParentIsServed()
	s.await(vm, `"msg":"config measured"`)
	s.provision(w, raw)
	s.await(vm, `"msg":"keyring open"`, `"created":true`)
	inside := s.signed("at-rest", atRest, 1)
	log := vm.Console()

	s.submit("in-rage", inRage, 2)
	s.awaitLeft(inRage / batchSize / 2)
	if err := vm.Kill(); err != nil {
		t.Fatal(err)
	}
	if s.left(t.Context()) == 0 {
		t.Fatal("all was signed before the enclave was killed")
	}
	again := s.boot(b, machine{})
	s.awaitHeartbeat(again)
	s.await(again, `"msg":"keyring open"`, `"created":false`)
	s.awaitLeft(0)

	r := s.audit(image, raw)
	const all = atRest + inRage
	if r.Signed != all || r.Verified != all || r.Proved != all || r.Boots != 2 || r.Problems != 0 || r.Keys != keys {
		t.Errorf("the audit found %+v", r)
	}
	outside := rateOutside(t)
	t.Logf("image of %.1f MB: heartbeat %.1f s after the start, serving after %.1f s", b.size, beat.Seconds(), serving.Seconds())
	t.Logf("%.0f records per second in the machine, %.0f outside of it, ratio %.3f", inside, outside, inside/outside)
	t.Logf("%d signatures and %d receipts of %d boots verified, up to a test's authority in place of AWS's", r.Proved, r.Receipts, r.Boots)
	t.Logf("the console of the first boot:\n%s", log)
}

// onlyTheParentIsServed: other peers than context id 3 are connected by the kernel
// and then hear nothing.
func (s *site) onlyTheParentIsServed() {
	s.t.Helper()
	for _, cid := range []uint32{1, 2, 4, guestCID + 1} {
		c, err := s.vsock.DialFrom(s.patience(), cid, wire.EnclavePort)
		if err != nil {
			s.t.Fatalf("context id %d: %v", cid, err)
		}
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			s.t.Fatal(err)
		}
		got, err := io.ReadAll(c)
		if len(got) > 0 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
			s.t.Errorf("context id %d was told %d bytes, %v", cid, len(got), err)
		}
		if a, ok := c.LocalAddr().(hostvsock.Addr); !ok || a.CID != cid {
			s.t.Errorf("context id %d called as %v", cid, c.LocalAddr())
		}
		_ = c.Close()
	}
}

// rateOutside signs the same records with the same code and no machine around it.
func rateOutside(t *testing.T) float64 {
	t.Helper()
	s := newSite(t)
	raw := s.config("outside")
	pcrs := nsmtest.Measurements(outsideImage)
	s.admit(pcrs[0], raw)
	w := s.outside()
	s.startParent(w, wanted(pcrs, raw), raw)
	s.provision(w, raw)
	rate := s.signed("at-rest", atRest, 1)
	if r := s.audit(wanted(pcrs, raw), raw); r.Proved != atRest {
		t.Errorf("outside of the machine the audit found %+v", r)
	}
	return rate
}
