package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/eif/cpio"
	"github.com/keyhold/keyhold/internal/image"
)

// readImage reads an image, and refuses one that is damaged.
func readImage(path string) (eif.Image, error) {
	raw, err := image.ReadFile(path)
	if err != nil {
		return eif.Image{}, err
	}
	m, err := eif.Parse(raw)
	if err != nil {
		return eif.Image{}, fmt.Errorf("%s: %w", path, err)
	}
	return m, nil
}

func imageDescribeCmd() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "describe FILE",
		Short: "Print what is in an enclave image",
		Long: `Read an enclave image (EIF), of Keyhold or another, and print its measurements,
its sections, and the files in its ramdisks where these are archives as Keyhold
writes them. A file that is damaged, cut short or ambiguous in any way is refused
with the code of what is wrong: one flipped bit is enough.

With --json it prints what nitro-cli describe-eif prints.`,
		Example: `  keyhold image describe dist/amd64/keyhold.eif

  # As nitro-cli prints it
  keyhold image describe dist/amd64/keyhold.eif --json | jq .Measurements`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			m, err := readImage(args[0])
			if err != nil {
				return err
			}
			d, err := m.Describe()
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			if asJSON {
				return printIndented(c.OutOrStdout(), d)
			}
			_, err = io.WriteString(c.OutOrStdout(), describeText(m, d))
			return err
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON, as nitro-cli describe-eif does")
	return c
}

// printIndented writes JSON as nitro-cli lays it out.
func printIndented(w io.Writer, v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode the output: %w", err)
	}
	_, err = w.Write(append(text, '\n'))
	return err
}

func describeText(m eif.Image, d eif.Description) string {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-13s ", name)
		fmt.Fprintf(&b, format+"\n", args...)
	}
	// What is not measured can hold anything, also what a terminal would obey: hence %q.
	line("image", "%q, version %q, EIF %d, %s", d.ImageName, d.ImageVersion, d.EifVersion, m.Arch)
	line("built by", "%q %q at %q", d.Metadata.BuildTool, d.Metadata.BuildToolVersion, d.Metadata.BuildTime)
	line("checksum", "right")
	if c := d.SigningCertificate; c != nil {
		line("signed", "the signature verifies; certificate of %q, valid from %s to %s", c.IssuerName["commonName"], c.NotBefore, c.NotAfter)
	} else {
		line("signed", "no")
	}
	b.WriteString(registersText(d.Measurements))
	line("kernel", "%q, %s", d.Metadata.KernelVersion, contents(m.Kernel))
	line("command line", "%q", m.Cmdline)
	for i, r := range m.Ramdisks {
		line(fmt.Sprintf("ramdisk %d", i), "%s", contents(r))
		files, err := cpio.Read(r)
		if err != nil {
			line("", "no archive as Keyhold writes it; its files are not listed")
		}
		for _, f := range files {
			if f.IsRegular() {
				line("", "/%s, %s", f.Name, contents(f.Data))
			} else {
				line("", "/%s", f.Name)
			}
		}
	}
	return b.String()
}

// contents names bytes by length and hash.
func contents(b []byte) string {
	sum := sha256.Sum256(b)
	return fmt.Sprintf("%d bytes, SHA-256 %s", len(b), hex.EncodeToString(sum[:]))
}

// printedMeasurements is what nitro-cli build-enclave prints.
type printedMeasurements struct{ Measurements eif.Measurements }

func imageMeasureCmd() *cobra.Command {
	var p imageParts
	c := &cobra.Command{
		Use:   "measure [FILE]",
		Short: "Print the measurements of an image, or of the parts of one",
		Long: `Print the registers that an enclave starts with, in the form that nitro-cli
build-enclave prints: of an image (EIF), or, without FILE, of the image that image
build would make of the parts. Nothing is written.`,
		Example: `  keyhold image measure dist/amd64/keyhold.eif

  # Of what is about to be built
  keyhold image measure --init bin/keyhold-enclave

  # PCR0 alone, for a key policy
  keyhold image measure dist/amd64/keyhold.eif | jq -r .Measurements.PCR0`,
		Args: cobra.MaximumNArgs(1),
	}
	p.addFlags(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		m, err := p.subject(c, args)
		if err != nil {
			return err
		}
		measured, err := m.Measure()
		if err != nil {
			return err
		}
		return printIndented(c.OutOrStdout(), printedMeasurements{measured})
	}
	return c
}

// subject is the image of the arguments, or of the parts.
func (p *imageParts) subject(c *cobra.Command, args []string) (eif.Image, error) {
	if len(args) == 0 {
		return p.build(time.Now())
	}
	if p.given(c) {
		return eif.Image{}, cliImageOrParts()
	}
	return readImage(args[0])
}
