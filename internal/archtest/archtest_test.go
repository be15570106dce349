// Package archtest holds the import rules that the compiler and depguard cannot: what a program or a
// package reaches through others. It has tests only.
package archtest_test

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const module = "github.com/keyhold/keyhold"

// enclaveTags are the build tags of the image, as in the Makefile's ENCLAVE_TAGS.
const enclaveTags = "netgo,osusergo"

// example is a package whose imports are known.
const example = "internal/archtest/testdata/reaches"

// trees are the folders that the programs are built of.
var trees = []string{"attestation", "cmd", "enclave", "internal", "keypolicy", "parent"}

var update = flag.Bool("update", false, "write the golden files anew")

// A rule says what root must not reach, directly or through others, tests left aside.
type rule struct {
	root   string   // a package of this module, or a tree ending in /...
	except []string // packages of the tree that the rule spares
	banned []string // packages, with all below them; a trailing $ means that package alone
	why    string
}

const (
	sdk   = "github.com/aws/aws-sdk-go-v2"
	hfNSM = "github.com/hf/nsm"
	vsock = "github.com/mdlayher/vsock"
)

func own(path string) string { return module + "/" + path }

// testOnly is what no shipped program links.
var testOnly = []string{
	own("internal/awslocal"), own("internal/bench"), own("internal/checker"), own("internal/e2e"), own("internal/mutant"), own("internal/sim"), own("internal/soak"), own("internal/vmtest"),
	own("attestation/nsmtest"), own("enclave/enclavetest"), own("enclave/hostile"), own("parent/store/storetest"),
	"testing", "net/http/httptest", "github.com/google/go-cmp", "pgregory.net/rapid", "go.uber.org/goleak",
}

