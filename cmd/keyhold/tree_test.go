package main

import (
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func runnable(c *cobra.Command, visit func(c *cobra.Command)) {
	if !c.HasSubCommands() {
		visit(c)
	}
	for _, sub := range c.Commands() {
		runnable(sub, visit)
	}
}

func TestEveryCommandTeachesByExample(t *testing.T) {
	seen := map[string]bool{}
	runnable(newRoot(), func(c *cobra.Command) {
		path := c.CommandPath()
		seen[path] = true
		if c.Short == "" || c.Long == "" || c.Long == c.Short {
			t.Errorf("%s: needs Short and a Long that says more", path)
		}
		if !strings.Contains(c.Example, path) {
			t.Errorf("%s: its examples do not show it", path)
		}
		if c.Args == nil {
			t.Errorf("%s: does not say which arguments it takes", path)
		}
	})
	for _, want := range []string{
		"tables create", "config build", "config validate", "config show", "config hash", "config pcr16", "config format", "keyring create", "keyring show",
		"keys list", "records generate", "records import", "records status", "records export", "records verify",
		"import list", "import abort", "batches list", "batches export", "batches retry", "attest", "receipt verify", "policy print", "policy prove", "policy diff", "version",
	} {
		if !seen["keyhold "+want] {
			t.Errorf("there is no command keyhold %s", want)
		}
	}
}

// TestExamplesAreUsage parses every example line that calls keyhold: its
// command and flags must be there.
func TestExamplesAreUsage(t *testing.T) {
	runnable(newRoot(), func(c *cobra.Command) {
		for line := range strings.Lines(strings.ReplaceAll(c.Example, "\\\n", " ")) {
			line, _, _ = strings.Cut(strings.TrimSpace(line), " | ")
			line, _, _ = strings.Cut(line, " >> ")
			words := strings.Fields(line)
			if len(words) < 2 || words[0] != "keyhold" {
				continue
			}
			root := newRoot()
			found, rest, err := root.Find(words[1:])
			if err != nil {
				t.Errorf("%q: %v", line, err)
				continue
			}
			if err := found.ParseFlags(rest); err != nil {
				t.Errorf("%q: %v", line, err)
				continue
			}
			if err := found.ValidateArgs(found.Flags().Args()); err != nil {
				t.Errorf("%q: %v", line, err)
			}
		}
	})
}
