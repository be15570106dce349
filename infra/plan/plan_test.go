package plan_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/infra/plan"
	"github.com/keyhold/keyhold/infra/target"
	"github.com/keyhold/keyhold/infra/target/targettest"
)

func file(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "template.json")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestChangesAreToldByResourceAndProperty(t *testing.T) {
	t.Parallel()
	before := file(t, `{"Resources": {
		"Gone": {"Type": "A"}, "Same": {"Type": "B", "Properties": {"x": 1}},
		"Other": {"Type": "C", "Properties": {"x": 1, "y": {"z": [1]}, "w": 1}}, "Kept": {"Type": "D", "DeletionPolicy": "Delete"}}}`)
	after := file(t, `{"Resources": {
		"New": {"Type": "A"}, "Same": {"Type": "B", "Properties": {"x": 1}},
		"Other": {"Type": "C", "Properties": {"x": 2, "y": {"z": [2]}, "w": 1}}, "Kept": {"Type": "D", "DeletionPolicy": "Retain"}}}`)
	got, err := plan.Changes(before, after)
	if err != nil {
		t.Fatal(err)
	}
	want := []plan.Change{
		{ID: "Gone", Type: "A", How: "removed"},
		{ID: "Kept", Type: "D", How: "changed", What: []string{"(attributes)"}},
		{ID: "New", Type: "A", How: "made"},
		{ID: "Other", Type: "C", How: "changed", What: []string{"x", "y"}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if got, err := plan.Changes("", after); err != nil || len(got) != 4 {
		t.Errorf("against nothing: %v, %v", got, err)
	}
	if _, err := plan.Changes(before, file(t, "no")); err == nil {
		t.Error("a template that is none was compared")
	}
}

// Every deployment of a plan must be one that target.Read takes.
func TestEveryStepOfAPlanCanBeDeployed(t *testing.T) {
	t.Parallel()
	one, two := targettest.Release(t, "one", target.AMD64), targettest.Release(t, "two", target.AMD64)
	values := targettest.Values("prod", target.AMD64, one)
	if err := os.CopyFS(plan.Sealed(one), os.DirFS(one)); err != nil {
		t.Fatal(err)
	}
	targettest.Seal(t, plan.Sealed(one))
	first, roll := plan.First(values), plan.Roll(values, two)
	if len(first) != 4 || len(roll) != 3 {
		t.Fatalf("%d and %d steps", len(first), len(roll))
	}
	for _, s := range append(first, roll...) {
		d := targettest.Read(t, s.Values)
		command := s.Command()
		for _, want := range []string{"npx cdk deploy", "-c release=" + d.Release.Dir, "-c profile=prod"} {
			if !strings.Contains(command, want) {
				t.Errorf("%s: %q is not in %s", s.Title, want, command)
			}
		}
		if d.Sealed && !strings.Contains(command, "-c seal='"+target.SealWords+"'") {
			t.Errorf("the words are not typed: %s", command)
		}
	}
	// The one before must not leave anything behind in the values of the next.
	if values[target.KeyKeyring] != "" || values[target.KeyAdmit] != one {
		t.Errorf("the plan changed what it was given: %v", values)
	}
}

func TestAPlanShowsEachStepAgainstTheOneBefore(t *testing.T) {
	t.Parallel()
	templates := []string{
		file(t, `{"Resources": {"Key": {"Type": "K", "Properties": {"p": 1}}}}`),
		file(t, `{"Resources": {"Key": {"Type": "K", "Properties": {"p": 2}}}}`),
		file(t, `{"Resources": {"Key": {"Type": "K", "Properties": {"p": 2}}}}`),
	}
	n := 0
	var compared []string
	var out strings.Builder
	r := plan.Runner{
		Out: &out, Folder: t.TempDir(),
		Synth: func(map[string]string, string) (string, error) { n++; return templates[n-1], nil },
		Diff: func(_, before string) (string, error) {
			compared = append(compared, before)
			return "what cdk shows\n", nil
		},
	}
	values := map[string]string{target.KeyProfile: "prod"}
	steps := []plan.Step{
		{Title: "one", Values: values, Before: []string{"first do this"}},
		{Title: "two", Values: values, After: []string{"then that"}},
		{Title: "three", Values: values},
		{Title: "four"},
	}
	if err := r.Print(steps, ""); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"== 1. one", "first do this", "It makes 1 resources", "changed Key, a K: p", "what cdk shows", "then that", "It changes nothing.", "== 4. four"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in:\n%s", want, out.String())
		}
	}
	if diff := cmp.Diff(templates[:1], compared); diff != "" {
		t.Errorf("compared with: %s", diff)
	}
}

func TestAPlanEndsAtAStepThatWouldFail(t *testing.T) {
	t.Parallel()
	r := plan.Runner{Out: &strings.Builder{}, Folder: t.TempDir(), Synth: func(map[string]string, string) (string, error) {
		return "", errors.New("refused")
	}}
	err := r.Print([]plan.Step{{Title: "one", Values: map[string]string{}}}, "")
	if err == nil || !strings.Contains(err.Error(), "step 1, one: refused") {
		t.Errorf("got %v", err)
	}
}
