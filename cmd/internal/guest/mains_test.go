package guest_test

import (
	"bytes"
	"go/parser"
	"go/printer"
	"go/token"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The image under test stands for the shipped one only as far as they are the same program.
func TestTheTwoMainsDifferInTheirRootsAlone(t *testing.T) {
	for _, tc := range []struct{ folder, want string }{
		{filepath.Join("..", "..", "enclave"), `import (
	_ "embed"
	"github.com/keyhold/keyhold/cmd/internal/guest"
)

var amazonRoots []byte

func main() {
	guest.Main(amazonRoots)
}
`},
		{"testimage", `import (
	"os"
	"github.com/keyhold/keyhold/cmd/internal/guest"
)

func main() {
	roots, _ := os.ReadFile("/kms-root.pem")
	guest.Main(roots)
}
`},
	} {
		t.Run(tc.folder, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, program(t, tc.folder)); diff != "" {
				t.Errorf("what the program does (-want +got):\n%s", diff)
			}
		})
	}
}

// program returns the declarations of a main package, which must be one file, without its comments.
func program(t *testing.T, folder string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(folder, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		switch base := filepath.Base(f); {
		case base == "main.go", base == "amazon.pem", strings.HasSuffix(base, "_test.go"):
		default:
			t.Errorf("%s holds %s", folder, base)
		}
	}
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, filepath.Join(folder, "main.go"), nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	for i, decl := range file.Decls {
		if i > 0 {
			out.WriteByte('\n')
		}
		if err := printer.Fprint(&out, token.NewFileSet(), decl); err != nil {
			t.Fatal(err)
		}
		out.WriteByte('\n')
	}
	return out.String()
}
