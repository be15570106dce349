package main

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/refusal"
)

func configCmd() *cobra.Command {
	return noun("config", "Make, check and measure an enclave's config",
		configBuildCmd(), configValidateCmd(), configShowCmd(), configHashCmd(), configPCR16Cmd(), configFormatCmd())
}

// readConfig reads FILE, or stdin for "-". One byte more than a config may have
// is enough to refuse it.
func readConfig(c *cobra.Command, path string) ([]byte, error) {
	src := c.InOrStdin()
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("read the config: %w", err)
		}
		defer f.Close() //nolint:errcheck // it was only read
		src = f
	}
	raw, err := io.ReadAll(io.LimitReader(src, config.MaxLen+1))
	if err != nil {
		return nil, fmt.Errorf("read the config: %w", err)
	}
	return raw, nil
}

func configValidateCmd() *cobra.Command {
	return &cobra.Command{
		Use:     "validate FILE",
		Aliases: []string{"check"},
		Short:   "Report everything that is wrong with a config",
		Long: `Read a config exactly as an enclave does and report everything that is wrong
with it, one problem a line. An enclave measures the bytes, so it accepts only
the one canonical spelling of a config; keyhold config format writes it.`,
		Example: `  keyhold config validate config.json

  # Check what is about to be deployed
  generate-config | keyhold config validate -`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			raw, err := readConfig(c, args[0])
			if err != nil {
				return err
			}
			if _, err := config.Parse(raw); err != nil {
				return cli.Errorf(refusal.ConfigInvalid, "%s is not valid:\n%w", args[0], err)
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "%s is valid\n", args[0])
			return err
		},
	}
}

// measured is what a config file comes to.
type measured struct {
	SHA256      string `json:"sha256"`      // boot statements carry it
	Measurement string `json:"measurement"` // SHA-384 that PCR16 is extended with
	PCR16       string `json:"pcr16"`       // what the register then holds
}

func configHashCmd() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "hash FILE",
		Short: "Print the hash of a config and the PCR16 that it gives",
		Long: `Print what a config file measures to: its SHA-256, which boot statements carry;
the SHA-384 that the enclave extends PCR16 with; and the value that PCR16 then
has, which goes into the KMS key policy beside PCR0. The config must be valid.`,
		Example: `  keyhold config hash config.json

  # PCR16 for a key policy
  keyhold config hash config.json --json | jq -r .pcr16`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			raw, err := readConfig(c, args[0])
			if err != nil {
				return err
			}
			if _, err := config.Parse(raw); err != nil {
				return cli.Errorf(refusal.ConfigInvalid, "%s is not valid:\n%w", args[0], err)
			}
			sum, m, pcr := config.Hash(raw), config.Measurement(raw), config.PCR16(raw)
			out := measured{hex.EncodeToString(sum[:]), hex.EncodeToString(m[:]), hex.EncodeToString(pcr[:])}
			if asJSON {
				return cli.PrintJSON(c.OutOrStdout(), out)
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "sha256       %s\nmeasurement  %s\npcr16        %s\n", out.SHA256, out.Measurement, out.PCR16)
			return err
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

var errStdinInPlace = errors.New("-w needs a file, not stdin")

func configFormatCmd() *cobra.Command {
	var write bool
	c := &cobra.Command{
		Use:   "format FILE",
		Short: "Rewrite a config in its canonical form",
		Long: `Rewrite a config, in whatever spelling, in the one form that an enclave accepts:
two spaces of indent, keys in their fixed order, a newline at the end. Its
meaning must be valid. The result is printed, or replaces the file with -w.`,
		Example: `  # See what would change
  keyhold config format config.json | diff config.json -

  # Change it
  keyhold config format -w config.json`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if write && args[0] == "-" {
				return cli.Usagef("%w", errStdinInPlace)
			}
			raw, err := readConfig(c, args[0])
			if err != nil {
				return err
			}
			out, err := config.Format(raw)
			if err != nil {
				return cli.Errorf(refusal.ConfigInvalid, "%s is not valid:\n%w", args[0], err)
			}
			path := "-"
			if write {
				path = args[0]
			}
			return cli.WriteOutput(path, c.OutOrStdout(), func(w io.Writer) error {
				_, err := bytes.NewReader(out).WriteTo(w)
				return err
			})
		},
	}
	c.Flags().BoolVarP(&write, "write", "w", false, "replace the file")
	return c
}
