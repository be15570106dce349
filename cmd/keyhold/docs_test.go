package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// commandsOf are the lines of code blocks that call keyhold, without comments
// and what the shell does with their output.
func commandsOf(markdown string) (lines []string) {
	code := false
	for line := range strings.Lines(strings.ReplaceAll(markdown, "\\\n", " ")) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "```") {
			code = !code
			continue
		}
		line = strings.TrimPrefix(line, "bin/")
		if !code || !strings.HasPrefix(line, "keyhold ") {
			continue
		}
		for _, end := range []string{" #", " | ", " > ", " >> ", " &"} {
			line, _, _ = strings.Cut(line, end)
		}
		lines = append(lines, line)
	}
	return lines
}

// What stands in the docs must be there: its command, its flags, its arguments.
func TestCommandsInTheDocsAreUsage(t *testing.T) {
	pages, err := filepath.Glob(filepath.Join("..", "..", "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, page := range append(pages, filepath.Join("..", "..", "README.md")) {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range commandsOf(string(text)) {
			found++
			c, rest, err := newRoot().Find(strings.Fields(line)[1:])
			if err == nil {
				err = c.ParseFlags(rest)
			}
			if err == nil {
				err = c.ValidateArgs(c.Flags().Args())
			}
			if err != nil {
				t.Errorf("%s: %q: %v", filepath.Base(page), line, err)
			}
		}
	}
	if found < 10 {
		t.Errorf("found %d commands: is this the folder of the docs?", found)
	}
}
