package hostile_test

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the table of docs/threat-model.md anew")

// The lines of docs/threat-model.md that the table stands between.
const (
	begin = "<!-- attacks: written by go test ./enclave/hostile -run TestThreatModel -update -->\n"
	end   = "<!-- end of attacks -->\n"
)

// table is attacks as Markdown.
func table() string {
	var b strings.Builder
	b.WriteString("| root on the parent | must get | so that |\n|---|---|---|\n")
	for _, a := range attacks() {
		var gets []string
		for _, o := range a.gets {
			if strings.Contains(o, " ") || o == answered || o == closed {
				gets = append(gets, o)
			} else {
				gets = append(gets, "`"+o+"`")
			}
		}
		fmt.Fprintf(&b, "| %s | %s | %s |\n", a.name, strings.Join(gets, ", "), a.promise)
	}
	return b.String()
}

func TestThreatModelListsTheAttacksThatAreTried(t *testing.T) {
	path := filepath.Join("..", "..", "docs", "threat-model.md")
	raw, err := os.ReadFile(path)
	must(t, err)
	before, rest, ok := strings.Cut(string(raw), begin)
	old, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatal("docs/threat-model.md has no place for the table")
	}
	if *update {
		must(t, os.WriteFile(path, []byte(before+begin+table()+end+after), 0o644))
		return
	}
	if diff := cmp.Diff(table(), old); diff != "" {
		t.Errorf("run go test ./enclave/hostile -run TestThreatModel -update: %s", diff)
	}
}
