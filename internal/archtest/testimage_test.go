package archtest_test

import (
	"bytes"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	testImage = "cmd/internal/guest/testimage"

	// rootFile is where the image under test has the root of its KMS.
	rootFile = "kms-root.pem"

	// maxEnclave is the size in bytes that the program may have. With a kernel of about 12 MB and its modules the
	// image stays below 30 MB, and a host gives an enclave at least four times its image.
	maxEnclave = 13 << 20
)

// What was found out with the image under test holds for the shipped one if both are the same program: see also
// TestTheTwoMainsDifferInTheirRootsAlone.
func TestTheImageUnderTestIsTheShippedOneButForItsMain(t *testing.T) {
	needs(t, testImage)
	all := packages(t)
	shipped := slices.DeleteFunc(slices.Clone(all[own("cmd/enclave")]), func(p string) bool { return p == "embed" })
	tested := all[own(testImage)]
	slices.Sort(shipped)
	tested = slices.Sorted(slices.Values(tested))
	if diff := cmp.Diff(shipped, tested); diff != "" {
		t.Errorf("packages (-shipped +tested):\n%s", diff)
	}
	if diff := cmp.Diff(linkedModules(t, "./cmd/enclave", enclaveTags), linkedModules(t, "./"+testImage, enclaveTags)); diff != "" {
		t.Errorf("modules (-shipped +tested):\n%s", diff)
	}
}

func TestTheShippedEnclaveIsSmallAndKnowsNoRootsButItsOwn(t *testing.T) {
	if testing.Short() {
		t.Skip("links two programs")
	}
	line := buildLine(t, "keyhold-enclave")
	shipped := contents(t, build(t, moduleRoot(t), line, "keyhold-enclave"))
	if len(shipped) > maxEnclave {
		t.Errorf("the enclave has %d bytes, more than %d: what has come in?", len(shipped), maxEnclave)
	}
	if bytes.Contains(shipped, []byte(rootFile)) {
		t.Errorf("the shipped enclave names %s: can it be given other roots?", rootFile)
	}
	tested := contents(t, build(t, moduleRoot(t), strings.Replace(line, "./cmd/enclave", "./"+testImage, 1), "keyhold-enclave"))
	if !bytes.Contains(tested, []byte(rootFile)) {
		t.Error("the search does not find the name where it is: it proves nothing")
	}
	t.Logf("%d bytes shipped, %d under test", len(shipped), len(tested))
}

func contents(t *testing.T, name string) []byte {
	t.Helper()
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}
