package main_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
)

const goodPCR = "a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90"

// folder is where the command is built, once for all tests.
var folder string

func TestMain(m *testing.M) {
	var err error
	if folder, err = os.MkdirTemp("", "keyhold-parent-*"); err != nil {
		panic(err)
	}
	m.Run() // the test binary exits with what it returned
	if err := os.RemoveAll(folder); err != nil {
		panic(err)
	}
}

var build = sync.OnceValues(func() (string, error) {
	bin := filepath.Join(folder, "keyhold-parent")
	out, err := exec.Command("go", "build", "-o", bin, ".").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return bin, nil
})

// program returns the command, built.
func program(t *testing.T) string {
	t.Helper()
	bin, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

// files writes a good config and measurements, and others, into a new folder.
func files(t *testing.T) string {
	t.Helper()
	raw, err := config.Encode(&config.Config{
		Version: 1, KMSKeyARN: "arn:aws:kms:eu-central-1:111122223333:key/00000000-0000-4000-8000-000000000001",
		Keyring: "main", Epochs: []uint32{1}, SealEpoch: 1,
		Policies:  []config.Policy{{Name: "default", Kinds: []record.Kind{record.Message}}},
		Lease:     config.LeaseLimit{MaxMS: config.DefaultLeaseMaxMS, MarginMS: config.DefaultLeaseMarginMS},
		KeyPolicy: config.DefaultKeyPolicy(),
	})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, content := range map[string]string{
		"config.json": string(raw),
		"spaced.json": string(raw) + " ",
		"eif.json":    `{"Measurements":{"HashAlgorithm":"Sha384 { ... }","PCR0":"` + goodPCR + `","PCR1":"` + goodPCR + `","PCR2":"` + goodPCR + `"}}`,
		"debug.json":  `{"Measurements":{"HashAlgorithm":"Sha384 { ... }","PCR0":"` + strings.Repeat("0", 96) + `","PCR1":"` + goodPCR + `","PCR2":"` + goodPCR + `"}}`,
		"none.json":   `{"Measurements":{}}`,
		"not.json":    `PCR0`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// run returns the exit code and both outputs.
func run(t *testing.T, bin, dir string, env []string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(t.Context(), bin, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &out, &errs
	// No credentials and no metadata service of the machine that tests run on.
	cmd.Env = append([]string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "AWS_EC2_METADATA_DISABLED=true", "AWS_MAX_ATTEMPTS=1",
		"AWS_ACCESS_KEY_ID=test", "AWS_SECRET_ACCESS_KEY=test", "KEYHOLD_DYNAMODB_ENDPOINT=http://127.0.0.1:1",
	}, env...)
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

func TestTheCommandLineTeachesAndRefuses(t *testing.T) {
	bin, dir := program(t), files(t)
	good := []string{"--config", "config.json", "--enclave-cid", "16", "--pcr0", goodPCR}
	with := func(args ...string) []string { return append(append([]string{}, good...), args...) }
	for _, tt := range []struct {
		name string
		args []string
		env  []string
		code int
		want string // in stderr, or in stdout where the code is 0
	}{
		{"help has examples", []string{"--help"}, nil, 0, "keyhold-parent --config keyhold.json --enclave-cid 16 --measurements eif.json"},
		{"help names the exit codes", []string{"--help"}, nil, 0, "2 wrong usage"},
		{"nothing", nil, nil, 2, "--config is needed"},
		{"nothing, and all of it is said", nil, nil, 2, "which image is wanted?"},
		{"an argument", with("x"), nil, 2, "unexpected argument"},
		{"an unknown flag", with("--debug"), nil, 2, "unknown flag: --debug"},
		{"the parent's own CID", with("--enclave-cid", "3"), nil, 2, "--enclave-cid must be between 4"},
		{"one enclave twice", with("--enclave-cid", "16"), nil, 2, "the same enclave twice"},
		{"a public address", with("--listen", "0.0.0.0:9464"), nil, 2, "--listen must be a loopback address"},
		{"an address without port", with("--listen", "127.0.0.1"), nil, 2, "--listen must be a loopback address"},
		{"a short PCR0", with("--pcr0", "ab"), nil, 2, "96 hex digits"},
		{"a debug image", with("--measurements", "debug.json"), nil, 2, "which is debug mode"},
		{"measurements without PCR0", with("--measurements", "none.json"), nil, 2, "HashAlgorithm"},
		{"measurements of something else", with("--measurements", "not.json"), nil, 2, "not a JSON object"},
		{"no such measurements", with("--measurements", "missing.json"), nil, 2, "missing.json"},
		{"no such config", with("--config", "missing.json"), nil, 2, "missing.json"},
		{"a config that is not canonical", with("--config", "spaced.json"), nil, 1, "config_invalid"},
		{"a bad variable", good, []string{"KEYHOLD_WORKERS=many"}, 2, "KEYHOLD_WORKERS"},
		{"a good variable", good[2:], []string{"KEYHOLD_CONFIG=missing.json"}, 2, "missing.json"},
		{"a flag wins over its variable", with("--workers", "0"), []string{"KEYHOLD_WORKERS=3"}, 2, "--workers must be at least 1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			code, stdout, stderr := run(t, bin, dir, tt.env, tt.args...)
			text := stderr
			if tt.code == 0 {
				text = stdout
			}
			if code != tt.code || !strings.Contains(text, tt.want) {
				t.Fatalf("exit %d, want %d with %q\nstdout: %s\nstderr: %s", code, tt.code, tt.want, stdout, stderr)
			}
			if code == 2 && !strings.Contains(stderr, "--help") {
				t.Errorf("wrong usage does not point at --help: %s", stderr)
			}
		})
	}
}

func TestAFailedRunIsOneLineOfJSONWithItsCode(t *testing.T) {
	bin, dir := program(t), files(t)
	var lc net.ListenConfig
	taken, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	code, _, stderr := run(t, bin, dir, nil, "--config", "config.json", "--enclave-cid", "16", "--measurements", "eif.json", "--listen", taken.Addr().String())
	if code != 1 {
		t.Fatalf("exit %d, want 1\n%s", code, stderr)
	}
	lines := strings.Split(strings.TrimSpace(stderr), "\n")
	for i, line := range lines {
		var entry struct{ Level, Msg, Code string }
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Fatalf("line %d is no JSON: %s", i, line)
		}
		if last := i == len(lines)-1; last && (entry.Msg != "parent failed" || entry.Code != string(refusal.PortInUse)) {
			t.Fatalf("last line: %s", line)
		}
	}
}
