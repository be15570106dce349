package stack_test

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"
)

var update = flag.Bool("update", false, "write the snapshots anew")

func TestTemplatesAreTheReviewedOnes(t *testing.T) {
	for _, v := range variants {
		t.Run(v.String(), func(t *testing.T) {
			got := running(t, v).raw
			file := filepath.Join("testdata", v.String()+".template.json")
			if *update {
				if err := os.WriteFile(file, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) { //nolint:forbidigo // templates are public
				t.Errorf("%s is another template now; look at the difference, then: go test ./stack -update", file)
			}
		})
	}
}
