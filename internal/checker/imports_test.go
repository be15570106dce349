package checker_test

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// What judges parents and enclaves must not make their mistakes.
func TestTheCheckerSharesNoCodeWithWhatItJudges(t *testing.T) {
	t.Parallel()
	raw, err := exec.CommandContext(t.Context(), "go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	const module = "github.com/keyhold/keyhold/"
	own := []string{module + "internal/checker", module + "internal/e2e"}
	deps := strings.Fields(string(raw))
	if !slices.Contains(deps, own[1]) {
		t.Fatalf("%d dependencies without %s: nothing was listed", len(deps), own[1])
	}
	for _, dep := range deps {
		if strings.HasPrefix(dep, module) && !slices.Contains(own, dep) || strings.HasPrefix(dep, "github.com/ethereum/") ||
			strings.HasPrefix(dep, "github.com/fxamacker/") || strings.HasPrefix(dep, "github.com/aws/") || strings.HasPrefix(dep, "github.com/hf/") {
			t.Errorf("the checker reaches %s", dep)
		}
	}
}
