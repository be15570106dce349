package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/keypolicy"
)

// configLine is one line of what a config says, for a person.
type configLine struct{ name, text string }

// configLines says in words what a config permits.
func configLines(c *config.Config) []configLine {
	out := []configLine{
		{"KMS key", c.KMSKeyARN},
		{"may open", fmt.Sprintf("keyring %s, epochs %s; new keys are sealed under %d", c.Keyring, joined(c.Epochs), c.SealEpoch)},
	}
	for _, p := range c.Policies {
		out = append(out, configLine{"policy", p.Name + " signs " + kindsText(p.Kinds)})
	}
	for _, k := range c.Create {
		out = append(out, configLine{"may make", fmt.Sprintf("%d %s keys with policy %s", k.Max, k.Algorithm, k.Policy)})
	}
	if len(c.Create) == 0 {
		out = append(out, configLine{"may make", "no keys"})
	}
	for _, k := range c.DenyKeys {
		out = append(out, configLine{"denied", "key " + k})
	}
	whoMay := "its administrators may change it"
	if c.KeyPolicy.Mode == keypolicy.Sealed {
		whoMay = "nobody may ever change it"
	}
	return append(out,
		configLine{"lease", fmt.Sprintf("at most %v, nothing is released in its last %v", c.Lease.Max(), c.Lease.Margin())},
		configLine{"key policy", fmt.Sprintf("%s: %s; proved every %v, and an enclave ends %v after the last proof",
			c.KeyPolicy.Mode, whoMay, c.KeyPolicy.RevalidateEvery(), c.KeyPolicy.RevalidateGrace())})
}

// kindsText names kinds, and says of which of them a caller chooses the very
// bytes that are signed.
func kindsText(kinds []record.Kind) string {
	var words []string
	open := false
	for _, k := range kinds {
		words = append(words, string(k))
		switch k {
		case record.Raw, record.Digest:
			open = true
		case record.Message:
		}
	}
	text := strings.Join(words, ", ")
	if open {
		text += " (whoever asks chooses the very bytes that are signed)"
	}
	return text
}

func joined[T any](list []T) string {
	var words []string
	for _, v := range list {
		words = append(words, fmt.Sprint(v))
	}
	return strings.Join(words, " ")
}

func configShowCmd() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "show FILE",
		Short: "Say in words what a config permits",
		Long: `Read a config exactly as an enclave does and say in words what it permits: which
KMS key and keyring, which keys may be made, what each policy may sign, which keys
are denied, how long leases are; and the PCR16 that it gives. It must be valid.`,
		Example: `  keyhold config show config.json

  # What a change comes to
  diff <(keyhold config show old.json) <(keyhold config show config.json)`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			raw, parsed, err := parseConfig(c, args[0])
			if err != nil {
				return err
			}
			pcr := config.PCR16(raw)
			if asJSON {
				return cli.PrintJSON(c.OutOrStdout(), builtConfig{PCR16: fmt.Sprintf("%x", pcr), Config: parsed})
			}
			var b lines
			for _, l := range configLines(parsed) {
				b.add(l.name, "%s", l.text)
			}
			b.add("PCR16", "%x", pcr)
			_, err = io.WriteString(c.OutOrStdout(), b.String())
			return err
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func configPCR16Cmd() *cobra.Command {
	return &cobra.Command{
		Use:   "pcr16 FILE",
		Short: "Print the PCR16 that a config gives, and nothing else",
		Long: `Print the value that PCR16 has in an enclave that took this config: 96 hex digits,
for the KMS key policy beside PCR0. The config must be valid. keyhold config hash
prints the other hashes too.`,
		Example: `  keyhold config pcr16 config.json`,
		Args:    cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			raw, _, err := parseConfig(c, args[0])
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "%x\n", config.PCR16(raw))
			return err
		},
	}
}

// parseConfig reads FILE as an enclave would.
func parseConfig(c *cobra.Command, path string) ([]byte, *config.Config, error) {
	raw, err := readConfig(c, path)
	if err != nil {
		return nil, nil, err
	}
	parsed, err := config.Parse(raw)
	if err != nil {
		return nil, nil, cli.Errorf(refusal.ConfigInvalid, "%s is not valid:\n%w", path, err)
	}
	return raw, parsed, nil
}
