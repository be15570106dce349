package enclave_test

import (
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/enclave"
)

// zeros is an NSM whose generator is dead.
type zeros struct{ nsm.Session }

func (zeros) Random(p []byte) error {
	clear(p)
	return nil
}

func TestZerosAreNoEntropy(t *testing.T) {
	credited := false
	err := enclave.TestingOnlyCheckEntropy(zeros{}, filepath.Join(t.TempDir(), "rng_current"), func([]byte) error {
		credited = true
		return nil
	})
	if err == nil || credited {
		t.Errorf("got %v, credited %t", err, credited)
	}
}

// The bytes here are the kernel's own, so its generator gets no worse.
func TestThisKernelTakesACredit(t *testing.T) {
	b := make([]byte, 64)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	err := enclave.TestingOnlyCreditKernel(b)
	if errors.Is(err, unix.EPERM) || errors.Is(err, fs.ErrPermission) {
		t.Skip("only root may credit entropy to the kernel")
	}
	if errors.Is(err, unix.ENOTTY) {
		t.Skip("this machine's kernel is no Linux that has the request")
	}
	if err != nil {
		t.Error(err)
	}
}

func TestOnlyAGeneratorThatTheNSMFeedsIsTrusted(t *testing.T) {
	const none = "no file"
	for _, tc := range []struct {
		name     string
		current  string // content of rng_current
		random   error  // of the NSM
		credit   error  // of the kernel
		credited int    // bytes
		ok       bool
	}{
		{"the kernel's driver feeds it", "nsm-hwrng\n", nil, nil, 64, true},
		{"the kernel's driver and a silent NSM", "nsm-hwrng\n", errors.New("silent"), nil, 0, false},
		{"the kernel's driver and a kernel that takes nothing", "nsm-hwrng\n", nil, errors.New("refused"), 64, false},
		{"another source feeds it", "tpm-rng-0\n", nil, nil, 0, false},
		{"a source whose name starts alike", "nsm-hwrng-2\n", nil, nil, 0, false},
		{"no source", "none\n", nil, nil, 0, false},
		{"an older kernel takes bytes of the NSM", none, nil, nil, 64, true},
		{"an older kernel and a silent NSM", none, errors.New("silent"), nil, 0, false},
		{"an older kernel that refuses them", none, nil, errors.New("refused"), 64, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ca, err := nsmtest.NewCA(nil)
			if err != nil {
				t.Fatal(err)
			}
			device, err := nsmtest.New(ca, nsmtest.Options{
				PCRs:   nsmtest.Measurements(image),
				Faults: nsmtest.Faults{Fault: func(string) error { return tc.random }},
			})
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(t.TempDir(), "rng_current")
			if tc.current != none {
				if err := os.WriteFile(path, []byte(tc.current), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			credited := 0
			err = enclave.TestingOnlyCheckEntropy(device, path, func(b []byte) error {
				credited = len(b)
				return tc.credit
			})
			if (err == nil) != tc.ok || credited != tc.credited {
				t.Errorf("got %v with %d bytes credited, want ok %t and %d", err, credited, tc.ok, tc.credited)
			}
		})
	}
}
