package archtest_test

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// sbomEnv names the folder of the bills of materials; make sbom writes them and sets this.
const sbomEnv = "KEYHOLD_SBOM"

// sbom is what the tests read of a CycloneDX bill of materials.
type sbom struct {
	Format       string `json:"bomFormat"`
	SerialNumber string `json:"serialNumber"`
	Metadata     struct {
		Timestamp string `json:"timestamp"`
	} `json:"metadata"`
	Components []struct {
		Name    string `json:"name"`
		Version string `json:"version"`
		Hashes  []struct {
			Algorithm string `json:"alg"`
			Content   string `json:"content"`
		} `json:"hashes"`
	} `json:"components"`
}

func TestTheSBOMListsWhatIsLinkedAndNothingThatChanges(t *testing.T) {
	folder := os.Getenv(sbomEnv)
	if folder == "" {
		t.Skipf("%s is not set: make sbom writes the bills of materials and runs this", sbomEnv)
	}
	sums := goSum(t)
	for _, tc := range []struct {
		file string
		want []string
	}{
		{"keyhold-enclave.cdx.json", goldenModules(t)},
		{"keyhold-parent.cdx.json", linkedModules(t, "./cmd/parent", "")},
	} {
		t.Run(tc.file, func(t *testing.T) {
			bill := readSBOM(t, filepath.Join(folder, tc.file))
			if bill.Metadata.Timestamp != "" || bill.SerialNumber != "" {
				t.Errorf("written at %q as %q: the same sources give another file", bill.Metadata.Timestamp, bill.SerialNumber)
			}
			var got []string
			for _, c := range bill.Components {
				got = append(got, c.Name+" "+c.Version)
				if len(c.Hashes) != 1 || c.Hashes[0].Algorithm != "SHA-256" || c.Hashes[0].Content != sums[c.Name+" "+c.Version] {
					t.Errorf("%s %s: hashes %v, want that of go.sum, %s", c.Name, c.Version, c.Hashes, sums[c.Name+" "+c.Version])
				}
			}
			slices.Sort(got)
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("the components are not the modules linked (-want +got):\n%s", diff)
			}
			t.Logf("%d components", len(got))
		})
	}
}

func readSBOM(t *testing.T, name string) *sbom {
	t.Helper()
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	var bill sbom
	if err := json.Unmarshal(raw, &bill); err != nil {
		t.Fatalf("read %s: %v", name, err)
	}
	if bill.Format != "CycloneDX" {
		t.Fatalf("%s has the format %q", name, bill.Format)
	}
	return &bill
}

// goSum maps "module version" to the hex form of the hash of its files in go.sum.
func goSum(t *testing.T) map[string]string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(moduleRoot(t), "go.sum"))
	if err != nil {
		t.Fatal(err)
	}
	sums := map[string]string{}
	for line := range strings.Lines(string(raw)) {
		fields := strings.Fields(line)
		if len(fields) != 3 || strings.HasSuffix(fields[1], "/go.mod") {
			continue
		}
		sum, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(fields[2], "h1:"))
		if err != nil {
			t.Fatalf("read go.sum: %v", err)
		}
		sums[fields[0]+" "+fields[1]] = hex.EncodeToString(sum)
	}
	return sums
}
