package archtest_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// capslockEnv names the capslock program; make capabilities builds it and sets this.
const capslockEnv = "KEYHOLD_CAPSLOCK"

// capability is what capslock says of one package.
type capability struct {
	Package string `json:"packageDir"`
	Name    string `json:"capability"`
	Type    string `json:"capabilityType"`
}

// line is the capability as a baseline has it. Direct means that the package itself calls what gives the
// capability in the standard library; transitive, that some path of calls leads there through other packages,
// interfaces included, which are taken to hold any type that implements them.
func (c capability) line() string {
	return strings.Join([]string{
		c.Package, strings.TrimPrefix(c.Name, "CAPABILITY_"), strings.ToLower(strings.TrimPrefix(c.Type, "CAPABILITY_TYPE_")),
	}, " ")
}

func TestTheCapabilitiesOfEveryLinkedPackageAreThoseOfTheBaseline(t *testing.T) {
	tool := os.Getenv(capslockEnv)
	if tool == "" {
		t.Skipf("%s is not set: make capabilities builds capslock and runs this", capslockEnv)
	}
	for _, tc := range []struct{ root, tags, golden string }{
		{"./cmd/enclave", enclaveTags, "enclave-capabilities.txt"},
		{"./cmd/parent", "", "parent-capabilities.txt"},
	} {
		t.Run(tc.root, func(t *testing.T) {
			got := capabilities(t, tool, tc.root, tc.tags)
			golden := filepath.Join("testdata", tc.golden)
			if *update {
				text := "# written with " + runtime.Version() + " by: make capabilities UPDATE=1\n" + strings.Join(got, "\n") + "\n"
				if err := os.WriteFile(golden, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			header, want := baseline(t, golden)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("what the packages of %s can do has changed; read the code that brings it, then run make capabilities UPDATE=1.\n"+
					"The baseline says %q, this is %s: another standard library can differ too (-want +got):\n%s", tc.root, header, runtime.Version(), diff)
			}
			t.Logf("%d capabilities of packages", len(got))
		})
	}
}

func TestANewCapabilityIsSeen(t *testing.T) {
	tool := os.Getenv(capslockEnv)
	if tool == "" {
		t.Skipf("%s is not set: make capabilities builds capslock and runs this", capslockEnv)
	}
	const dials = "internal/archtest/testdata/dials"
	got := capabilities(t, tool, "./"+dials, enclaveTags)
	for _, name := range []string{"EXEC", "NETWORK"} {
		if line := own(dials) + " " + name + " direct"; !slices.Contains(got, line) {
			t.Errorf("capslock does not see %q, only %q", line, got)
		}
	}
}

// The baselines are read here without the tool, so that the claims of docs/supply-chain.md hold in every run.
func TestTheCapabilityBaselineKeepsTheKeysAwayFromTheWorld(t *testing.T) {
	_, lines := baseline(t, filepath.Join("testdata", "enclave-capabilities.txt"))
	for _, folder := range []string{"enclave/internal/keyring", "enclave/internal/keyring/secp", "enclave/internal/sign", "enclave/internal/secret", "internal/sealed"} {
		for _, name := range []string{"NETWORK", "FILES", "EXEC", "SYSTEM_CALLS", "READ_SYSTEM_STATE", "MODIFY_SYSTEM_STATE"} {
			if line := own(folder) + " " + name + " direct"; slices.Contains(lines, line) {
				t.Errorf("the baseline grants: %s", line)
			}
		}
	}
	for _, line := range lines {
		if strings.Contains(line, " EXEC ") {
			t.Errorf("the enclave starts a process: %s", line)
		}
	}
	// This one is there, so the spelling of the search is right.
	if line := own("enclave/internal/keyring/secp") + " CGO direct"; !slices.Contains(lines, line) {
		t.Errorf("the baseline lacks: %s", line)
	}
}

// capabilities asks capslock about every package that root links and that is not of the standard library,
// whose capabilities capslock knows by itself.
func capabilities(t *testing.T, tool, root, tags string) []string {
	t.Helper()
	packages := goList(t, "-deps", "-tags", tags, "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", root)
	packages = slices.DeleteFunc(packages, func(s string) bool { return s == "" })
	cmd := exec.CommandContext(t.Context(), tool, "-packages", strings.Join(packages, ","), "-buildtags", tags,
		"-force_local_module", "-granularity", "package", "-omit_paths", "-output", "json")
	cmd.Dir = moduleRoot(t)
	cmd.Env = append(os.Environ(), "GOWORK=off", "CGO_ENABLED=1", "GOFLAGS=")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("capslock: %v\n%s", err, stderr.Bytes())
	}
	var report struct {
		CapabilityInfo []capability `json:"capabilityInfo"`
	}
	if err := json.Unmarshal(out, &report); err != nil {
		t.Fatalf("read the answer of capslock: %v", err)
	}
	var lines []string
	for _, c := range report.CapabilityInfo {
		lines = append(lines, c.line())
	}
	slices.Sort(lines)
	return slices.Compact(lines)
}

// baseline returns the first line of a baseline, which says what wrote it, and the others.
func baseline(t *testing.T, name string) (header string, lines []string) {
	t.Helper()
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatalf("read the baseline (write it with make capabilities UPDATE=1): %v", err)
	}
	lines = strings.Split(strings.TrimSpace(string(raw)), "\n")
	return strings.TrimPrefix(lines[0], "# "), lines[1:]
}
