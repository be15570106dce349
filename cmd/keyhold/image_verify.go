package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/image"
)

var errImageDiffers = errors.New("the images differ in what is measured")

func cliImageOrParts() error {
	return cli.Usagef("give an image, or the parts of one, not both")
}

func imageVerifyCmd() *cobra.Command {
	var p imageParts
	var against string
	var asJSON bool
	c := &cobra.Command{
		Use:   "verify FILE",
		Short: "Rebuild an image and tell where it differs from this one",
		Long: `Build the image again, from the same parts as image build, and compare it with
FILE: an image (EIF), or a file of measurements. Of an image it names the section
that differs, and within a ramdisk the file; of measurements, the registers and what
is measured in them. With --measurements nothing is built: the image is compared
with measurements that somebody else published.

Build time and names are in the metadata, which are not measured: where they alone
differ, the images are the same enclave. The exit code is 1 where anything measured
differs. A signature is not made again: it is checked, and shown as PCR8.`,
		Example: `  # Is this the image of the source in this folder?
  make build && scripts/kernel
  keyhold image verify downloaded.eif

  # Is it the one that was published?
  keyhold image verify downloaded.eif --measurements measurements.json

  # Does this source give the published measurements?
  keyhold image verify measurements.json --json`,
		Args: cobra.ExactArgs(1),
	}
	p.addFlags(c)
	c.Flags().StringVar(&against, "measurements", "", "compare with the measurements in this `file`, and build nothing")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.RunE = func(c *cobra.Command, args []string) error {
		if against != "" && p.given(c) {
			return cli.Usagef("--measurements: nothing is built, so there are no parts to name")
		}
		v, err := p.verify(args[0], against)
		if err != nil {
			return err
		}
		return v.report(c.OutOrStdout(), args[0], asJSON)
	}
	return c
}

// verdict is what a comparison came to.
type verdict struct {
	Same        bool               `json:"same"` // in all that is measured
	PCR0        string             `json:"pcr0"` // of the file
	WantPCR0    string             `json:"want_pcr0"`
	Differences []image.Difference `json:"differences"`
}

// verify compares file with measurements, or with what is built of the parts.
func (p *imageParts) verify(file, against string) (verdict, error) {
	raw, err := image.ReadFile(file)
	if err != nil {
		return verdict{}, err
	}
	got, have, err := readEither(file, raw)
	if err != nil {
		return verdict{}, err
	}
	var want eif.Measurements
	var found []image.Difference
	if against != "" {
		if want, err = readMeasurements(against); err != nil {
			return verdict{}, err
		}
		found = image.CompareMeasurements(want, have)
	} else {
		built, err := p.build(time.Now())
		if err != nil {
			return verdict{}, fmt.Errorf("build the image to compare with: %w", err)
		}
		if want, err = built.Measure(); err != nil {
			return verdict{}, err
		}
		found = differences(built, want, got, have, p.key != "")
	}
	v := verdict{Same: true, PCR0: have.PCR0, WantPCR0: want.PCR0, Differences: found}
	for _, d := range found {
		v.Same = v.Same && !d.Measured
	}
	if v.Differences == nil {
		v.Differences = []image.Difference{}
	}
	return v, nil
}

// differences looks into the sections where there is a file to look into. Without
// a key the signature was not made again, and says nothing about the parts.
func differences(built eif.Image, want eif.Measurements, got *eif.Image, have eif.Measurements, signed bool) []image.Difference {
	if !signed {
		want.PCR8 = have.PCR8
		if got != nil {
			built.Signature = got.Signature
		}
	}
	if got == nil {
		return image.CompareMeasurements(want, have)
	}
	found := image.Compare(built, *got)
	if want.PCR8 != have.PCR8 {
		found = append(found, image.Difference{Section: "PCR8", Detail: "another signing certificate", Measured: true})
	}
	return found
}

// readEither reads an image or measurements; the image is nil for these.
func readEither(name string, raw []byte) (*eif.Image, eif.Measurements, error) {
	if strings.HasPrefix(strings.TrimSpace(string(raw[:min(len(raw), 64)])), "{") {
		measured, err := parseMeasurements(name, raw)
		return nil, measured, err
	}
	m, err := eif.Parse(raw)
	if err != nil {
		return nil, eif.Measurements{}, fmt.Errorf("%s: %w", name, err)
	}
	measured, err := m.Measure()
	if err != nil {
		return nil, eif.Measurements{}, fmt.Errorf("%s: %w", name, err)
	}
	return &m, measured, nil
}

func readMeasurements(name string) (eif.Measurements, error) {
	raw, err := image.ReadFile(name)
	if err != nil {
		return eif.Measurements{}, err
	}
	return parseMeasurements(name, raw)
}

func parseMeasurements(name string, raw []byte) (eif.Measurements, error) {
	m, err := eif.ParseMeasurements(raw)
	if err != nil {
		return m, fmt.Errorf("%s: %w", name, err)
	}
	return m, nil
}

func (v verdict) report(w io.Writer, name string, asJSON bool) error {
	if asJSON {
		if err := printIndented(w, v); err != nil {
			return err
		}
	} else if err := v.print(w, name); err != nil {
		return err
	}
	if !v.Same {
		return errImageDiffers
	}
	return nil
}

func (v verdict) print(w io.Writer, name string) error {
	var b strings.Builder
	for _, d := range v.Differences {
		note := ""
		if !d.Measured {
			note = " (not measured)"
		}
		fmt.Fprintf(&b, "differs: %s%s: %s\n", d.Section, note, d.Detail)
	}
	if v.Same {
		fmt.Fprintf(&b, "%s is the same enclave\nPCR0 %s\n", name, v.PCR0)
	} else {
		fmt.Fprintf(&b, "%s is another enclave\nPCR0 %s\nwant %s\n", name, v.PCR0, v.WantPCR0)
	}
	_, err := io.WriteString(w, b.String())
	return err
}
