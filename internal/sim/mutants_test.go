package sim_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/keyhold/keyhold/internal/mutant"
)

// mutantSchedules is within how many schedules each mutant has to be found.
const mutantSchedules = "500"

// mutantTime is for the schedules of one mutant: one that hangs is found too.
const mutantTime = 3 * time.Minute

const mutantsDir = "testdata/mutants"

// TestEveryMutantIsKilled shows that the judge bites: production code with a
// condition left out, put into the build with -overlay, breaks a promise within
// 500 schedules. The table says which, and in which schedule.
func TestEveryMutantIsKilled(t *testing.T) {
	if os.Getenv("KEYHOLD_SIM_MUTANTS") == "" {
		t.Skip("takes minutes: make mutants")
	}
	all, err := mutant.All(mutantsDir)
	if err != nil || len(all) < 15 {
		t.Fatalf("%d mutants, %v", len(all), err)
	}
	var table strings.Builder
	for _, m := range all {
		t.Run(m.Name, func(t *testing.T) {
			promise, seed := runMutant(t, &m)
			fmt.Fprintf(&table, "%-28s %-12s %6s   %s\n", m.Name, promise, seed, m.Why)
			if promise == "" {
				t.Errorf("survives %s schedules", mutantSchedules)
			}
		})
	}
	t.Logf("%-28s %-12s %6s\n%s", "mutant", "killed by", "seed", table.String())
}

// TestMutantsFitTheCode keeps the descriptions up to date with what they change.
func TestMutantsFitTheCode(t *testing.T) {
	all, err := mutant.All(mutantsDir)
	must(t, err)
	for _, m := range all {
		if _, err := m.Overlay(moduleRoot, t.TempDir()); err != nil {
			t.Error(err)
		}
	}
}

// verdictLine is how report prints the first promise that was broken.
var verdictLine = regexp.MustCompile(`seed (\d+): .*\n\s+(\w+): at `)

// moduleRoot from this package's folder.
var moduleRoot, _ = filepath.Abs("../..")

// runMutant builds the tests with the mutant inside and runs schedules until one
// breaks a promise.
func runMutant(t *testing.T, m *mutant.Mutant) (promise, seed string) {
	t.Helper()
	dir := t.TempDir()
	overlay, err := m.Overlay(moduleRoot, dir)
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
