package main_test

import (
	"strings"
	"testing"

	soak "github.com/keyhold/keyhold/internal/soak"
)

func TestWhatGrowsIsNamed(t *testing.T) {
	t.Parallel()
	names := soak.TestingOnlyQuantities()
	if len(names) == 0 {
		t.Fatal("nothing is measured")
	}
	for grows, name := range names {
		_, err := soak.TestingOnlyJudge(90, 0, func(sample, quantity int) float64 {
			if quantity == grows {
				return float64(100 + 3*sample)
			}
			return 100
		})
		if err == nil || !strings.Contains(err.Error(), name+" grew") || strings.Count(err.Error(), "grew") != 1 {
			t.Errorf("%s grew by 3 with every sample: %v", name, err)
		}
	}
}

func TestWhatIsLevelAfterAWarmUpPasses(t *testing.T) {
	t.Parallel()
	figures, err := soak.TestingOnlyJudge(90, 0, func(sample, _ int) float64 {
		if sample < 20 {
			return float64(5 * sample)
		}
		return float64(100 + sample%3) // as a garbage collector does
	})
	if err != nil {
		t.Error(err)
	}
	for _, name := range soak.TestingOnlyQuantities() {
		if !strings.Contains(figures, name+" ") {
			t.Errorf("%s is missing in %q", name, figures)
		}
	}
}

func TestTooFewSamplesAreNoPass(t *testing.T) {
	t.Parallel()
	level := func(int, int) float64 { return 1 }
	if _, err := soak.TestingOnlyJudge(8, 0, level); err == nil {
		t.Error("8 samples pass")
	}
	if _, err := soak.TestingOnlyJudge(30, 11, level); err == nil {
		t.Error("a third of the samples failed, and it passes")
	}
}
