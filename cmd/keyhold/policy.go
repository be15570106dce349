package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/keypolicy"
)

func policyCmd() *cobra.Command {
	return noun("policy", "Make, prove and compare the policy of the KMS key",
		policyPrintCmd(), policyProveCmd(), policyDiffCmd())
}

// maxPolicyFile bounds what is read as a policy, in bytes: 32 KB of policy, every
// character escaped.
const maxPolicyFile = 256 << 10

// policyOptions say what a policy shall be.
type policyOptions struct {
	pairs    cli.AttestOptions
	account  string
	parent   string
	admins   []string
	mode     string
	pcr8     string
	bindRole bool
	creating bool
	nobody   bool
}

func (o *policyOptions) addFlags(c *cobra.Command, mode string) {
	f := c.Flags()
	f.StringSliceVar(&o.pairs.PCR0, "pcr0", nil, "PCR0 of an admitted image, 96 hex `digits`; twice while rolling")
	f.StringVar(&o.pairs.Measurements, "measurements", "", "`file` with the JSON that make dist or nitro-cli printed, in place of --pcr0")
	o.pairs.AddConfigFlag(c)
	o.pairs.AddPairFlag(c)
	f.StringVar(&o.account, "account", "", "account that owns the key, 12 `digits`; by default that of the roles or of the config's key")
	f.StringVar(&o.parent, "parent-role", "", "`ARN` of the role of the parent instances")
	f.StringArrayVar(&o.admins, "admin-role", nil, "`ARN` of a role that administers the key; may be repeated")
	f.StringVar(&o.mode, "mode", mode, "managed: administrators can change the policy; sealed: nobody ever can")
	f.StringVar(&o.pcr8, "pcr8", "", "ask of every image this PCR8 too, 96 hex `digits`: the certificate that signed it")
	f.BoolVar(&o.bindRole, "bind-parent-role", false, "ask of every enclave PCR3 too: that its instance has the role of --parent-role")
	f.BoolVar(&o.creating, "creating", false, "GenerateDataKey is open to the pairs, as it must be while keyrings are created")
	f.BoolVar(&o.nobody, "nobody", false, "no pair is admitted, as before there is an image and a config")
}

// wantsPairs reports whether the flags or the environment name any image.
func (o *policyOptions) wantsPairs() bool {
	return len(o.pairs.PCR0) > 0 || o.pairs.Measurements != "" || len(o.pairs.Pair) > 0
}

// readPairs returns the pairs that the flags name, and the account of the key that
// their configs are for.
func (o *policyOptions) readPairs() (pairs []keypolicy.Pair, account string, err error) {
	if o.nobody {
		if o.wantsPairs() {
			return nil, "", cli.Usagef("--nobody and an admitted image exclude each other")
		}
		return []keypolicy.Pair{}, "", nil
	}
	images, configs, err := o.pairs.Pairs()
	if err != nil {
		return nil, "", err
	}
	for _, img := range images {
		pairs = append(pairs, keypolicy.Pair{PCR0: keypolicy.PCR(img.PCRs[0]), PCR16: keypolicy.PCR(img.PCRs[16])})
	}
	for _, c := range configs {
		of := strings.Split(c.KMSKeyARN, ":")[4]
		if account != "" && account != of {
			return nil, "", cli.Usagef("the configs are for keys of two accounts")
		}
		account = of
	}
	return pairs, account, nil
}

// registers returns the values of --pcr8 and --bind-parent-role.
func (o *policyOptions) registers() (pcr8, pcr3 *keypolicy.PCR, err error) {
	if o.pcr8 != "" {
		v, err := keypolicy.ParsePCR(strings.TrimSpace(o.pcr8))
		if err != nil {
			return nil, nil, cli.Usagef("--pcr8: %w", err)
		}
		pcr8 = &v
	}
	if o.bindRole {
		v, err := keypolicy.ParentPCR3(o.parent)
		if err != nil {
			return nil, nil, cli.Usagef("--bind-parent-role needs --parent-role: %w", err)
		}
		pcr3 = &v
	}
	return pcr8, pcr3, nil
}

// accountOf returns the first account that is known: the flag's, the config's or
// the parent role's. Build and Prove refuse what does not fit together.
func (o *policyOptions) accountOf(config string) string {
	if o.account != "" {
		return o.account
	}
	if config != "" {
		return config
	}
	if parts := strings.Split(o.parent, ":"); len(parts) == 6 {
		return parts[4]
	}
	return ""
}

