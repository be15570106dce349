package main_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// nitroCLI plays an enclave that runs and never listens on vsock.
const nitroCLI = `#!/bin/sh
cd "$(dirname "$0")"
echo "$*" >>calls
case "$1" in
describe-eif) cat eif.json ;;
run-enclave) cp running enclaves ;;
describe-enclaves) cat enclaves ;;
terminate-enclave) echo '[]' >enclaves ;;
esac
`

func withNitroCLI(t *testing.T, dir string) (env []string) {
	t.Helper()
	for name, text := range map[string]string{
		"nitro-cli": nitroCLI, "image.eif": "image", "enclaves": "[]",
		"running":   `[{"EnclaveName":"keyhold-4294","EnclaveID":"i-1-enc1","EnclaveCID":4294,"NumberOfCPUs":2,"MemoryMiB":1024,"State":"RUNNING","Flags":"NONE"}]`,
		"debugging": `[{"EnclaveName":"keyhold-4294","EnclaveID":"i-1-enc1","EnclaveCID":4294,"NumberOfCPUs":2,"MemoryMiB":1024,"State":"RUNNING","Flags":"DEBUG_MODE"}]`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return []string{"PATH=" + dir + ":" + os.Getenv("PATH"), "KEYHOLD_ENCLAVE_CID=4294"}
}

func TestTheEnclaveCommandsTeachAndRefuse(t *testing.T) {
	bin, dir := program(t), files(t)
	env := withNitroCLI(t, dir)
	good := []string{"enclave", "run", "--eif", "image.eif", "--measurements", "eif.json", "--lock", "", "--boot", "300ms"}
	with := func(args ...string) []string { return append(append([]string{}, good...), args...) }
	for _, tt := range []struct {
		name string
		args []string
		code int
		want string // in stderr, or in stdout where the code is 0
	}{
		{"help names the commands", []string{"enclave", "--help"}, 0, "Start the enclave and watch over it"},
		{"help of run warns of debug mode", []string{"enclave", "run", "--help"}, 0, "KMS gives it nothing"},
		{"help of the program names both", []string{"--help"}, 0, "enclave     Start, watch and end an enclave"},
		{"without anything", []string{"enclave", "run"}, 2, "an image file is needed"},
		{"an argument", with("now"), 2, "unexpected argument"},
		{"no such measurements", []string{"enclave", "run", "--eif", "image.eif", "--measurements", "missing.json"}, 2, "missing.json"},
		{"measurements of a debug image", []string{"enclave", "run", "--eif", "image.eif", "--measurements", "debug.json"}, 2, "which is debug mode"},
		{"debug mode without its words", with("--debug-mode", "true"), 2, "yes-this-enclave-has-no-secrets"},
		{"debug mode as a switch", with("--debug-mode"), 2, "flag needs an argument"},
		{"the parent's own CID", with("--enclave-cid", "3"), 2, "--enclave-cid must be between 4"},
		{"an enclave that never answers", good, 1, `"code":"enclave_wedged"`},
		{"too little memory", with("--memory-mib", "0", "--eif", "missing.eif"), 1, "image_mismatch"},
		{"status of no enclave", []string{"enclave", "status"}, 1, "enclave_gone"},
		{"stopping no enclave", []string{"enclave", "stop"}, 0, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			code, stdout, stderr := run(t, bin, dir, env, tt.args...)
			text := stderr
			if tt.code == 0 {
				text = stdout
			}
			if code != tt.code || !strings.Contains(text, tt.want) {
				t.Fatalf("exit %d, want %d with %q\nstdout: %s\nstderr: %s", code, tt.code, tt.want, stdout, stderr)
			}
		})
	}
	calls, err := os.ReadFile(filepath.Join(dir, "calls"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"run-enclave --enclave-name keyhold-4294 --eif-path image.eif --enclave-cid 4294 --cpu-count 2 --memory 1024\n",
		"terminate-enclave --enclave-id i-1-enc1\n",
	} {
		if !strings.Contains(string(calls), want) {
			t.Errorf("nitro-cli was not called with %q: %s", want, calls)
		}
	}
	if strings.Contains(string(calls), "--debug-mode") {
		t.Error("an enclave was started in debug mode")
	}
}

func TestStatusTellsWhatIsThere(t *testing.T) {
	bin, dir := program(t), files(t)
	env := withNitroCLI(t, dir)
	for _, tt := range []struct {
		from  string
		code  string
		debug bool
	}{
		{"running", "enclave_wedged", false},
		{"debugging", "enclave_state", true},
	} {
		t.Run(tt.from, func(t *testing.T) {
			raw, err := os.ReadFile(filepath.Join(dir, tt.from))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "enclaves"), raw, 0o600); err != nil {
				t.Fatal(err)
			}
			code, stdout, stderr := run(t, bin, dir, env, "enclave", "status", "--json")
			var got struct {
				EnclaveCID uint   `json:"enclave_cid"`
				State      string `json:"state"`
				Debug      bool   `json:"debug"`
				Answers    bool   `json:"answers"`
				Error      string `json:"error"`
			}
			if err := json.Unmarshal([]byte(stdout), &got); err != nil {
				t.Fatalf("%v: %s", err, stdout)
			}
			if code != 1 || got.EnclaveCID != 4294 || got.State != "RUNNING" || got.Debug != tt.debug || got.Answers || got.Error == "" {
				t.Errorf("exit %d: %s", code, stdout)
			}
			if !strings.Contains(stderr, tt.code) {
				t.Errorf("stderr lacks %s: %s", tt.code, stderr)
			}
			if _, text, _ := run(t, bin, dir, env, "enclave", "status"); tt.debug != strings.Contains(text, "DEBUG") {
				t.Errorf("a person reads: %s", text)
			}
		})
	}
}
