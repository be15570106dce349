package main

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/receipt"
)

// vectors is beside the module root and no part of the repository: real
// documents that others published.
var vectors = filepath.Join("..", "..", "..", "shared", "vectors", "attestation")

func needVector(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(vectors, name)
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		t.Skip("no real documents: put the folder shared/vectors beside the module root")
	}
	return path
}

// attest runs the command and returns its JSON, its exit code and its stderr.
func attest(t *testing.T, args ...string) (r attestReport, exit int, stderr string) {
	t.Helper()
	for _, name := range []string{cli.EnvEnclave, cli.EnvConfig, cli.EnvPCR0, cli.EnvMeasurements, cli.EnvTestRoot} {
		t.Setenv(name, "")
	}
	var out, errs bytes.Buffer
	root := newRoot()
	root.SetOut(&out)
	root.SetErr(&errs)
	root.SetArgs(append([]string{"attest", "--json"}, args...))
	exit = cli.Run(t.Context(), root)
	if out.Len() > 0 {
		if err := json.Unmarshal(out.Bytes(), &r); err != nil {
			t.Fatal(err)
		}
	}
	return r, exit, errs.String()
}

func failedOf(r attestReport) (names []string) {
	for _, c := range r.Checks {
		if !c.OK {
			names = append(names, c.Name)
		}
	}
	return names
}

const productionPCR0 = "5fec1b73727425848d725d68f4a062c634061a035067bd0b9a6dc73e25ed5013dfe7ccbf8a7e9857eceb0841c4cb6ae6"

// Amazon signed it and its image is the wanted one, but it is no Keyhold.
func TestARealDocumentOfAnotherProgramIsRefusedForItsPurposeAlone(t *testing.T) {
	r, exit, stderr := attest(t, "--document", needVector(t, "production-2024-08-07.b64"), "--pcr0", productionPCR0, "--any-config")
	if exit != 1 || r.Verified || !strings.Contains(stderr, "its user data is not that of a Keyhold document") {
		t.Errorf("exit code %d, verified %v, stderr %s", exit, r.Verified, stderr)
	}
	if diff := cmp.Diff([]string{"purpose"}, failedOf(r)); diff != "" {
		t.Error(diff)
	}
	const amazon = "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"
	if len(r.Certificates) != 5 || r.Certificates[0].SHA256 != amazon || r.Certificates[0].Subject != "aws.nitro-enclaves" {
		t.Errorf("the chain is %+v", r.Certificates)
	}
	if r.ModuleID != "i-084e1dd2f1b2c529b-enc0190fecc5b166251" || !strings.HasPrefix(r.Time, "2024-08-07T06:43:12") {
		t.Errorf("module %s at %s", r.ModuleID, r.Time)
	}
}

func TestARealDocumentNamesEachRegisterThatIsNotAsWanted(t *testing.T) {
	other := strings.Repeat("11", 48)
	r, exit, stderr := attest(t, "--document", needVector(t, "production-2024-08-07.b64"), "--pcr0", other, "--any-config",
		"--instance-id", "i-084e1dd2f1b2c529b", "--role-arn", "arn:aws:iam::111122223333:role/nobody")
	if exit != 1 || !strings.HasSuffix(strings.TrimSpace(stderr), "not as wanted: purpose, PCR0, PCR3") {
		t.Errorf("exit code %d, stderr %s", exit, stderr)
	}
	// Amazon's own computation of PCR4 agrees with ours: it is not among them.
	if diff := cmp.Diff([]string{"purpose", "PCR0", "PCR3"}, failedOf(r)); diff != "" {
		t.Error(diff)
	}
}

func TestARealDebugDocumentIsRefusedAsOne(t *testing.T) {
	r, exit, stderr := attest(t, "--document", needVector(t, "debug-2023-09-18.b64"), "--pcr0", strings.Repeat("11", 48), "--any-config")
	if exit != 1 || !strings.Contains(stderr, "debug mode") {
		t.Errorf("exit code %d, stderr %s", exit, stderr)
	}
	if diff := cmp.Diff([]string{"purpose", "PCR0"}, failedOf(r)); diff != "" {
		t.Error(diff)
	}
	if a := r.Checks[len(r.Checks)-1].Advice; !strings.Contains(a, "without --debug-mode") {
		t.Errorf("the advice is %q", a)
	}
}

// The value is the one in the Nitro Enclaves User Guide.
func TestTheRoleRegisterIsThatOfTheNitroUserGuide(t *testing.T) {
	o := attestOptions{role: "arn:aws:iam::123456789012:role/Webserver"}
	got, err := o.hostRegisters()
	if err != nil {
		t.Fatal(err)
	}
	const want = "78fce75db17cd4e0a3fb8dad3ad128ca5e77edbb2b2c7f75329dccd99aa5f6ef4fc1f1a452e315b9e98f9e312e6921e6"
	if diff := cmp.Diff(map[int]string{rolePCR: want}, hexOf(got)); diff != "" {
		t.Error(diff)
	}
}

