package main_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestTheDoctorTakesItsSettingsFromTheFilesOfTheServices(t *testing.T) {
	bin, dir := program(t), files(t)
	env := withNitroCLI(t, dir)
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write("big.eif", strings.Repeat("x", 3<<20))
	settings := write("enclave.env", "# a comment\n\nKEYHOLD_EIF=big.eif\nKEYHOLD_MEMORY_MIB=11\n")
	broken := write("broken.env", "KEYHOLD_EIF='big.eif'\n")
	for _, tt := range []struct {
		name string
		args []string
		env  []string
		code int
		want string // in stdout, or in stderr where the code is 2
	}{
		{"help names the checks", []string{"--help"}, nil, 0, "nitro_device nitro_cli allocator_file"},
		{"a file", []string{"--env-file", settings, "--only", "image_memory"}, nil, 1, "12 MiB; 11 are set"},
		{"the environment wins over a file", []string{"--env-file", settings, "--only", "image_memory"}, []string{"KEYHOLD_MEMORY_MIB=12"}, 0, "ok"},
		{"a flag wins over both", []string{"--env-file", settings, "--only", "image_memory", "--memory-mib", "10"}, []string{"KEYHOLD_MEMORY_MIB=12"}, 1, "10 are set"},
		{"a file with quotes", []string{"--env-file", broken}, nil, 2, "line 1 of"},
		{"a file that is not there", []string{"--env-file", broken + ".missing"}, nil, 2, "no such file"},
		{"an unknown check", []string{"--only", "everything"}, nil, 2, "there is no such check"},
		{"the parent's own CID", []string{"--enclave-cid", "3"}, nil, 2, "--enclave-cid must be between"},
		{"a config", []string{"--only", "config_file", "--config", "config.json"}, nil, 0, "keyring main"},
		{"an image that is none", []string{"--only", "image_file", "--eif", "big.eif", "--measurements", "eif.json"}, nil, 1, "no whole image"},
		{"no enclave", []string{"--only", "enclave_running,enclave_mode,enclave_answers,clock"}, nil, 1, "no enclave with context id 4294 runs"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			code, stdout, stderr := run(t, bin, dir, append(tt.env, env...), append([]string{"doctor"}, tt.args...)...)
			text := stdout
			if tt.code == 2 {
				text = stderr
			}
			if code != tt.code || !strings.Contains(text, tt.want) {
				t.Fatalf("exit %d, want %d with %q\nstdout: %s\nstderr: %s", code, tt.code, tt.want, stdout, stderr)
			}
			if code == 1 && stderr != "" {
				t.Errorf("it is said twice: %s", stderr)
			}
		})
	}
	_, stdout, _ := run(t, bin, dir, env, "doctor", "--json", "--only", "config_file,image_memory", "--config", "config.json", "--eif", "big.eif")
	var report struct {
		OK     bool
		Checks []struct{ ID, Result, Text string }
	}
	if err := json.Unmarshal([]byte(stdout), &report); err != nil || !report.OK || len(report.Checks) != 2 || report.Checks[1].Result != "ok" {
		t.Errorf("%v: %s", err, stdout)
	}
}
