package refusal_test

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"net/http"
	"regexp"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/refusal"
)

// declared reads the constants of type Code from the source, so that a new one
// cannot be left out of the table.
func declared(t *testing.T) map[refusal.Code]string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "refusal.go", nil, 0)
	if err != nil {
		t.Fatalf("parse: %v", err)
	}
	codes := make(map[refusal.Code]string)
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || len(spec.Values) == 0 {
			return true
		}
		if typ, ok := spec.Type.(*ast.Ident); !ok || typ.Name != "Code" {
			return true
		}
		for i, name := range spec.Names {
			s, err := strconv.Unquote(spec.Values[i].(*ast.BasicLit).Value)
			if err != nil {
				t.Fatalf("%s: %v", name.Name, err)
			}
			if other, ok := codes[refusal.Code(s)]; ok {
				t.Errorf("%s and %s are one code", name.Name, other)
			}
			codes[refusal.Code(s)] = name.Name
		}
		return true
	})
	if len(codes) < 50 {
		t.Fatalf("found %d codes in the source: the test does not read it any more", len(codes))
	}
	return codes
}

func TestEveryCodeStandsInTheTableOnce(t *testing.T) {
	t.Parallel()
	rows := make(map[refusal.Code]int)
	for _, e := range refusal.Table() {
		rows[e.Code]++
	}
	want := make(map[refusal.Code]int)
	for c := range declared(t) {
		want[c] = 1
	}
	if diff := cmp.Diff(want, rows); diff != "" {
		t.Error(diff)
	}
}

func TestEveryRowIsWhole(t *testing.T) {
	t.Parallel()
	form := regexp.MustCompile(`^[a-z][a-z0-9]*(_[a-z0-9]+)*$`)
	texts := make(map[string]refusal.Code)
	for _, e := range refusal.Table() {
		if !form.MatchString(string(e.Code)) || len(e.Code) > 64 { // 64: what a result segment holds
			t.Errorf("%q is no stable name", e.Code)
		}
		if e.Class != refusal.Refuse && e.Class != refusal.Retry && e.Class != refusal.Unknown {
			t.Errorf("%s has class %d", e.Code, e.Class)
		}
		if e.Exit < 1 || e.Exit > 3 {
			t.Errorf("%s ends a command with %d", e.Code, e.Exit)
		}
		if http.StatusText(e.HTTP) == "" {
			t.Errorf("%s has HTTP status %d", e.Code, e.HTTP)
		}
		if e.Text == "" || regexp.MustCompile(`[%\n]`).MatchString(e.Text) {
			t.Errorf("%s has the text %q", e.Code, e.Text)
		}
		if other, ok := texts[e.Text]; ok {
			t.Errorf("%s and %s have one text", e.Code, other)
		}
		texts[e.Text] = e.Code
	}
}

// Scripts read the exit codes: 2 is wrong usage, 3 some records refused.
func TestExitCodesThatAreNotOne(t *testing.T) {
	t.Parallel()
	got := make(map[refusal.Code]int)
	for _, e := range refusal.Table() {
		if e.Exit != 1 {
			got[e.Code] = e.Exit
		}
	}
	want := map[refusal.Code]int{
		refusal.UsageWrong: 2, refusal.DirMismatch: 2,
		refusal.SomeRefused: 3, refusal.KeyUnavailable: 3, refusal.EnclaveCrash: 3, refusal.DigestLength: 3,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestOnlyAnInternalErrorLeavesTheOutcomeOpen(t *testing.T) {
	t.Parallel()
	for _, e := range refusal.Table() {
		if (e.Class == refusal.Unknown) != (e.Code == refusal.Internal) {
			t.Errorf("%s has class %d", e.Code, e.Class)
		}
	}
}

func TestACodeIsFoundThroughAnyWrapping(t *testing.T) {
	t.Parallel()
	wrapped := fmt.Errorf("sign batch: %w", errors.Join(errors.New("other"), fmt.Errorf("check: %w", refusal.FenceStale)))
	if !errors.Is(wrapped, refusal.FenceStale) || errors.Is(wrapped, refusal.FenceConflict) {
		t.Error("errors.Is does not tell codes apart")
	}
	for _, tt := range []struct {
		err  error
		code refusal.Code
		exit int
	}{
		{wrapped, refusal.FenceStale, 1},
		{refusal.UsageWrong, refusal.UsageWrong, 2},
		{fmt.Errorf("run: %w", refusal.SomeRefused), refusal.SomeRefused, 3},
		{errors.New("no code"), refusal.Internal, 1},
		{refusal.Code("not_in_the_table"), "not_in_the_table", 1},
		{nil, refusal.Internal, 0},
	} {
		if got := refusal.Of(tt.err); got != tt.code {
			t.Errorf("Of(%v) = %s, want %s", tt.err, got, tt.code)
		}
		if got := refusal.Exit(tt.err); got != tt.exit {
			t.Errorf("Exit(%v) = %d, want %d", tt.err, got, tt.exit)
		}
	}
}

func TestTheErrorIsCodeAndText(t *testing.T) {
	t.Parallel()
	e, ok := refusal.Lookup(refusal.Busy)
	if !ok || refusal.Busy.Error() != "busy: "+e.Text {
		t.Errorf("got %q", refusal.Busy.Error())
	}
	if _, ok := refusal.Lookup("not_in_the_table"); ok {
		t.Error("Lookup finds what is not there")
	}
	if got := refusal.Code("not_in_the_table").Error(); got != "not_in_the_table" {
		t.Errorf("got %q", got)
	}
}

func TestTheTableCannotBeChangedFromOutside(t *testing.T) {
	t.Parallel()
	rows := refusal.Table()
	rows[0].Text = "changed"
	if e, _ := refusal.Lookup(rows[0].Code); e.Text == "changed" {
		t.Error("Table gives the table itself")
	}
}