// challenged is a document for a nonce, as an enclave with this receipt key
// shows it, and what a verifier that wants just that makes of it.
func challenged(t *testing.T) (*shown, *wanted) {
	t.Helper()
	ca, err := nsmtest.NewCA(nil)
	if err != nil {
		t.Fatal(err)
	}
	n, err := nsmtest.New(ca, nsmtest.Options{PCRs: nsmtest.Measurements("x")})
	if err != nil {
		t.Fatal(err)
	}
	nonce := bytes.Repeat([]byte{7}, nonceLen)
	raw, err := n.Attest(nsm.AttestRequest{Nonce: nonce, UserData: receipt.UserData(receipt.KindChallenge, nil), PublicKey: make([]byte, 32)})
	if err != nil {
		t.Fatal(err)
	}
	doc, err := attestation.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	w := &wanted{root: attestation.TestRoot(ca.Root()), images: []attestation.Image{{PCRs: nsmtest.Measurements("x")}}}
	return &shown{raw: raw, doc: doc, nonce: nonce, at: time.Now()}, w
}

func TestWhatIsRefusedNamesAPart(t *testing.T) {
	other := []attestation.Image{{PCRs: map[int][]byte{0: bytes.Repeat([]byte{1}, 48)}}}
	for _, tc := range []struct {
		name    string
		edit    func(s *shown, w *wanted)
		failed  []string
		problem string // in the error; empty: none
	}{
		{"all as wanted", func(*shown, *wanted) {}, nil, ""},
		{"a statement of another boot", func(s *shown, _ *wanted) { s.refused = errBoot }, []string{"boot"}, "not as wanted: boot"},
		{"another nonce", func(s *shown, _ *wanted) { s.nonce, s.refused = make([]byte, nonceLen), attestation.ErrNonce }, []string{"time"}, "not as wanted: time"},
		{"an hour later", func(s *shown, _ *wanted) { s.at, s.refused = s.at.Add(time.Hour), attestation.ErrStale }, []string{"time"}, "not as wanted: time"},
		{"certificates that are over", func(s *shown, _ *wanted) { s.at, s.refused = s.at.Add(9*time.Hour), attestation.ErrCertificateTime }, []string{"signature"}, "signature"},
		{"another root", func(s *shown, w *wanted) { w.root, s.refused = attestation.AWSRoot(), attestation.ErrRoot }, []string{"signature"}, "signature"},
		{"a document for KMS", func(s *shown, _ *wanted) { s.doc.UserData, s.refused = receipt.UserData(receipt.KindKMS, nil), errBoot }, []string{"purpose"}, "purpose"},
		{"no document", func(s *shown, _ *wanted) { s.doc, s.refused = nil, attestation.ErrCOSE }, []string{"form"}, "form"},
		{"another image", func(s *shown, w *wanted) { w.images, s.refused = other, attestation.ErrPCRMismatch }, []string{"PCR0"}, "PCR0"},
		// No document does this; were one to, it is refused.
		{"accepted, but a part differs", func(_ *shown, w *wanted) { w.images = other }, []string{"PCR0"}, errInconsistent.Error()},
	} {
		s, w := challenged(t)
		tc.edit(s, w)
		r := &attestReport{}
		r.fill(s, w, &attestOptions{any: true})
		if diff := cmp.Diff(tc.failed, failedOf(*r)); diff != "" {
			t.Errorf("%s: %s", tc.name, diff)
		}
		for _, c := range r.Checks {
			if c.OK != (c.Advice == "") {
				t.Errorf("%s: %s is %v, with the advice %q", tc.name, c.Name, c.OK, c.Advice)
			}
		}
		refused := s.refused != nil
		if refused != (tc.problem != "") || r.Verified == refused || (refused && !strings.Contains(*r.Problem, tc.problem)) {
			t.Errorf("%s: verified %v, %v", tc.name, r.Verified, s.refused)
		}
	}
}

func hexOf(registers map[int][]byte) map[int]string {
	out := map[int]string{}
	for i, v := range registers {
		out[i] = hex.EncodeToString(v)
	}
	return out
}

// A name in a certificate that nobody has verified must not steer a terminal.
func TestNamesAreShownWithoutControlCharacters(t *testing.T) {
	if got := printable("a\x1b[2J\u202eb\n"); got != "a?[2J?b?" {
		t.Errorf("got %q", got)
	}
}

func TestAgesAreShownInTheUnitThatFits(t *testing.T) {
	for seconds, want := range map[float64]string{-0.5: "-0.5 s", 3: "3.0 s", 599: "599.0 s", 3600: "1.0 hours", 48 * 3600: "2 days", 1e8: "1157 days"} {
		if got := age(seconds); got != want {
			t.Errorf("%v s: got %q, want %q", seconds, got, want)
		}
	}
}
