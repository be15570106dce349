package diagram_test

import (
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/infra/diagram"
)

var update = flag.Bool("update", false, "draw the diagram of the docs anew")

const (
	snapshot = "../stack/testdata/prod-amd64.template.json"
	page     = "../../docs/architecture.md"
	begin    = "```mermaid\n"
	end      = "```\n"
)

func TestTheDiagramOfTheDocsIsThatOfTheTemplate(t *testing.T) {
	t.Parallel()
	raw, err := os.ReadFile(snapshot)
	if err != nil {
		t.Fatal(err)
	}
	want, err := diagram.Mermaid(raw)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(text), begin)
	got, after, closed := strings.Cut(rest, end)
	if !ok || !closed {
		t.Fatalf("%s has no diagram", page)
	}
	if *update {
		if err := os.WriteFile(page, []byte(before+begin+want+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the page shows another stack; go test ./diagram -update: %s", diff)
	}
}

func TestWhatIsNoStackIsNotDrawn(t *testing.T) {
	t.Parallel()
	for _, raw := range []string{"", "{}", `{"Resources": {"A": {"Type": "AWS::S3::Bucket"}}}`} {
		if got, err := diagram.Mermaid([]byte(raw)); err == nil {
			t.Errorf("%q gives %s", raw, got)
		}
	}
}
