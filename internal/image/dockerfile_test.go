package image_test

import (
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// No Docker engine runs where the tests run, so Dockerfile.enclave is read here
// instead: it must compile what the Makefile compiles, in the same way.

type instruction struct{ name, rest string }

// stages are the instructions of the Dockerfile, each stage with its FROM.
func stages(t *testing.T) [][]instruction {
	t.Helper()
	var out [][]instruction
	for line := range strings.Lines(repoFile(t, "Dockerfile.enclave")) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if strings.HasSuffix(line, `\`) {
			t.Fatalf("%q goes on in the next line, which this test does not read", line)
		}
		name, rest, _ := strings.Cut(line, " ")
		if name == "FROM" {
			out = append(out, nil)
		}
		if len(out) == 0 {
			t.Fatalf("%s before the first FROM", name)
		}
		out[len(out)-1] = append(out[len(out)-1], instruction{name, strings.TrimSpace(rest)})
	}
	return out
}

func repoFile(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// buildCommand is the Makefile's line that builds the enclave, its variables put in.
func buildCommand(t *testing.T) string {
	t.Helper()
	makefile := repoFile(t, "Makefile")
	i := strings.Index(makefile, " -o bin/keyhold-enclave ./cmd/enclave\n")
	if i < 0 {
		t.Fatal("the Makefile does not build bin/keyhold-enclave")
	}
	line := strings.TrimSpace(makefile[strings.LastIndex(makefile[:i], "\n")+1:])
	line, _, _ = strings.Cut(line, "\n")
	for _, name := range []string{"ENCLAVE_ENV", "ENCLAVE_TAGS", "ENCLAVE_LDFLAGS"} {
		value := regexp.MustCompile(`(?m)^` + name + `\s*:=\s*(.*)$`).FindStringSubmatch(makefile)
		if value == nil {
			t.Fatalf("the Makefile does not set %s", name)
		}
		line = strings.ReplaceAll(line, "$("+name+")", value[1])
	}
	if strings.Contains(line, "$(") {
		t.Fatalf("%q has variables that this test does not know", line)
	}
	return line
}

func TestTheDockerfileBuildsTheEnclaveAsTheMakefileDoes(t *testing.T) {
	want := strings.Replace(buildCommand(t), " -o bin/keyhold-enclave ", " -o /keyhold-enclave ", 1)
	var runs []string
	for _, i := range stages(t)[0] {
		if i.name == "RUN" {
			runs = append(runs, i.rest)
		}
	}
	// Nothing else runs: no package manager, no download but that of go.sum's modules.
	if diff := cmp.Diff([]string{"GOFLAGS=-mod=readonly GOTOOLCHAIN=local go mod download", want, "touch -d @0 /keyhold-enclave"}, runs); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestTheDockerfilesImageIsTheProgramAlone(t *testing.T) {
	all := stages(t)
	want := []instruction{
		{"FROM", "scratch"},
		{"COPY", "--from=build /keyhold-enclave /keyhold-enclave"},
		{"ENTRYPOINT", `["/keyhold-enclave"]`},
	}
	if diff := cmp.Diff(want, all[len(all)-1], cmp.AllowUnexported(instruction{})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestTheDockerfilePinsWhatItIsBuiltWith(t *testing.T) {
	all := stages(t)
	if len(all) != 2 {
		t.Fatalf("%d stages, want 2", len(all))
	}
	base := regexp.MustCompile(`^golang:([0-9]+\.[0-9]+)\.[0-9]+-bookworm@sha256:[0-9a-f]{64} AS build$`).FindStringSubmatch(all[0][0].rest)
	if base == nil {
		t.Fatalf("FROM %s: want golang:VERSION-bookworm@sha256:DIGEST AS build", all[0][0].rest)
	}
	wanted := regexp.MustCompile(`(?m)^go ([0-9]+\.[0-9]+)`).FindStringSubmatch(repoFile(t, "go.mod"))
	if wanted == nil || wanted[1] != base[1] {
		t.Errorf("it builds with Go %s, go.mod asks for %v", base[1], wanted)
	}
	for _, i := range slices.Concat(all...) {
		if !slices.Contains([]string{"FROM", "WORKDIR", "COPY", "RUN", "ENTRYPOINT"}, i.name) {
			t.Errorf("%s %s: neither arguments nor environment may change the bytes", i.name, i.rest)
		}
	}
}

func TestTheDockerfileCopiesEveryPackageOfTheEnclave(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-tags", "netgo,osusergo",
		"-f", "{{if .Module}}{{if .Module.Main}}{{.ImportPath}}{{end}}{{end}}", "./cmd/enclave")
	cmd.Dir, cmd.Env = filepath.Join("..", ".."), append(os.Environ(), "GOWORK=off", "CGO_ENABLED=1")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("ask go what the enclave is built of: %v", err)
	}
	var copied []string
	for _, i := range stages(t)[0] {
		from, to, _ := strings.Cut(i.rest, " ")
		if i.name != "COPY" || from == "go.mod" {
			continue
		}
		if from != to {
			t.Errorf("COPY %s: to another place", i.rest)
		}
		copied = append(copied, from)
	}
	packages := strings.Fields(string(out))
	if len(packages) < 10 {
		t.Fatalf("the enclave has %d packages", len(packages))
	}
	for _, p := range packages {
		folder := strings.TrimPrefix(p, "github.com/keyhold/keyhold/")
		if !slices.ContainsFunc(copied, func(c string) bool { return folder == c || strings.HasPrefix(folder, path.Clean(c)+"/") }) {
			t.Errorf("%s is not copied", folder)
		}
	}
}