var rules = []rule{
	{
		root: "parent/...", banned: []string{own("enclave"), hfNSM, own("attestation/nsm$")},
		why: "the parent never links code that sees a plaintext key",
	},
	{
		root: "cmd/parent", banned: []string{own("enclave"), hfNSM, own("attestation/nsm$")},
		why: "the parent never links code that sees a plaintext key",
	},
	{
		root: "cmd/keyhold", banned: []string{own("enclave"), hfNSM, own("attestation/nsm$")},
		why: "the operator's tool never links code that sees a plaintext key",
	},
	{
		root: "enclave/...", except: []string{"enclave/enclavetest"}, banned: []string{own("parent"), own("cmd")},
		why: "the enclave knows nothing of the queue, they meet as bytes",
	},
	{
		root: "cmd/enclave", banned: []string{own("parent")},
		why: "the enclave knows nothing of the queue, they meet as bytes",
	},
	{
		root: "cmd/enclave", banned: []string{own("attestation$"), "github.com/hf/nitrite"},
		why: "the verifier is no part of the image, so its parser is no part of what PCR0 vouches for",
	},
	{
		root: "cmd/enclave", banned: []string{
			"net/http/pprof", "expvar", "net/rpc", "plugin", "os/exec",
			sdk + "/config", sdk + "/feature/ec2/imds", sdk + "/service/dynamodb", sdk + "/service/sso", sdk + "/service/sts",
			"github.com/prometheus", "github.com/spf13/cobra",
		},
		why: "no debug endpoint, no child process, no configuration from the environment inside the image",
	},
	{root: "cmd/enclave", banned: testOnly, why: "emulators and test kits stay out of production"},
	{root: "cmd/parent", banned: testOnly, why: "emulators and test kits stay out of production"},
	{root: "cmd/keyhold", banned: testOnly, why: "emulators and test kits stay out of production"},
	{root: "enclave/...", except: []string{"enclave/enclavetest"}, banned: []string{vsock}, why: "vsock appears in cmd alone: below it a net.Listener is enough"},
	{root: "parent/...", banned: []string{vsock}, why: "vsock appears in cmd alone: below it a dial function is enough"},
	{root: "attestation/...", banned: []string{vsock, sdk, own("internal"), own("enclave"), own("parent"), own("keypolicy")}, why: "attestation is a library for everybody"},
	{
		root: "attestation", banned: []string{hfNSM, own("attestation/nsm"), own("attestation/nsmtest")},
		why: "who verifies needs no NSM",
	},
	{
		root: "enclave/internal/keyring", banned: []string{
			// net and log come with crypto/x509 and the refusing LogValue of secrets;
			// depguard forbids the keyring to import them itself.
			sdk, "net/http", "os/exec", own("attestation"), own("internal/wire"), own("enclave/internal/kms"), own("enclave/internal/serve"),
		},
		why: "plaintext scalars live where nothing is sent",
	},
	{
		root: "enclave/internal/sign", banned: []string{sdk, "net/http", "os/exec", own("enclave/internal/serve"), own("enclave/internal/kms")},
		why: "the batch rules do no I/O",
	},
	{root: "parent/pipeline", banned: []string{sdk, own("parent/store/dynamo"), own("parent/store/memory")}, why: "the pipeline knows the store by its contract"},
	{root: "parent/lease", banned: []string{sdk, own("parent/store/dynamo"), own("parent/store/memory")}, why: "the lease rules know the store by its contract"},
	{root: "parent/intake", banned: []string{sdk, own("parent/store/dynamo"), own("parent/store/memory")}, why: "the intake knows the store by its contract"},
	{root: "parent/watch", banned: []string{sdk, own("parent/store"), own("parent/pipeline")}, why: "who starts enclaves has nothing to do with records"},
	{root: "enclave/internal/logring", banned: []string{sdk, "net/http", "os/exec", own("enclave/internal/keyring"), own("enclave/internal/sign")}, why: "who keeps log lines knows no key"},
	{root: "parent/signclient", banned: []string{sdk, own("parent/store")}, why: "the wire client knows neither store nor AWS"},
	{root: "parent/store", banned: []string{sdk, own("parent/store/dynamo"), own("parent/store/memory")}, why: "the contract stands above its implementations"},
	{
		root: "internal/checker", banned: []string{
			own("enclave"), own("parent"), own("attestation"), own("internal/canonical"), own("internal/config"), own("internal/payload"),
			own("internal/receipt"), own("internal/record"), own("internal/sealed"), own("internal/wire"), "github.com/ethereum",
		},
		why: "who judges a run reads everything with code of its own",
	},
	{root: "internal/config", banned: []string{sdk, own("enclave"), own("parent")}, why: "libraries stand below both sides"},
	{root: "internal/payload", banned: []string{sdk, own("enclave"), own("parent")}, why: "libraries stand below both sides"},
	{root: "internal/receipt", banned: []string{sdk, own("enclave"), own("parent")}, why: "libraries stand below both sides"},
	{root: "internal/refusal", banned: []string{sdk, own("enclave"), own("parent")}, why: "libraries stand below both sides"},
	{root: "internal/sealed", banned: []string{sdk, own("enclave"), own("parent"), "crypto/hkdf"}, why: "the keyring's format cannot be opened by who reads it"},
	{root: "internal/wire", banned: []string{sdk, own("enclave"), own("parent")}, why: "libraries stand below both sides"},
	{
		root: "internal/eif/...", banned: []string{sdk, own("enclave"), own("parent"), own("attestation"), own("internal/wire"), "net/http", "os/exec"},
		why: "who judges an image is given bytes",
	},
	{
		root: "internal/image", banned: []string{sdk, own("enclave"), own("parent"), own("attestation"), own("internal/image/imagetest"), "net/http", "os/exec"},
		why: "who builds an image reads files and calls nobody",
	},
	{root: "keypolicy", banned: []string{module, "net", "golang.org", "github.com"}, why: "the lock is judged by the standard library alone, inside the image and outside"},
	{root: "internal/record", banned: []string{module, "net", "crypto", "golang.org", "github.com"}, why: "record is plain data on the standard library"},
}

