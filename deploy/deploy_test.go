// Package deploy_test checks the files that a host gets: that systemd takes them
// without a word, how far they are closed, and that they fit the programs. It
// has tests only.
package deploy_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// exposure is what systemd-analyze security may say at most, in tenths; docs/host.md states the same.
// What is left of it is reasoned there.
const exposure = 13

var units = []string{"keyhold-enclave.service", "keyhold-parent.service"}

// allocator stands for the unit of the package aws-nitro-enclaves-cli, which our drop-in extends.
const allocator = `[Unit]
Description=Nitro Enclaves allocator
DefaultDependencies=no
After=sysinit.target

[Service]
Type=oneshot
ExecStart=/usr/bin/nitro-enclaves-allocator

[Install]
WantedBy=multi-user.target
`

// tool returns a program of systemd.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err == nil {
		return path
	}
	const text = "%s is not installed (Debian: apt-get install systemd)"
	if os.Getenv("KEYHOLD_REQUIRE_SERVICES") == "1" {
		t.Fatalf(text, name)
	}
	t.Skipf(text, name)
	return ""
}

// run returns what a program printed, on both streams, and its exit code.
func run(t *testing.T, env []string, name string, args ...string) (string, int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", name, err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// host installs into a new root that has systemd's own targets.
func host(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	own := "/usr/lib/systemd/system"
	for _, pattern := range []string{"*.target", "*.slice", "*.socket"} {
		files, err := filepath.Glob(filepath.Join(own, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if info, err := os.Stat(f); err == nil && info.Mode().IsRegular() {
				write(t, filepath.Join(root, own, filepath.Base(f)), read(t, f), 0o644)
			}
		}
	}
	write(t, filepath.Join(root, own, "nitro-enclaves-allocator.service"), allocator, 0o644)
	for _, program := range []string{"keyhold-parent", "nitro-enclaves-allocator"} {
		write(t, filepath.Join(root, "usr/bin", program), "#!/bin/sh\n", 0o755)
	}
	if out, code := run(t, []string{"DESTDIR=" + root}, "./install"); code != 0 {
		t.Fatalf("install: %s", out)
	}
	return root
}

func TestSystemdTakesTheUnitsWithoutAWord(t *testing.T) {
	analyze := tool(t, "systemd-analyze")
	root := host(t)
	for _, path := range []string{
		"etc/systemd/system/keyhold-enclave.service", "etc/systemd/system/keyhold-parent.service", "usr/lib/systemd/system/nitro-enclaves-allocator.service",
	} {
		// A setting that systemd does not know is a line of output and no failure.
		if out, code := run(t, nil, analyze, "verify", "--man=no", "--root="+root, filepath.Join(root, path)); code != 0 || out != "" {
			t.Errorf("%s: exit %d\n%s", path, code, out)
		}
	}
	drop := filepath.Join(root, "etc/systemd/system/nitro-enclaves-allocator.service.d/keyhold.conf")
	write(t, drop, read(t, drop)+"RemainAfterExitt=yes\n", 0o644)
	if out, _ := run(t, nil, analyze, "verify", "--man=no", "--root="+root, filepath.Join(root, "usr/lib/systemd/system/nitro-enclaves-allocator.service")); !strings.Contains(out, "RemainAfterExitt") {
		t.Errorf("a mistake in the drop-in is not seen: %q", out)
	}
}

func TestTheUnitsAreAsClosedAsTheDocsSay(t *testing.T) {
	analyze := tool(t, "systemd-analyze")
	root := host(t)
	overall := regexp.MustCompile(`Overall exposure level for (\S+): (\d+)\.(\d)`)
	docs := read(t, "../docs/host.md")
	for _, unit := range units {
		out, code := run(t, nil, analyze, "security", "--no-pager", "--offline=true", "--root="+root,
			"--threshold="+strconv.Itoa(exposure), filepath.Join(root, "etc/systemd/system", unit))
		m := overall.FindStringSubmatch(out)
		if code != 0 || m == nil {
			t.Errorf("%s: exit %d\n%s", unit, code, out)
			continue
		}
		if line := fmt.Sprintf("| `%s` | %s.%s |", unit, m[2], m[3]); !strings.Contains(docs, line) {
			t.Errorf("docs/host.md lacks the line %q", line)
		}
	}
}

func TestUsersAndFoldersCanBeMade(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("systemd-sysusers makes users as root alone, in another root folder too")
	}
	sysusers := tool(t, "systemd-sysusers")
	root := host(t)
	write(t, filepath.Join(root, "etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n", 0o644)
	write(t, filepath.Join(root, "etc/group"), "root:x:0:\n", 0o644)
	if out, code := run(t, nil, sysusers, "--root="+root); code != 0 {
		t.Fatalf("exit %d: %s", code, out)
	}
	for _, line := range []string{"keyhold:", "keyhold-enclave:"} {
		if !strings.Contains(read(t, filepath.Join(root, "etc/passwd")), "\n"+line) {
			t.Errorf("there is no user %s", line)
		}
	}
	if !regexp.MustCompile(`(?m)^ne:.*:keyhold-enclave$`).MatchString(read(t, filepath.Join(root, "etc/group"))) {
		t.Errorf("keyhold-enclave is not in the group of /dev/nitro_enclaves: %s", read(t, filepath.Join(root, "etc/group")))
	}
}

// variables of a settings file, those behind a mark too.
func variables(t *testing.T, path string) map[string]string {
	t.Helper()
	found := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^#?(KEYHOLD_[A-Z0-9_]+)=(.*)$`).FindAllStringSubmatch(read(t, path), -1) {
		found[m[1]] = m[2]
	}
	if len(found) == 0 {
		t.Fatalf("%s sets nothing", path)
	}
	return found
}

func TestEveryVariableIsAFlagOfWhoReadsIt(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "keyhold-parent")
	if out, code := run(t, nil, "go", "build", "-o", bin, "../cmd/parent"); code != 0 {
		t.Fatalf("build: %s", out)
	}
	for _, tt := range []struct {
		file    string
		command []string
	}{
		{"etc/enclave.env", []string{"enclave", "run", "--help"}},
		{"etc/parent.env", []string{"--help"}},
	} {
		help, code := run(t, nil, bin, tt.command...)
		if code != 0 {
			t.Fatalf("%v: %s", tt.command, help)
		}
		for name := range variables(t, tt.file) {
			flag := "--" + strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(name, "KEYHOLD_"), "_", "-"))
			if !regexp.MustCompile(`(?m)^\s+` + flag + `\b`).MatchString(help) {
				t.Errorf("%s sets %s, but keyhold-parent %v has no %s", tt.file, name, tt.command, flag)
			}
		}
	}
}

