package sim_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// mutantSchedules is within how many schedules each mutant has to be found.
const mutantSchedules = "500"

// mutantTime is for the schedules of one mutant: one that hangs is found too.
const mutantTime = 3 * time.Minute

// mutant is production code with something left out, as testdata describes it.
type mutant struct {
	name, why string
	edits     []edit
}

// edit replaces one place of one file.
type edit struct{ file, old, by string }

// TestEveryMutantIsKilled shows that the judge bites: production code with a
// condition left out, put into the build with -overlay, breaks a promise within
// 500 schedules. The table says which, and in which schedule.
func TestEveryMutantIsKilled(t *testing.T) {
	if os.Getenv("KEYHOLD_SIM_MUTANTS") == "" {
		t.Skip("takes minutes: make mutants")
	}
	files, err := filepath.Glob("testdata/mutants/*.txt")
	if err != nil || len(files) < 15 {
		t.Fatalf("%d mutants, %v", len(files), err)
	}
	var table strings.Builder
	for _, file := range files {
		m, err := readMutant(file)
		must(t, err)
		t.Run(m.name, func(t *testing.T) {
			promise, seed := m.run(t)
			fmt.Fprintf(&table, "%-28s %-12s %6s   %s\n", m.name, promise, seed, m.why)
			if promise == "" {
				t.Errorf("survives %s schedules", mutantSchedules)
			}
		})
	}
	t.Logf("%-28s %-12s %6s\n%s", "mutant", "killed by", "seed", table.String())
}

// TestMutantsFitTheCode keeps the descriptions up to date with what they change.
func TestMutantsFitTheCode(t *testing.T) {
	files, err := filepath.Glob("testdata/mutants/*.txt")
	must(t, err)
	for _, file := range files {
		m, err := readMutant(file)
		must(t, err)
		if _, err := m.overlay(t.TempDir()); err != nil {
			t.Errorf("%s: %v", m.name, err)
		}
	}
}

// readMutant reads "why TEXT" and then, for each edit, "== file", "== old" and "== new".
func readMutant(file string) (mutant, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return mutant{}, err
	}
	m := mutant{name: strings.TrimSuffix(filepath.Base(file), ".txt")}
	parts := strings.Split(string(raw), "== file ")
	m.why = strings.TrimSpace(strings.TrimPrefix(parts[0], "why "))
	for _, part := range parts[1:] {
		name, rest, ok1 := strings.Cut(part, "\n== old\n")
		old, by, ok2 := strings.Cut(rest, "\n== new\n")
		if !ok1 || !ok2 {
			return m, fmt.Errorf("%s: not a mutant", file)
		}
		m.edits = append(m.edits, edit{name, old, strings.TrimSuffix(by, "\n")})
	}
	return m, nil
}

// overlay writes the changed files and the description that go build takes.
func (m *mutant) overlay(dir string) (string, error) {
	root, err := filepath.Abs("../..")
	if err != nil {
		return "", err
	}
	texts, replace := map[string]string{}, map[string]string{}
	for i, e := range m.edits {
		path := filepath.Join(root, e.file)
		if _, ok := texts[path]; !ok {
			raw, err := os.ReadFile(path)
			if err != nil {
				return "", err
			}
			texts[path] = string(raw)
		}
		if n := strings.Count(texts[path], e.old); n != 1 {
			return "", fmt.Errorf("edit %d of %s fits %d places", i+1, e.file, n)
		}
		texts[path] = strings.Replace(texts[path], e.old, e.by, 1)
	}
	for path, text := range texts {
		changed := filepath.Join(dir, fmt.Sprintf("%d.go", len(replace)))
		if err := os.WriteFile(changed, []byte(text), 0o600); err != nil {
			return "", err
		}
		replace[path] = changed
	}
	raw, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	file := filepath.Join(dir, "overlay.json")
	return file, os.WriteFile(file, raw, 0o600)
}

// verdictLine is how report prints the first promise that was broken.
var verdictLine = regexp.MustCompile(`seed (\d+): .*\n\s+(\w+): at `)

// run builds the tests with the mutant inside and runs schedules until one
// breaks a promise.
func (m *mutant) run(t *testing.T) (promise, seed string) {
	t.Helper()
	dir := t.TempDir()
	overlay, err := m.overlay(dir)
	must(t, err)
	bin := filepath.Join(dir, "sim.test")
	build := exec.CommandContext(t.Context(), "go", "test", "-c", "-overlay", overlay, "-o", bin, ".")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), mutantTime)
	defer cancel()
	run := exec.CommandContext(ctx, bin, "-test.run", "^TestEverySeededScheduleKeepsThePromises$")
	run.Env = append(os.Environ(), "KEYHOLD_SIM_SCHEDULES="+mutantSchedules, "KEYHOLD_SIM_STOP=1", "KEYHOLD_SIM_MUTANTS=")
	var out bytes.Buffer
	run.Stdout, run.Stderr = &out, &out
	err = run.Run()
	var exit *exec.ExitError
	if err == nil {
		return "", ""
	}
	if found := verdictLine.FindStringSubmatch(out.String()); found != nil {
		return found[2], found[1]
	}
	if ctx.Err() != nil || errors.As(err, &exit) && strings.Contains(out.String(), "deadlock") {
		return "hangs", ""
	}
	t.Fatalf("run: %v\n%s", err, out.String())
	return "", ""
}
