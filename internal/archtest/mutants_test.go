package archtest_test

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

var (
	modelMutant   = regexp.MustCompile(`\bMUTANT_([A-Z_]+)\b`)
	brokenStore   = regexp.MustCompile(`(?m)^\t\t\{"[^"]+", func\(s store\.Store\) store\.Store \{`)
	editOfTables  = regexp.MustCompile(`(?m)^\t\t\{"[^"]+", "[a-z_]+", `)
	tableOfMutant = regexp.MustCompile(`(?m)^\| ([a-z ]+) \| (\d+) \| `)
)

// TestTheTableOfMutantsIsTrue counts the mutants of every machine and compares
// them with docs/guarantees.md.
func TestTheTableOfMutantsIsTrue(t *testing.T) {
	count := map[string]int{
		"model":      len(modelMutants(t)),
		"simulator":  len(files(t, "internal/sim/testdata/mutants/*.txt")),
		"call sweep": len(files(t, "parent/pipeline/testdata/mutants/*.txt")),
		"histories":  len(brokenStore.FindAllString(text(t, "parent/store/storetest/linear_test.go"), -1)),
		"checker":    len(editOfTables.FindAllString(text(t, "internal/checker/bite_test.go"), -1)),
	}
	_, section, _ := strings.Cut(text(t, "docs/guarantees.md"), "\n## The mutants\n")
	section, _, _ = strings.Cut(section, "\n## ")
	told := map[string]int{}
	for _, row := range tableOfMutant.FindAllStringSubmatch(section, -1) {
		n, err := strconv.Atoi(row[2])
		if err != nil {
			t.Fatal(err)
		}
		told[row[1]] = n
	}
	for machine, n := range count {
		if n == 0 || told[machine] != n {
			t.Errorf("%s: %d mutants, the table says %d", machine, n, told[machine])
		}
		delete(told, machine)
	}
	for machine := range told {
		t.Errorf("%s is in the table, and nobody counts its mutants", machine)
	}
}

// TestEveryMutantOfAModelIsRunAndExplained: a macro that no search sets, or that
// docs/model.md does not know, is no mutant.
func TestEveryMutantOfAModelIsRunAndExplained(t *testing.T) {
	run, doc := text(t, "model/run"), text(t, "docs/model.md")
	for _, name := range modelMutants(t) {
		word := regexp.MustCompile(`\b` + name + `\b`)
		if !word.MatchString(run) {
			t.Errorf("%s is not in model/run", name)
		}
		if !strings.Contains(doc, "`"+name+"`") {
			t.Errorf("%s is not in docs/model.md", name)
		}
	}
}

func modelMutants(t *testing.T) (names []string) {
	t.Helper()
	for _, file := range files(t, "model/*.pml") {
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range modelMutant.FindAllStringSubmatch(string(raw), -1) {
			names = append(names, m[1])
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func files(t *testing.T, pattern string) []string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(moduleRoot(t), filepath.FromSlash(pattern)))
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func text(t *testing.T, file string) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(moduleRoot(t), filepath.FromSlash(file)))
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}
