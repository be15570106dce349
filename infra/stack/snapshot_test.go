package stack_test

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/keyhold/keyhold/infra/target/targettest"
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

func TestTheSameTargetGivesTheSameTemplate(t *testing.T) {
	for _, v := range variants {
		d := targettest.Read(t, targettest.Values(v.profile, v.arch, targettest.Release(t, "one", v.arch)))
		again, err := synth(t, d)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(again.raw, running(t, v).raw) { //nolint:forbidigo // templates are public
			t.Errorf("%s: the second differs from the first", v)
		}
	}
}
