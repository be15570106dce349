package cli

import (
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/refusal"
)

// configPCR is the register that holds the config's measurement.
const configPCR = 16

// maxFile bounds a file of measurements or certificates, in bytes.
const maxFile = eif.MaxMeasurements + 1

// AttestOptions say what an enclave must prove to be.
type AttestOptions struct {
	PCR0         []string // hex
	Measurements string   // file that nitro-cli build-enclave or describe-eif printed
	Config       string   // file
	TestRoot     string   // file; PEM of a root that is not Amazon's
	Pair         []string // HEX=FILE: PCR0 of an image with the config that goes with it
}

// AddFlags lets c's command line fill o.
func (o *AttestOptions) AddFlags(c *cobra.Command) {
	f := c.Flags()
	f.StringSliceVar(&o.PCR0, "pcr0", splitEnv(EnvPCR0), "PCR0 of a wanted image, 96 hex `digits`; may be repeated (env "+EnvPCR0+")")
	f.StringVar(&o.Measurements, "measurements", os.Getenv(EnvMeasurements), "`file` with the JSON that nitro-cli build-enclave printed, in place of --pcr0 (env "+EnvMeasurements+")")
	o.AddConfigFlag(c)
	f.StringVar(&o.TestRoot, "test-root", os.Getenv(EnvTestRoot), "for local mode only: `file` with the root certificate that is trusted in place of Amazon's (env "+EnvTestRoot+")")
}

// AddConfigFlag adds --config alone.
func (o *AttestOptions) AddConfigFlag(c *cobra.Command) {
	c.Flags().StringVar(&o.Config, "config", os.Getenv(EnvConfig), "the enclave's config `file`, which is measured into PCR16 (env "+EnvConfig+")")
}

// AddPairFlag adds --pair, for what looks back at images with other configs.
func (o *AttestOptions) AddPairFlag(c *cobra.Command) {
	c.Flags().StringSliceVar(&o.Pair, "pair", nil, "`HEX=FILE`: PCR0 of an image and the config it ran with, beside or in place of --pcr0 and --config; may be repeated")
}

func splitEnv(name string) []string {
	v := os.Getenv(name)
	if v == "" {
		return nil
	}
	return strings.Split(v, ",")
}

// ReadConfig returns the config file as it is and what it says.
func (o *AttestOptions) ReadConfig() ([]byte, *config.Config, error) {
	if o.Config == "" {
		return nil, nil, Usagef("no config: give --config FILE or set %s", EnvConfig)
	}
	raw, err := os.ReadFile(o.Config)
	if err != nil {
		return nil, nil, fmt.Errorf("read the config: %w", err)
	}
	parsed, err := config.Parse(raw)
	if err != nil {
		return nil, nil, fmt.Errorf("config %s: %w (%w)", o.Config, err, refusal.ConfigInvalid)
	}
	return raw, parsed, nil
}

// Images are the wanted images without PCR16.
func (o *AttestOptions) Images() ([]attestation.Image, error) {
	var images []attestation.Image
	for _, text := range o.PCR0 {
		v, err := parsePCR(text)
		if err != nil {
			return nil, Usagef("--pcr0: %w", err)
		}
		images = append(images, attestation.Image{PCRs: map[int][]byte{0: v}})
	}
	if o.Measurements != "" {
		img, err := readMeasurements(o.Measurements)
		if err != nil {
			return nil, err
		}
		images = append(images, img)
	}
	if len(images) == 0 {
		return nil, Usagef("no wanted image: give --pcr0 HEX or --measurements FILE")
	}
	return images, nil
}

// Pairs are the wanted images, each with PCR16 of the config file, and those of
// --pair; and the configs that these stand for.
func (o *AttestOptions) Pairs() (images []attestation.Image, configs []*config.Config, err error) {
	add := func(file string, of ...attestation.Image) error {
		raw, parsed, err := (&AttestOptions{Config: file}).ReadConfig()
		if err != nil {
			return err
		}
		pcr := config.PCR16(raw)
		for _, img := range of {
			img.PCRs[configPCR] = pcr[:]
		}
		images, configs = append(images, of...), append(configs, parsed)
		return nil
	}
	if len(o.Pair) == 0 || len(o.PCR0) > 0 || o.Measurements != "" {
		of, err := o.Images()
		if err != nil {
			return nil, nil, err
		}
		if err := add(o.Config, of...); err != nil {
			return nil, nil, err
		}
	}
	for _, text := range o.Pair {
		digits, file, _ := strings.Cut(text, "=")
		pcr0, err := parsePCR(digits)
		if err != nil || file == "" {
			return nil, nil, Usagef("--pair: want HEX=FILE with 96 hex digits")
		}
		if err := add(file, attestation.Image{PCRs: map[int][]byte{0: pcr0}}); err != nil {
			return nil, nil, err
		}
	}
	return images, configs, nil
}

// Root is the trusted root. Another than Amazon's is said aloud on warn.
func (o *AttestOptions) Root(warn io.Writer) (attestation.Root, error) {
	if o.TestRoot == "" {
		return attestation.AWSRoot(), nil
	}
	b, err := readFile(o.TestRoot)
	if err != nil {
		return attestation.Root{}, fmt.Errorf("read the test root: %w", err)
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE" {
		return attestation.Root{}, Usagef("%s holds no PEM certificate", o.TestRoot)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return attestation.Root{}, Usagef("%s holds no certificate that can be read", o.TestRoot)
	}
	if _, err := fmt.Fprintf(warn, "WARNING: attestation is checked against the root in %s, NOT against Amazon's.\n"+
		"WARNING: whoever holds that root's key can pretend to be any enclave. For local mode only.\n", o.TestRoot); err != nil {
		return attestation.Root{}, fmt.Errorf("warn of the test root: %w", err)
	}
	return attestation.TestRoot(cert), nil
}

var errPCR = errors.New("want 96 hex digits")

func parsePCR(text string) ([]byte, error) {
	v, err := hex.DecodeString(strings.TrimSpace(text))
	if err != nil || len(v) != 48 {
		return nil, errPCR
	}
	return v, nil
}

// readMeasurements takes the registers 0 to 2, and 8 where the image is signed.
func readMeasurements(path string) (attestation.Image, error) {
	b, err := readFile(path)
	if err != nil {
		return attestation.Image{}, fmt.Errorf("read the measurements: %w", err)
	}
	m, err := eif.ParseMeasurements(b)
	if err != nil {
		return attestation.Image{}, Usagef("%s: %w", path, err)
	}
	img := attestation.Image{PCRs: map[int][]byte{}}
	for register, text := range map[int]string{0: m.PCR0, 1: m.PCR1, 2: m.PCR2, 8: m.PCR8} {
		if text == "" { // not signed
			continue
		}
		if img.PCRs[register], err = parsePCR(text); err != nil {
			return attestation.Image{}, Usagef("%s: PCR%d: %w", path, register, err)
		}
	}
	return img, nil
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile))
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return b, err
}
