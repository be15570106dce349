package archtest_test

import (
	"debug/buildinfo"
	"debug/elf"
	"debug/gosym"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// emulators are what a production program must not have in it, whatever the import graph says: software
// in the place of the NSM, of AWS, of the enclave or of the table, and the machines that try to break them.
var emulators = []string{
	"internal/awslocal", "attestation/nsmtest", "enclave/enclavetest", "parent/store/memory", "parent/store/storetest",
	"internal/sim", "internal/bench",
}

// stripFlags are the only flags of a shipped program that hide what is in it.
const stripFlags = "-s -w "

func TestNoEmulatorIsLinkedIntoAShippedProgram(t *testing.T) {
	if testing.Short() {
		t.Skip("links four programs")
	}
	for _, folder := range emulators {
		if _, err := os.Stat(filepath.Join(moduleRoot(t), folder)); err != nil {
			t.Errorf("a search for something that does not exist finds nothing: %v", err)
		}
	}
	for _, tc := range []struct {
		program string
		want    []string // emulators it must have: the search is worth nothing unless it finds these
	}{
		{"keyhold-enclave", nil},
		{"keyhold-parent", nil},
		{"keyhold", nil},
		{"keyhold-local", []string{"internal/awslocal", "attestation/nsmtest"}},
	} {
		t.Run(tc.program, func(t *testing.T) {
			file := build(t, moduleRoot(t), strings.Replace(buildLine(t, tc.program), stripFlags, "", 1), tc.program)
			names := symbols(t, file)
			for _, folder := range emulators {
				if linked, want := links(names, folder), slices.Contains(tc.want, folder); linked != want {
					t.Errorf("%s is linked: %v, want %v", folder, linked, want)
				}
			}
			if slices.ContainsFunc(names, func(s string) bool { return strings.HasPrefix(s, "testing.") }) {
				t.Error("package testing is linked")
			}
			t.Logf("searched %d symbols", len(names))
		})
	}
}

// The enclave is shipped stripped. Its table of functions, which panics print from, stays, so the very bytes
// that PCR0 measures can be searched as well.
func TestNoEmulatorIsAmongTheFunctionsOfTheShippedEnclave(t *testing.T) {
	if testing.Short() {
		t.Skip("links a program")
	}
	file := build(t, moduleRoot(t), buildLine(t, "keyhold-enclave"), "keyhold-enclave")
	if _, err := open(t, file).Symbols(); err == nil {
		t.Error("the shipped enclave has a symbol table: it is not built as the other test thinks")
	}
	names := functions(t, file)
	for _, folder := range emulators {
		if links(names, folder) {
			t.Errorf("%s is in the enclave", folder)
		}
	}
	if !links(names, "enclave/internal/keyring") {
		t.Error("the search does not find the keyring, which is there")
	}
	t.Logf("searched %d functions", len(names))
}

func TestTheEnclaveIsOneStaticFile(t *testing.T) {
	if testing.Short() {
		t.Skip("links a program")
	}
	name := build(t, moduleRoot(t), buildLine(t, "keyhold-enclave"), "keyhold-enclave")
	file := open(t, name)
	if libraries, err := file.ImportedLibraries(); err != nil || len(libraries) > 0 {
		t.Errorf("the enclave needs %v (%v), but its image has nothing else", libraries, err)
	}
	if i := slices.IndexFunc(file.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }); i >= 0 {
		t.Error("the enclave asks for a dynamic loader")
	}
	info, err := buildinfo.ReadFile(name)
	if err != nil {
		t.Fatalf("read what the enclave is built of: %v", err)
	}
	var got []string
	for _, m := range info.Deps {
		if m.Replace != nil {
			t.Errorf("%s is replaced by %s", m.Path, m.Replace.Path)
		}
		got = append(got, m.Path+" "+m.Version)
	}
	if want := goldenModules(t); !slices.Equal(got, want) {
		t.Errorf("the enclave says that it is built of\n%q, want\n%q", got, want)
	}
}

// buildLine is the Makefile's command that builds a program, as make itself spells it out.
func buildLine(t *testing.T, program string) string {
	t.Helper()
	if _, err := exec.LookPath("make"); err != nil {
		t.Skip("make is not installed, and the flags stand in the Makefile")
	}
	cmd := exec.CommandContext(t.Context(), "make", "--no-print-directory", "-n", "build")
	cmd.Dir = moduleRoot(t)
	cmd.Env = append(os.Environ(), "MAKEFLAGS=", "MAKELEVEL=", "MFLAGS=")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("ask make for its commands: %v", err)
	}
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, fmt.Sprintf(" -o bin/%s ", program)) {
			return strings.TrimSpace(line)
		}
	}
	t.Fatalf("make builds no %s:\n%s", program, out)
	return ""
}

// build runs a command of buildLine in folder and returns the program, which goes to a folder of its own.
func build(t *testing.T, folder, line, program string, env ...string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), program)
	line = strings.Replace(line, " -o bin/"+program+" ", " -o "+file+" ", 1)
	cmd := exec.CommandContext(t.Context(), "bash", "-c", line)
	cmd.Dir = folder
	cmd.Env = append(append(os.Environ(), "GOWORK=off"), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return file
}

func open(t *testing.T, name string) *elf.File {
	t.Helper()
	file, err := elf.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = file.Close() })
	return file
}

// symbols returns the names in the symbol table, of functions, variables and types.
func symbols(t *testing.T, name string) []string {
	t.Helper()
	table, err := open(t, name).Symbols()
	if err != nil {
		t.Fatalf("read the symbols of %s: %v", name, err)
	}
	names := make([]string, len(table))
	for i, s := range table {
		names[i] = s.Name
	}
	return names
}

// functions returns the names of the functions, which stay in a stripped program.
func functions(t *testing.T, name string) []string {
	t.Helper()
	file := open(t, name)
	section, text := file.Section(".gopclntab"), file.Section(".text")
	if section == nil || text == nil {
		t.Fatal("the program has no table of functions")
	}
	raw, err := section.Data()
	if err != nil {
		t.Fatal(err)
	}
	table, err := gosym.NewTable(nil, gosym.NewLineTable(raw, text.Addr))
	if err != nil {
		t.Fatalf("read the table of functions: %v", err)
	}
	names := make([]string, len(table.Funcs))
	for i, f := range table.Funcs {
		names[i] = f.Name
	}
	return names
}

// links tells whether a symbol of a package of this module, or of one below it, is among names. Types are
// named type:.eq.PATH.T and the like, hence the search within.
func links(names []string, folder string) bool {
	return slices.ContainsFunc(names, func(s string) bool {
		_, rest, found := strings.Cut(s, own(folder))
		return found && (rest == "" || strings.ContainsAny(rest[:1], "./"))
	})
}

// goldenModules are the lines of the list that TestTheEnclaveLinksTheModulesOnTheList keeps.
func goldenModules(t *testing.T) []string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata", "enclave-modules.txt"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(raw)), "\n")
}
