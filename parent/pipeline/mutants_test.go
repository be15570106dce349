package pipeline_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyhold/keyhold/internal/mutant"
)

const mutantsDir = "testdata/mutants"

// TestTheSweepFindsEveryMutant shows that the sweep over single calls bites.
func TestTheSweepFindsEveryMutant(t *testing.T) {
	root, err := filepath.Abs("../..")
	must(t, err)
	all, err := mutant.All(mutantsDir)
	if err != nil || len(all) == 0 {
		t.Fatalf("%d mutants, %v", len(all), err)
	}
	for _, m := range all {
		t.Run(m.Name, func(t *testing.T) {
			dir := t.TempDir()
			overlay, err := m.Overlay(root, dir)
			must(t, err)
			if os.Getenv("KEYHOLD_SIM_MUTANTS") == "" {
				t.Skip("it fits the code; that it is found takes a build: make mutants")
			}
			bin := filepath.Join(dir, "pipeline.test")
			build := exec.CommandContext(t.Context(), "go", "test", "-c", "-overlay", overlay, "-o", bin, ".")
			if out, err := build.CombinedOutput(); err != nil {
				t.Fatalf("build: %v\n%s", err, out)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
			defer cancel()
			run := exec.CommandContext(ctx, bin, "-test.run", "^TestEveryRemoteCallMayGoWrongInEveryWay$/^sign$")
			var out bytes.Buffer
			run.Stdout, run.Stderr = &out, &out
			err = run.Run()
			if err == nil || ctx.Err() != nil || !strings.Contains(out.String(), "--- FAIL: TestEveryRemoteCall") {
				t.Fatalf("%s: not found: %v\n%s", m.Why, err, out.String())
			}
			first, _, _ := strings.Cut(out.String(), "\n")
			t.Log(m.Why, "--", first)
		})
	}
}
