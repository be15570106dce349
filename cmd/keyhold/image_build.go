package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/eif"
)

// The files that image build writes.
const (
	imageFile        = "keyhold.eif"
	measurementsFile = "measurements.json"
)

func imageBuildCmd() *cobra.Command {
	var p imageParts
	var out string
	c := &cobra.Command{
		Use:   "build",
		Short: "Build an enclave image and write its measurements beside it",
		Long: `Pack a kernel, its modules and the enclave's program into an enclave image (EIF),
and write what it measures to, in the form that nitro-cli describe-eif prints:

  PCR0  kernel, command line and both ramdisks: the image
  PCR1  kernel, command line and the first ramdisk, which holds the modules
  PCR2  the second ramdisk, which holds /init, the enclave's program, and nothing else
  PCR8  the signing certificate, where the image is signed

The same parts give the same file, whoever builds it and wherever; the build time
in it is that of SOURCE_DATE_EPOCH, or 1970. An init that is not a static program
of the architecture, modules of another kernel, missing ones, and command lines
with parameters that are not known are refused. No Docker is needed.

With --blobs the image has AWS's kernel, on an EC2 host with nitro-cli. Signing is
what nitro-cli does with --private-key and --signing-certificate; a key policy can
then ask for PCR8. Make such a key on another machine than the one that runs it.`,
		Example: `  # What make eif does
  scripts/kernel && make build
  keyhold image build

  # With AWS's kernel
  keyhold image build --blobs /usr/share/nitro_enclaves/blobs -o dist/aws

  # Signed, so that PCR8 names who built it
  keyhold image build --signing-key key.pem --signing-certificate cert.pem`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			m, err := p.build(time.Now())
			if err != nil {
				return err
			}
			if out == "" {
				out = filepath.Join("dist", p.arch)
			}
			return writeImage(c.OutOrStdout(), out, m)
		},
	}
	p.addFlags(c)
	c.Flags().StringVarP(&out, "output", "o", "", "`folder` to write "+imageFile+" and "+measurementsFile+" to (default dist/ARCH)")
	return c
}

// writeImage writes the image first: measurements of one that is not there would
// mislead, and the other way round nothing is lost.
func writeImage(w io.Writer, folder string, m eif.Image) error {
	raw, err := m.Encode()
	if err != nil {
		return err
	}
	d, err := m.Describe()
	if err != nil {
		return err
	}
	text, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return fmt.Errorf("encode the measurements: %w", err)
	}
	if err := os.MkdirAll(folder, 0o755); err != nil { //nolint:gosec // for everybody to read, like the rest of a build
		return fmt.Errorf("make the output's folder: %w", err)
	}
	for _, f := range []struct {
		name string
		data []byte
	}{{imageFile, raw}, {measurementsFile, append(text, '\n')}} {
		path := filepath.Join(folder, f.name)
		if err := cli.WriteOutput(path, nil, func(w io.Writer) error { _, err := w.Write(f.data); return err }); err != nil {
			return err
		}
		if err := os.Chmod(path, 0o644); err != nil { //nolint:gosec // as above
			return fmt.Errorf("write %s: %w", path, err)
		}
	}
	_, err = fmt.Fprintf(w, "image         %s (%d bytes)\nmeasurements  %s\n%s", filepath.Join(folder, imageFile), len(raw),
		filepath.Join(folder, measurementsFile), registersText(d.Measurements))
	return err
}

func registersText(m eif.Measurements) string {
	text := fmt.Sprintf("PCR0          %s\nPCR1          %s\nPCR2          %s\n", m.PCR0, m.PCR1, m.PCR2)
	if m.PCR8 != "" {
		text += fmt.Sprintf("PCR8          %s\n", m.PCR8)
	}
	return text
}
