package stack_test

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/keyhold/keyhold/infra/stack"
)

func TestScriptsAreCleanInTheEyesOfShellcheck(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("shellcheck"); err != nil {
		if checkAll {
			t.Fatal("shellcheck is missing (Debian: apt-get install shellcheck)")
		}
		t.Skip("shellcheck is missing (Debian: apt-get install shellcheck)")
	}
	dir := t.TempDir()
	files := []string{"../scripts/dist", "../scripts/preflight"}
	for name, text := range stack.TestingOnlyScripts() {
		files = append(files, write(t, filepath.Join(dir, name), text, 0o755))
	}
	out, err := exec.CommandContext(t.Context(), "shellcheck", append([]string{"--external-sources"}, files...)...).CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func write(t *testing.T, path, text string, mode os.FileMode) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	return path
}

// host is a file system below a folder, with the commands of a host that do
// nothing but write down that they were called. The user data's own paths are moved
// below the folder; deploy/install has DESTDIR for that.
type host struct {
	root, bin, bundle string
	sums              []string
	env               map[string]string
}

const hostPCR0 = "ab12" // repeated below to the length of a register

func newHost(t *testing.T, withConfig bool) *host {
	t.Helper()
	h := &host{root: t.TempDir(), bin: t.TempDir(), bundle: t.TempDir()}
	pcr0 := strings.Repeat(hostPCR0, 24)
	for name, text := range map[string]string{
		"dnf":       `mkdir -p "` + h.root + `/etc/logrotate.d"`, // a package brings it
		"systemctl": "", "keyhold-parent": "",
		"aws":   `: >"${!#}"`,
		"unzip": `mkdir -p "$4" && cp -r "` + h.bundle + `/." "$4/"`,
		"nitro-cli": `cat <<END
{
  "Measurements": {
    "HashAlgorithm": "Sha384 { ... }",
    "PCR0": "${FAKE_PCR0}",
    "PCR1": "00"
  }
}
END`,
	} {
		write(t, filepath.Join(h.bin, name), "#!/bin/bash\nset -euo pipefail\nprintf '%s\\n' \""+name+" $*\" >>\""+h.root+"/calls\"\n"+text+"\n", 0o755)
	}
	agent := "#!/bin/bash\nprintf 'agent\\n' >>\"" + h.root + "/calls\"\n"
	write(t, filepath.Join(h.root, "opt/aws/amazon-cloudwatch-agent/bin/amazon-cloudwatch-agent-ctl"), agent, 0o755)

	copyTree(t, "../../deploy", filepath.Join(h.bundle, "deploy"))
	copyTree(t, "../host", filepath.Join(h.bundle, "host"))
	for _, name := range []string{"keyhold.eif", "measurements.json", "keyhold-parent", "keyhold", "lambda/control/bootstrap"} {
		write(t, filepath.Join(h.bundle, name), name, 0o755)
	}
	if withConfig {
		write(t, filepath.Join(h.bundle, "config.json"), "{}\n", 0o644)
	}
	h.sum(t)
	h.env = map[string]string{
		"STACK": "keyhold-test", "REGION": "eu-central-1", "BUNDLE": "s3://bucket/key.zip", "PCR0": pcr0, "MEMORY_MIB": "1024",
		"CPU_COUNT": "2", "TABLE_PREFIX": "keyhold-test-", "ROLE": "arn:aws:iam::111122223333:role/x", "LOGS": "/logs",
	}
	t.Setenv("FAKE_PCR0", pcr0)
	return h
}

