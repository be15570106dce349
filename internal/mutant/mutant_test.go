package mutant_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyhold/keyhold/internal/mutant"
)

func TestAMutantThatFitsNoPlaceOrSeveralIsRefused(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"fits", "why\n== file a.go\n== old\none\n== new\ntwo\n", ""},
		{"fits nowhere", "why\n== file a.go\n== old\nthree\n== new\ntwo\n", "fits 0 places"},
		{"fits twice", "why\n== file a.go\n== old\nmany\n== new\ntwo\n", "fits 2 places"},
		{"is not whole", "why\n== file a.go\n== old\none\n", "not whole"},
		{"changes nothing", "why\n", "changes nothing"},
		{"says not why", "== file a.go\n== old\none\n== new\ntwo\n", "says not why"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root, list := t.TempDir(), t.TempDir()
			write(t, filepath.Join(root, "a.go"), "one many many")
			write(t, filepath.Join(list, "m.txt"), c.text)
			all, err := mutant.All(list)
			if err == nil {
				_, err = all[0].Overlay(root, t.TempDir())
			}
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

func TestTheSourceStaysAsItIs(t *testing.T) {
	root, list, dir := t.TempDir(), t.TempDir(), t.TempDir()
	write(t, filepath.Join(root, "a.go"), "one two")
	write(t, filepath.Join(list, "m.txt"), "why\n== file a.go\n== old\none\n== new\nzero\n== file a.go\n== old\ntwo\n== new\nthree\n")
	all, err := mutant.All(list)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := all[0].Overlay(root, dir); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{filepath.Join(root, "a.go"): "one two", filepath.Join(dir, "0.go"): "zero three"} {
		if got, err := os.ReadFile(file); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v, want %q", filepath.Base(file), got, err, want)
		}
	}
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
