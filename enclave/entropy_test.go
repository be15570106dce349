package enclave_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/enclave"
)

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
		{"the kernel's driver feeds it", "nsm-hwrng\n", nil, nil, 0, true},
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