func copyTree(t *testing.T, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	if err := filepath.WalkDir(to, func(path string, _ os.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".go") {
			return os.Remove(path)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// sum is what the stack writes into the user data.
func (h *host) sum(t *testing.T) {
	t.Helper()
	err := filepath.WalkDir(h.bundle, func(path string, d os.DirEntry, err error) error {
		rel, _ := filepath.Rel(h.bundle, path)
		if err != nil || d.IsDir() || strings.HasPrefix(rel, "lambda/") {
			return err
		}
		raw, err := os.ReadFile(path)
		s := sha256.Sum256(raw)
		h.sums = append(h.sums, hex.EncodeToString(s[:])+"  "+rel)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// absolute are the paths of a host in the script, at the start of a word or
// behind a colon.
var absolute = regexp.MustCompile(`(^|[\s">:])(/(?:etc|opt|var)/)`)

// boot runs the user data and returns what was called, and what it said.
func (h *host) boot(t *testing.T) (calls []string, output string, err error) {
	t.Helper()
	var head strings.Builder
	head.WriteString("#!/bin/bash\nset -euo pipefail\n")
	for name, value := range h.env {
		fmt.Fprintf(&head, "KEYHOLD_%s='%s'\n", name, value)
	}
	fmt.Fprintf(&head, "KEYHOLD_SUMS='%s'\n", strings.Join(h.sums, "\n"))
	body, _ := strings.CutPrefix(stack.TestingOnlyScripts()["userdata.sh"], "#!/bin/bash\nset -euo pipefail\n")
	body = absolute.ReplaceAllString(body, "${1}"+h.root+"${2}")
	body = strings.ReplaceAll(body, "work=/opt/", "work="+h.root+"/opt/")
	script := write(t, filepath.Join(h.root, "user-data"), head.String()+body, 0o755)
	cmd := exec.CommandContext(t.Context(), "bash", script)
	cmd.Env = append(os.Environ(), "PATH="+h.bin+":"+os.Getenv("PATH"), "DESTDIR="+h.root)
	out, err := cmd.CombinedOutput()
	raw, _ := os.ReadFile(filepath.Join(h.root, "calls"))
	return strings.Split(strings.TrimSpace(string(raw)), "\n"), string(out), err
}

func (h *host) file(t *testing.T, path string) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(h.root, path))
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func TestAHostComesUpWithWhatTheStackSays(t *testing.T) {
	h := newHost(t, true)
	called, out, err := h.boot(t)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	want := []string{
		"dnf install -y --setopt=install_weak_deps=False aws-nitro-enclaves-cli amazon-cloudwatch-agent logrotate unzip",
		"aws s3 cp", "unzip", "nitro-cli describe-eif", "systemctl daemon-reload", "agent", "keyhold-parent doctor",
		"systemctl enable --now nitro-enclaves-allocator.service keyhold-enclave.service keyhold-parent.service keyhold-ready.socket",
	}
	if len(called) != len(want) {
		t.Fatalf("called:\n%s", strings.Join(called, "\n"))
	}
	for i := range want {
		if !strings.HasPrefix(called[i], want[i]) {
			t.Errorf("call %d is %q, want %q", i+1, called[i], want[i])
		}
	}
	// deploy/install keeps the settings that the user data wrote, and installs the rest.
	for path, want := range map[string]string{
		"etc/nitro_enclaves/allocator.yaml":                           "memory_mib: 1024\ncpu_count: 2\n",
		"etc/keyhold/parent.env":                                      "KEYHOLD_TABLE_PREFIX=keyhold-test-\nKEYHOLD_REGION=eu-central-1\n",
		"etc/keyhold/enclave.env":                                     "KEYHOLD_ENCLAVE_CID=16\n",
		"etc/keyhold/config.json":                                     "{}\n",
		"etc/systemd/system/keyhold-parent.service":                   "ExecStart=/usr/bin/keyhold-parent",
		"etc/systemd/system/keyhold-parent.service.d/log.conf":        "append:/var/log/keyhold/keyhold-parent.log",
		"etc/systemd/system/keyhold-enclave.service.d/log.conf":       "append:/var/log/keyhold/keyhold-enclave.log",
		"usr/lib/keyhold/keyhold.eif":                                 "keyhold.eif",
		"opt/aws/amazon-cloudwatch-agent/etc/keyhold-agent.json":      `"log_group_name": "/logs"`,
		"opt/aws/amazon-cloudwatch-agent/etc/keyhold-prometheus.yaml": `stack: "keyhold-test"`,
	} {
		if got := h.file(t, path); !strings.Contains(got, want) || strings.Contains(got, "@STACK@") {
			t.Errorf("%s lacks %q:\n%s", path, want, got)
		}
	}
}

func TestAHostStartsNothingThatIsNotWhatTheStackSays(t *testing.T) {
	for _, test := range []struct {
		name string
		do   func(t *testing.T, h *host)
		want string
	}{
		{"another image", func(t *testing.T, _ *host) {
			t.Helper()
			t.Setenv("FAKE_PCR0", strings.Repeat("0", 96))
		}, "is wanted"},
		{"a file was changed", func(t *testing.T, h *host) {
			t.Helper()
			write(t, filepath.Join(h.bundle, "keyhold-parent"), "other", 0o755)
		}, "keyhold-parent: FAILED"},
		{"a file is missing", func(t *testing.T, h *host) {
			t.Helper()
			if err := os.Remove(filepath.Join(h.bundle, "keyhold")); err != nil {
				t.Fatal(err)
			}
		}, "keyhold: FAILED"},
		{"a file is there that nobody summed", func(t *testing.T, h *host) {
			t.Helper()
			write(t, filepath.Join(h.bundle, "deploy/more"), "more", 0o755)
		}, "files without a digest: deploy/more"},
		{"no package can be had", func(t *testing.T, h *host) {
			t.Helper()
			write(t, filepath.Join(h.bin, "dnf"), "#!/bin/sh\nexit 1\n", 0o755)
		}, ""},
		{"the bundle cannot be had", func(t *testing.T, h *host) {
			t.Helper()
			write(t, filepath.Join(h.bin, "aws"), "#!/bin/sh\nexit 1\n", 0o755)
		}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newHost(t, true)
			test.do(t, h)
			called, out, err := h.boot(t)
			if err == nil || !strings.Contains(out, test.want) {
				t.Errorf("%v, and it said:\n%s", err, out)
			}
			if strings.Contains(strings.Join(called, "\n"), "systemctl enable") {
				t.Error("something was started")
			}
		})
	}
}

func TestWithoutAConfigAHostStartsNothing(t *testing.T) {
	h := newHost(t, false)
	called, out, err := h.boot(t)
	if err != nil || !strings.Contains(out, "there is no config yet") || strings.Contains(strings.Join(called, "\n"), "systemctl enable") {
		t.Errorf("%v\n%s\n%s", err, out, strings.Join(called, "\n"))
	}
}
