package vmtest_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/vmtest/kmod"
	"github.com/keyhold/keyhold/internal/vmtest/qemu"
	"github.com/keyhold/keyhold/internal/wire"
)

// askForKeyring boots an image and asks for a keyring under a config, with
// production's way to KMS. It returns what the enclave answers.
func (s *site) askForKeyring(b built, m machine, raw []byte) (*qemu.VM, error) {
	s.t.Helper()
	s.serveEgress()
	vm := s.boot(b, m)
	s.awaitHeartbeat(vm)
	c := s.connect()
	reply, err := c.Configure(s.patience(), &wire.Configure{Config: raw})
	if err != nil {
		s.t.Fatal(err)
	}
	want := config.PCR16(raw)
	if string(reply.PCR16) != string(want[:]) {
		s.t.Errorf("PCR16 is %x, want %x", reply.PCR16, want)
	}
	_, err = c.CreateKeyring(s.patience())
	return vm, err
}

// The shipped image does all that the image under test does, up to the moment when
// it looks at the certificate of the emulated KMS.
func TestTheShippedImageRefusesAnotherKMS(t *testing.T) {
	needVM(t)
	t.Parallel()
	s := newSite(t)
	b, raw := shipped(t), s.config("shipped")
	if test := s.underTest(); string(b.pcrs[1]) != string(test.pcrs[1]) || string(b.pcrs[2]) == string(test.pcrs[2]) {
		t.Error("the images differ in more, or less, than their second ramdisk")
	}
	s.admit(b.pcrs[0], raw)
	vm, err := s.askForKeyring(b, machine{}, raw)
	if !errors.Is(err, refusal.KMSUnreachable) {
		t.Errorf("asked for a keyring: %v", err)
	}
	t.Log(s.await(vm, "no answer from KMS", `"code":"kms_tls"`))
}

// TestTheKeyPolicyDecidesOverAConfig walks one enclave through what a key policy
// can say of its config, from no to yes and back.
func TestTheKeyPolicyDecidesOverAConfig(t *testing.T) {
	needVM(t)
	t.Parallel()
	s := newSite(t)
	b := s.underTest()
	mine, other := s.config("mine", proveOften), s.config("other")

	s.admit(b.pcrs[0], other)
	vm, err := s.askForKeyring(b, machine{}, mine)
	if !errors.Is(err, refusal.PolicyForeign) {
		t.Errorf("under a policy for another config: %v", err)
	}

	// The enclave has read a policy that admits it, and then the policy changes.
	s.admit(b.pcrs[0], mine)
	s.beforeKMS("GenerateDataKey", func() { s.admit(b.pcrs[0], other) })
	c := s.connect()
	if _, err := c.CreateKeyring(s.patience()); !errors.Is(err, refusal.KMSDenied) {
		t.Errorf("under a policy that KMS knows better: %v", err)
	}
	s.beforeKMS("", nil)

	s.admit(b.pcrs[0], mine)
	if _, err := c.CreateKeyring(s.patience()); err != nil {
		t.Fatalf("under a policy for this config: %v", err)
	}

	// Retired, an enclave that runs ends.
	s.admit(b.pcrs[0], other)
	t.Log(s.await(vm, `"msg":"enclave ended"`, string(refusal.PolicyForeign)))
	s.off(vm)
}

// Who can change the policy can open it for everybody; no running enclave goes on
// under that.
func TestALooserKeyPolicyEndsARunningEnclave(t *testing.T) {
	needVM(t)
	t.Parallel()
	s := newSite(t)
	b, raw := s.underTest(), s.config("loosened", proveOften)
	s.admit(b.pcrs[0], raw)
	vm, err := s.askForKeyring(b, machine{}, raw)
	if err != nil {
		t.Fatal(err)
	}
	loose := `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":"*","Action":"kms:*","Resource":"*"}]}`
	if err := s.kms.PutKeyPolicy(s.arn, []byte(loose)); err != nil {
		t.Fatal(err)
	}
	t.Log(s.await(vm, `"msg":"enclave ended"`, string(refusal.PolicyLoose)))
	s.off(vm)
}

// The key policy would admit it: what refuses is the enclave's own code.
func TestAnEnclaveInDebugModeGetsNoKey(t *testing.T) {
	needVM(t)
	t.Parallel()
	s := newSite(t)
	b, raw := s.underTest(), s.config("debug")
	s.admit(b.pcrs[0], raw)
	vm, err := s.askForKeyring(b, machine{debug: true}, raw)
	if !errors.Is(err, refusal.DebugEnclave) {
		t.Errorf("asked for a keyring: %v", err)
	}
	s.await(vm, `"msg":"nsm answers"`, `"debug_enclave":true`)
}

func TestADoubtfulMachineSwitchesItselfOff(t *testing.T) {
	needVM(t)
	otherRNG := func(driver []byte) []byte {
		out, err := kmod.Rename(driver, nsmRNG, strings.Repeat("x", len(nsmRNG)))
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	for _, tc := range []struct {
		name    string
		change  func(t *testing.T, b built) built
		machine machine
		want    []string // in one line of the console
	}{
		{name: "there is no NSM", machine: machine{noNSM: true}, want: []string{`"code":"no_nsm"`, "/dev/nsm"}},
		{
			name: "a module is missing", want: []string{`"code":"kernel_module"`, "vsock"},
			change: func(t *testing.T, b built) built {
				t.Helper()
				return b.without(t, "-vsock.ko")
			},
		},
		{name: "the NSM does not feed the kernel's generator", machine: machine{driver: otherRNG}, want: []string{`"code":"entropy_weak"`}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			b := s.underTest()
			if tc.change != nil {
				b = tc.change(t, b)
			}
			vm := s.boot(b, tc.machine)
			line := s.await(vm, append(tc.want, `"level":"ERROR"`)...)
			s.off(vm)
			t.Log(line)
			if strings.Contains(vm.Console(), "panic") {
				t.Errorf("the kernel panicked:\n%s", vm.Console())
			}
		})
	}
}

// The program as nitro-cli packs it: another init has done that one's work, and
// started it as its child. The init is a stand-in for AWS's.
func TestAnotherInitMayStartTheEnclave(t *testing.T) {
	needVM(t)
	t.Parallel()
	s := newSite(t)
	b, raw := s.underBootstrap(), s.config("child")
	s.admit(b.pcrs[0], raw)
	vm, err := s.askForKeyring(b, machine{}, raw)
	if err != nil {
		t.Errorf("asked for a keyring: %v", err)
	}
	s.await(vm, "bootstrap: heartbeat answered")
	s.await(vm, `"msg":"keyring open"`, `"created":true`)
	if strings.Contains(vm.Console(), "init started") {
		t.Errorf("the program took itself for the init:\n%s", vm.Console())
	}
}