func TestNoPackageReachesWhatItMustNot(t *testing.T) {
	all := packages(t)
	for _, r := range rules {
		t.Run(r.root, func(t *testing.T) {
			needs(t, strings.TrimSuffix(r.root, "/..."))
			for pkg, deps := range all {
				if !r.covers(pkg) {
					continue
				}
				for _, dep := range deps {
					if !r.allows(dep) {
						t.Errorf("%s reaches %s: %s", pkg, dep, r.why)
					}
				}
			}
		})
	}
}

func TestARuleCatchesWhatItNames(t *testing.T) {
	r := rule{banned: []string{own("enclave"), own("attestation$"), "net"}}
	for _, tc := range []struct {
		dep  string
		want bool
	}{
		{own("enclave"), false},
		{own("enclave/internal/keyring"), false},
		{own("enclaves"), true},
		{own("attestation"), false},
		{own("attestation/nsm"), true},
		{"net/http", false},
		{"vendor/golang.org/x/net/idna", true},
		{"crypto/sha256", true},
	} {
		if got := r.allows(tc.dep); got != tc.want {
			t.Errorf("%s allowed: %v, want %v", tc.dep, got, tc.want)
		}
	}
}

func TestARuleCoversItsTreeAndNoOther(t *testing.T) {
	tree := rule{root: "enclave/...", except: []string{"enclave/enclavetest"}}
	for _, tc := range []struct {
		rule rule
		pkg  string
		want bool
	}{
		{tree, own("enclave"), true},
		{tree, own("enclave/internal/boot"), true},
		{tree, own("enclave/enclavetest"), false},
		{tree, own("cmd/enclave"), false},
		{tree, own("enclaves"), false},
		{rule{root: "attestation"}, own("attestation"), true},
		{rule{root: "attestation"}, own("attestation/nsm"), false},
	} {
		if got := tc.rule.covers(tc.pkg); got != tc.want {
			t.Errorf("%s covers %s: %v, want %v", tc.rule.root, tc.pkg, got, tc.want)
		}
	}
}

func TestAnImportThroughAnotherPackageIsSeen(t *testing.T) {
	deps := packages(t)[own(example)]
	for _, want := range []string{own("internal/awshttp"), sdk + "/aws", "net/http"} {
		if !slices.Contains(deps, want) {
			t.Errorf("the dependencies of %s lack %s: %q", example, want, deps)
		}
	}
}

