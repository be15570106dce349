// Package mutant puts faults into production code for the tests that have to find
// them, by go build -overlay. It changes no file of the source.
package mutant

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Mutant is production code with something left out.
type Mutant struct {
	Name string // of its file
	Why  string // what is left out

	edits []edit
}

// edit replaces one place of one file.
type edit struct{ file, old, by string }

// All reads the mutants of a folder, by name.
func All(dir string) ([]Mutant, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.txt"))
	if err != nil {
		return nil, err
	}
	all := make([]Mutant, len(files))
	for i, file := range files {
		if all[i], err = read(file); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// read takes "why TEXT" and then, for each edit, "== file", "== old" and "== new".
func read(file string) (Mutant, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return Mutant{}, err
	}
	m := Mutant{Name: strings.TrimSuffix(filepath.Base(file), ".txt")}
	parts := strings.Split(string(raw), "== file ")
	m.Why = strings.TrimSpace(strings.TrimPrefix(parts[0], "why "))
	for _, part := range parts[1:] {
		name, rest, ok1 := strings.Cut(part, "\n== old\n")
		old, by, ok2 := strings.Cut(rest, "\n== new\n")
		if !ok1 || !ok2 {
			return m, fmt.Errorf("mutant %s: an edit is not whole", m.Name)
		}
		m.edits = append(m.edits, edit{name, old, strings.TrimSuffix(by, "\n")})
	}
	if m.Why == "" || len(m.edits) == 0 {
		return m, fmt.Errorf("mutant %s changes nothing, or says not why", m.Name)
	}
	return m, nil
}

// Overlay writes the changed files of the module at root into dir, and returns
// the description that go build takes. Each edit has to fit exactly one place.
func (m *Mutant) Overlay(root, dir string) (string, error) {
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
			return "", fmt.Errorf("mutant %s: edit %d fits %d places", m.Name, i+1, n)
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