func TestDebugModeIsOffUntilAMarkIsTakenAway(t *testing.T) {
	text := read(t, "etc/enclave.env")
	if strings.Contains(text, "\nKEYHOLD_DEBUG_MODE") || !strings.Contains(text, "\n#KEYHOLD_DEBUG_MODE=yes-this-enclave-has-no-secrets\n") {
		t.Errorf("debug mode is not off, or not told of: %s", text)
	}
	for _, unit := range units {
		if strings.Contains(read(t, "systemd/"+unit), "debug") {
			t.Errorf("%s speaks of debug mode", unit)
		}
	}
}

func TestTheAllocatorReservesWhatTheEnclaveTakes(t *testing.T) {
	yaml := read(t, "allocator.yaml")
	settings := variables(t, "etc/enclave.env")
	for key, name := range map[string]string{"memory_mib": "KEYHOLD_MEMORY_MIB", "cpu_count": "KEYHOLD_CPU_COUNT"} {
		if !strings.Contains(yaml, "\n"+key+": "+settings[name]+"\n") {
			t.Errorf("allocator.yaml does not reserve %s=%s", name, settings[name])
		}
	}
}

func TestInstallingAgainKeepsWhatWasChanged(t *testing.T) {
	root := t.TempDir()
	install := func() {
		t.Helper()
		if out, code := run(t, []string{"DESTDIR=" + root}, "./install"); code != 0 {
			t.Fatalf("install: %s", out)
		}
	}
	aws := filepath.Join(root, "etc/nitro_enclaves/allocator.yaml")
	write(t, aws, "---\nmemory_mib: 512\ncpu_count: 2\n", 0o644)
	install()
	if read(t, aws) != read(t, "allocator.yaml") || read(t, aws+".before-keyhold") == "" {
		t.Error("the allocator's file of AWS's package was not set aside")
	}
	changed := read(t, "etc/enclave.env") + "KEYHOLD_PATIENCE=60s\n"
	write(t, filepath.Join(root, "etc/keyhold/enclave.env"), changed, 0o600)
	write(t, filepath.Join(root, "etc/systemd/system/keyhold-parent.service"), "old", 0o644)
	install()
	if read(t, filepath.Join(root, "etc/keyhold/enclave.env")) != changed {
		t.Error("changed settings were lost")
	}
	if read(t, filepath.Join(root, "etc/systemd/system/keyhold-parent.service")) == "old" {
		t.Error("an old unit was kept")
	}
}

func TestADistFolderIsInstalledWhole(t *testing.T) {
	root, dist := t.TempDir(), t.TempDir()
	for _, name := range []string{"keyhold-parent", "keyhold", "keyhold.eif", "measurements.json"} {
		write(t, filepath.Join(dist, name), name, 0o600)
	}
	if out, code := run(t, []string{"DESTDIR=" + root}, "./install", "--dist", dist); code != 0 {
		t.Fatalf("install: %s", out)
	}
	for _, name := range []string{"usr/bin/keyhold-parent", "usr/bin/keyhold", "usr/lib/keyhold/keyhold.eif", "usr/lib/keyhold/measurements.json"} {
		if read(t, filepath.Join(root, name)) != filepath.Base(name) {
			t.Errorf("%s is another file", name)
		}
	}
	settings := variables(t, "etc/enclave.env")
	if settings["KEYHOLD_EIF"] != "/usr/lib/keyhold/keyhold.eif" || settings["KEYHOLD_MEASUREMENTS"] != "/usr/lib/keyhold/measurements.json" {
		t.Errorf("the settings name other files: %v", settings)
	}
	if out, code := run(t, []string{"DESTDIR=" + root}, "./install", "--dist", filepath.Join(dist, "missing")); code == 0 {
		t.Errorf("a folder that is not there was installed: %s", out)
	}
	if out, code := run(t, nil, "./install", "everything"); code != 2 || !strings.Contains(out, "DESTDIR") {
		t.Errorf("exit %d: %s", code, out)
	}
}

func TestTheInstallerPassesShellcheck(t *testing.T) {
	shellcheck, err := exec.LookPath("shellcheck")
	if err != nil {
		t.Skip("shellcheck is not installed (Debian: apt-get install shellcheck)")
	}
	if out, code := run(t, nil, shellcheck, "install"); code != 0 {
		t.Error(out)
	}
}