func TestTheEnclaveLinksTheModulesOnTheList(t *testing.T) {
	needs(t, "cmd/enclave")
	text := strings.Join(linkedModules(t, "./cmd/enclave", enclaveTags), "\n") + "\n"

	golden := filepath.Join("testdata", "enclave-modules.txt")
	if *update {
		if err := os.WriteFile(golden, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatalf("read the list (write it with: go test ./internal/archtest -update): %v", err)
	}
	if diff := cmp.Diff(string(want), text); diff != "" {
		t.Errorf("cmd/enclave links other modules than %s says; each one is trusted with the keys, "+
			"so read what it brings, then run go test ./internal/archtest -update (-want +got):\n%s", golden, diff)
	}
}

func TestTheEnclaveDoesNotBuildWithoutCgo(t *testing.T) {
	needs(t, "cmd/enclave")
	cmd := goCommand(t, "build", "-tags", enclaveTags, "-o", os.DevNull, "./cmd/enclave")
	cmd.Env = append(cmd.Env, "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Fatal("the enclave builds without cgo, with a secp256k1 whose time depends on the key")
	}
	if !bytes.Contains(bytes.ToLower(out), []byte("cgo")) {
		t.Errorf("the build fails, but for another reason than the missing cgo:\n%s", out)
	}
}

func TestTheMakefileBuildsTheEnclaveWithTheTagsTestedHere(t *testing.T) {
	makefile, err := os.ReadFile(filepath.Join(moduleRoot(t), "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(makefile)) {
		if value, ok := strings.CutPrefix(line, "ENCLAVE_TAGS"); ok {
			if tags := strings.TrimSpace(strings.TrimLeft(value, " :=")); tags != enclaveTags {
				t.Errorf("the Makefile's tags are %q, want %q", tags, enclaveTags)
			}
			return
		}
	}
	t.Error("the Makefile sets no ENCLAVE_TAGS")
}

// linkedModules returns the modules and versions that a program links, this one left aside.
func linkedModules(t *testing.T, root, tags string) []string {
	t.Helper()
	out := goList(t, "-deps", "-tags", tags, "-f", "{{with .Module}}{{.Path}} {{.Version}}{{end}}", root)
	got := slices.Compact(slices.Sorted(slices.Values(out)))
	return slices.DeleteFunc(got, func(line string) bool {
		return line == "" || strings.TrimSpace(line) == module // the standard library; ourselves
	})
}

// allows tells whether the rule has nothing against a package.
func (r rule) allows(pkg string) bool {
	for _, banned := range r.banned {
		exact, only := strings.CutSuffix(banned, "$")
		if pkg == exact || !only && under(pkg, banned) {
			return false
		}
	}
	return true
}

// covers tells whether the rule is about a package.
func (r rule) covers(pkg string) bool {
	folder, tree := strings.CutSuffix(r.root, "/...")
	if pkg == own(folder) {
		return true
	}
	spared := slices.ContainsFunc(r.except, func(e string) bool { return under(pkg, own(e)) })
	return tree && under(pkg, own(folder)) && !spared
}

// under tells whether pkg is root or lies below it.
func under(pkg, root string) bool {
	return pkg == root || strings.HasPrefix(pkg, root+"/")
}

// needs skips a test whose package is still to come, as long as the module's scaffold stands.
func needs(t *testing.T, folder string) {
	t.Helper()
	for pkg := range packages(t) {
		if under(pkg, own(folder)) {
			return
		}
	}
	t.Fatalf("%s does not exist: a rule about nothing is kept by everything", folder)
}

// listed is the answer of the one call of go list that all tests share.
var listed struct {
	once     sync.Once
	packages map[string][]string
}

// packages maps every package of the module, and the example, to all it imports, directly or through
// others, as the image is built: with cgo and its tags, without tests.
func packages(t *testing.T) map[string][]string {
	t.Helper()
	listed.once.Do(func() {
		watch(t)
		lines := goList(t, "-tags", enclaveTags, "-f", "{{.ImportPath}}{{range .Deps}} {{.}}{{end}}", "./...", "./"+example)
		listed.packages = make(map[string][]string, len(lines))
		for _, line := range lines {
			fields := strings.Fields(line)
			listed.packages[fields[0]] = fields[1:]
		}
	})
	if listed.packages == nil {
		t.Fatal("the packages of the module could not be listed")
	}
	return listed.packages
}

// watch reads the module's folders, because go test takes an old result for this one unless a file
// changed that the test itself looked at: it does not see what go list reads.
func watch(t *testing.T) {
	t.Helper()
	for _, tree := range trees {
		err := filepath.WalkDir(filepath.Join(moduleRoot(t), tree), func(_ string, _ fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		})
		if err != nil {
			t.Fatalf("look at %s: %v", tree, err)
		}
	}
}

func goList(t *testing.T, args ...string) []string {
	t.Helper()
	cmd := goCommand(t, append([]string{"list"}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list %s: %v\n%s", strings.Join(args, " "), err, stderr.Bytes())
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

func goCommand(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Dir = moduleRoot(t)
	cmd.Env = append(os.Environ(), "GOWORK=off", "CGO_ENABLED=1")
	return cmd
}

// moduleRoot is two folders up: a test runs in its package's folder.
func moduleRoot(t *testing.T) string {
	t.Helper()
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(fmt.Errorf("find the module: %w", err))
	}
	return root
}
