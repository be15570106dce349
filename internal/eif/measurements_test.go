package eif_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/eif"
)

// printed is what nitro-cli describe-eif prints of a signed image, shortened.
func printed(edit ...string) string {
	text := `{"EifVersion": 4, "Measurements": {"HashAlgorithm": "Sha384 { ... }", "PCR0": "` + strings.Repeat("a1", 48) +
		`", "PCR1": "` + strings.Repeat("b2", 48) + `", "PCR2": "` + strings.Repeat("c3", 48) + `", "PCR8": "` + strings.Repeat("d8", 48) +
		`"}, "IsSigned": true, "Metadata": {"BuildMetadata": {}}}` + "\n"
	return strings.NewReplacer(edit...).Replace(text)
}

func TestMeasurementsAreReadAsNitroPrintsThem(t *testing.T) {
	want := eif.Measurements{
		HashAlgorithm: "Sha384 { ... }", PCR0: strings.Repeat("a1", 48), PCR1: strings.Repeat("b2", 48),
		PCR2: strings.Repeat("c3", 48), PCR8: strings.Repeat("d8", 48),
	}
	got, err := eif.ParseMeasurements([]byte(printed()))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	want.PCR8 = ""
	got, err = eif.ParseMeasurements([]byte(printed(`, "PCR8": "`+strings.Repeat("d8", 48)+`"`, "")))
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Error(err, diff)
	}
}

func TestWhatAnImageMeasuresToIsReadBack(t *testing.T) {
	want, err := sample().Measure()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(struct{ Measurements eif.Measurements }{want})
	if err != nil {
		t.Fatal(err)
	}
	got, err := eif.ParseMeasurements(raw)
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Error(err, diff)
	}
}

func TestMeasurementsThatCouldMeanLessAreRefused(t *testing.T) {
	for name, text := range map[string]string{
		"nothing":                "",
		"null":                   "null",
		"a list":                 "[" + printed() + "]",
		"no measurements":        `{"EifVersion": 4}`,
		"measurements of null":   `{"Measurements": null}`,
		"measurements twice":     printed(`"IsSigned": true`, `"Measurements": {}`),
		"another case":           printed(`"Measurements"`, `"measurements"`),
		"a second value":         printed() + "{}",
		"cut off":                printed()[:300],
		"another hash":           printed("Sha384", "Sha256"),
		"no hash":                printed(`"HashAlgorithm": "Sha384 { ... }", `, ""),
		"a register twice":       printed(`"PCR8"`, `"PCR0"`),
		"a register in small":    printed(`"PCR1"`, `"pcr1"`),
		"an unknown register":    printed(`"PCR8"`, `"PCR9"`),
		"no PCR2":                printed(`"PCR2": "`+strings.Repeat("c3", 48)+`", `, ""),
		"a register of null":     printed(`"`+strings.Repeat("d8", 48)+`"`, "null"),
		"a number":               printed(`"`+strings.Repeat("d8", 48)+`"`, "8"),
		"an empty register":      printed(strings.Repeat("d8", 48), ""),
		"a short register":       printed(strings.Repeat("b2", 48), strings.Repeat("b2", 47)),
		"a long register":        printed(strings.Repeat("b2", 48), strings.Repeat("b2", 49)),
		"capitals":               printed("a1a1", "A1A1"),
		"not hex":                printed("a1a1", "g1a1"),
		"a debug enclave's":      printed(strings.Repeat("a1", 48), strings.Repeat("00", 48)),
		"longer than any can be": printed() + strings.Repeat(" ", eif.MaxMeasurements),
	} {
		if m, err := eif.ParseMeasurements([]byte(text)); !errors.Is(err, eif.BadMeasurements) || m != (eif.Measurements{}) {
			t.Errorf("%s: got %+v, %v", name, m, err)
		}
	}
}

func FuzzParseMeasurements(f *testing.F) {
	f.Add([]byte(printed()))
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := eif.ParseMeasurements(raw)
		if err != nil {
			if !errors.Is(err, eif.BadMeasurements) {
				t.Errorf("got %v, want BadMeasurements", err)
			}
			return
		}
		again, err := json.Marshal(struct{ Measurements eif.Measurements }{m})
		if err != nil {
			t.Fatal(err)
		}
		if back, err := eif.ParseMeasurements(again); err != nil || back != m {
			t.Errorf("reads back as %+v, %v", back, err)
		}
	})
}
