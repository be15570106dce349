package archtest_test

import (
	"go/ast"
	goparser "go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// modelled are the packages whose steps the models in model/ describe.
var modelled = []string{"enclave/internal/sign", "parent/lease", "parent/pipeline", "parent/signclient", "parent/store"}

var (
	promelaComment = regexp.MustCompile(`(?s)/\*.*?\*/`)
	dottedName     = regexp.MustCompile(`\b[A-Za-z]\w*(?:\.[A-Za-z]\w*)+\b`)
)

// TestTheModelsNameWhatIsThere: the comments of a model say which function does
// each step, so a function that is renamed or removed has to be looked for there.
func TestTheModelsNameWhatIsThere(t *testing.T) {
	known := dottedNames(t, modelled)
	files, err := filepath.Glob(filepath.Join(moduleRoot(t), "model", "*.pml"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%d models, %v", len(files), err)
	}
	named := 0
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, comment := range promelaComment.FindAllString(string(raw), -1) {
			for _, name := range dottedName.FindAllString(comment, -1) {
				if strings.HasSuffix(name, ".pml") || strings.HasSuffix(name, ".md") {
					continue
				}
				if named++; !known[name] {
					t.Errorf("%s names %s, which is nowhere in %v", filepath.Base(file), name, modelled)
				}
			}
		}
	}
	if named < 40 {
		t.Errorf("only %d names were found in the models", named)
	}
}

// dottedNames are Type.Method, Type.Field, pkg.Name and pkg.Type.Member of the
// packages, tests left aside. A comment may say client for what is declared as
// type Client.
func dottedNames(t *testing.T, dirs []string) map[string]bool {
	t.Helper()
	known := map[string]bool{}
	for _, dir := range dirs {
		files, err := filepath.Glob(filepath.Join(moduleRoot(t), dir, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %d files, %v", dir, len(files), err)
		}
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			f, err := goparser.ParseFile(token.NewFileSet(), file, nil, goparser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range declared(f) {
				known[name] = true
				known[f.Name.Name+"."+name] = true
			}
		}
	}
	return known
}

// declared lists what a file declares: Name, Type.Method and Type.Field.
func declared(f *ast.File) (names []string) {
	for _, d := range f.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			names = append(names, receiver(d)+d.Name.Name)
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				names = append(names, declaredBy(spec)...)
			}
		}
	}
	return names
}

// receiver is the type of a method with a dot, or empty.
func receiver(d *ast.FuncDecl) string {
	if d.Recv == nil {
		return ""
	}
	of := d.Recv.List[0].Type
	if p, ok := of.(*ast.StarExpr); ok {
		of = p.X
	}
	if id, ok := of.(*ast.Ident); ok {
		return id.Name + "."
	}
	return ""
}

func declaredBy(spec ast.Spec) (names []string) {
	switch spec := spec.(type) {
	case *ast.ValueSpec:
		for _, id := range spec.Names {
			names = append(names, id.Name)
		}
	case *ast.TypeSpec:
		names = append(names, spec.Name.Name)
		var members *ast.FieldList
		switch is := spec.Type.(type) {
		case *ast.StructType:
			members = is.Fields
		case *ast.InterfaceType:
			members = is.Methods
		}
		if members == nil {
			break
		}
		for _, m := range members.List {
			for _, id := range m.Names {
				names = append(names, spec.Name.Name+"."+id.Name)
			}
		}
	}
	return slices.Compact(names)
}