// readPolicy reads FILE, or stdin for "-": a policy, or what aws kms
// get-key-policy prints around it.
func readPolicy(c *cobra.Command, path string) (keypolicy.Policy, error) {
	src, name := c.InOrStdin(), "the policy on stdin"
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return keypolicy.Policy{}, fmt.Errorf("read the policy: %w", err)
		}
		defer f.Close() //nolint:errcheck // it was only read
		src, name = f, path
	}
	raw, err := io.ReadAll(io.LimitReader(src, maxPolicyFile+1))
	if err != nil {
		return keypolicy.Policy{}, fmt.Errorf("read the policy: %w", err)
	}
	p, err := keypolicy.ParseOutput(raw)
	if err != nil {
		return keypolicy.Policy{}, cli.Errorf(refusal.PolicyUnread, "%s: %w", name, err)
	}
	return p, nil
}

var errAccount = errors.New("the policy does not name exactly one account: give --account")

// onlyAccount returns the account that the policies' principals are of.
func onlyAccount(policies ...keypolicy.Policy) (string, error) {
	var found []string
	add := func(arns []string) {
		for _, arn := range arns {
			account := arn
			if parts := strings.Split(arn, ":"); len(parts) > 4 {
				account = parts[4]
			}
			if !slices.Contains(found, account) {
				found = append(found, account)
			}
		}
	}
	for _, p := range policies {
		for _, s := range p.Statements() {
			add(s.Principal.AWS)
		}
	}
	if len(found) != 1 {
		return "", cli.Usagef("%w", errAccount)
	}
	return found[0], nil
}

func policyPrintCmd() *cobra.Command {
	var o policyOptions
	var out string
	c := &cobra.Command{
		Use:   "print",
		Short: "Print the key policy for an image and a config",
		Long: `Print the policy of the KMS key that wraps a keyring's data key. It gives the key
to nobody but an enclave of an admitted pair: an image (PCR0) that runs with a config
(PCR16), asked for with the credentials of --parent-role. Administrators administer
and never use. What must not be is denied besides, so that a statement which somebody
adds by mistake opens nothing.

Two pairs are admitted while rolling from one to the next. GenerateDataKey is open
with --creating alone. --mode sealed makes a policy that nobody can ever change:
no new image, no new config, no way back; KMS then wants BypassPolicyLockoutSafetyCheck.

What is printed has been proved (keyhold policy prove). The same flags print the same
bytes.`,
		Example: `  # Before there is an image: release to nobody
  keyhold policy print --nobody --parent-role arn:aws:iam::111122223333:role/keyhold-parent \
    --admin-role arn:aws:iam::111122223333:role/key-admin

  # One image with its config, while its keyring is created
  keyhold policy print --measurements dist/amd64/measurements.json --config config.json --creating \
    --parent-role arn:aws:iam::111122223333:role/keyhold-parent --admin-role arn:aws:iam::111122223333:role/key-admin

  # Rolling: the current pair and the next one
  keyhold policy print --pair 3f9c...07=old.json --pair 81aa...5e=config.json \
    --parent-role arn:aws:iam::111122223333:role/keyhold-parent --admin-role arn:aws:iam::111122223333:role/key-admin`,
		Args: cobra.NoArgs,
	}
	o.addFlags(c, string(keypolicy.Managed))
	c.Flags().StringVarP(&out, "output", "o", "", "write a `file` instead of stdout")
	c.RunE = func(c *cobra.Command, _ []string) error {
		pairs, account, err := o.readPairs()
		if err != nil {
			return err
		}
		s := keypolicy.Spec{
			Account: o.accountOf(account), Pairs: pairs, Parent: o.parent, Admins: o.admins,
			Creating: o.creating, Mode: keypolicy.Mode(o.mode),
		}
		if s.PCR8, s.PCR3, err = o.registers(); err != nil {
			return err
		}
		p, err := keypolicy.Build(s)
		if err != nil {
			return cli.Usagef("%w", err)
		}
		return cli.WriteOutput(out, c.OutOrStdout(), func(w io.Writer) error {
			_, err := w.Write(p.JSON())
			return err
		})
	}
	return c
}
