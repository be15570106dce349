package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/parent/audit"
	"github.com/keyhold/keyhold/parent/store"
)

func recordsVerifyCmd() *cobra.Command {
	var at cli.StoreOptions
	var asJSON bool
	c := &cobra.Command{
		Use:   "verify",
		Short: "Verify every signature",
		Long: `Verify every stored signature against its payload and its key's public key. It
trusts the public keys in the tables; keyhold receipt verify trusts nothing but
the root of attestation, and proves which enclave made each signature.

The exit code is 1 where anything does not verify, and each finding is named.`,
		Example: `  keyhold records verify
  keyhold records verify --import payouts-2026-11-20 --json`,
		Args: cobra.NoArgs,
	}
	at.AddFlags(c)
	ids := importsFlag(c)
	c.Flags().BoolVar(&asJSON, "json", false, "print the report as JSON")
	c.RunE = func(c *cobra.Command, _ []string) error {
		return runAudit(c, at, *ids, audit.Options{}, asJSON)
	}
	return c
}

func receiptCmd() *cobra.Command {
	return noun("receipt", "Verify what enclaves signed about their own work", receiptVerifyCmd())
}

func receiptVerifyCmd() *cobra.Command {
	var at cli.StoreOptions
	var want cli.AttestOptions
	var asJSON bool
	c := &cobra.Command{
		Use:   "verify",
		Short: "Verify every receipt up to the AWS root, and every signature",
		Long: `Walk from each signature over its receipt and the enclave's boot statement to the
attestation document and Amazon's root: which image, with which config, signed it
with which key, when and as what. Every boot must be a wanted one (--pcr0 or
--measurements, and --config). Gaps inside a lane of receipts, and two receipts for
one batch that differ, are reported.

It proves what is shown, never that nothing was hidden: the newest receipts of a
lane can be withheld. The exit code is 1 where anything does not verify.`,
		Example: `  keyhold receipt verify --pcr0 3f9c...07 --config config.json

  # While two images run side by side
  keyhold receipt verify --pcr0 3f9c...07 --pcr0 81aa...5e --config config.json

  # Over a change of the config: each image with its own
  keyhold receipt verify --pair 3f9c...07=old.json --pair 81aa...5e=config.json

  # With what nitro-cli build-enclave printed, one import only
  keyhold receipt verify --measurements eif.json --config config.json --import payouts-2026-11-20`,
		Args: cobra.NoArgs,
	}
	at.AddFlags(c)
	want.AddFlags(c)
	want.AddPairFlag(c)
	ids := importsFlag(c)
	c.Flags().BoolVar(&asJSON, "json", false, "print the report as JSON")
	c.RunE = func(c *cobra.Command, _ []string) error {
		o := audit.Options{Receipts: true}
		var err error
		if o.Images, o.Configs, err = want.Pairs(); err != nil {
			return err
		}
		if o.Root, err = want.Root(c.ErrOrStderr()); err != nil {
			return err
		}
		return runAudit(c, at, *ids, o, asJSON)
	}
	return c
}

func runAudit(c *cobra.Command, at cli.StoreOptions, ids []string, o audit.Options, asJSON bool) (err error) {
	if o.Imports, err = importIDs(ids); err != nil {
		return err
	}
	s, err := cli.OpenStore(c.Context(), at)
	if err != nil {
		return err
	}
	imports, err := selected(c.Context(), s, ids)
	if err != nil {
		return err
	}
	p := cli.NewProgress(c.ErrOrStderr(), "verifying", recordsOf(imports))
	o.Progress = p.Set
	r, found := audit.Run(c.Context(), s, o)
	p.Finish()
	if found != nil && r.Problems == 0 { // it could not be carried out
		return found
	}
	if asJSON {
		err = cli.PrintJSON(c.OutOrStdout(), r)
	} else {
		err = printReport(c.OutOrStdout(), r, o.Receipts, imports)
	}
	if err != nil {
		return err
	}
	return found
}

func printReport(w io.Writer, r audit.Report, receipts bool, imports []store.Import) error {
	text := fmt.Sprintf("imports     %d\nbatches     %d\nrecords     %d: %d signed, %d refused, %d open\nverified    %d signatures\n",
		len(imports), r.Batches, r.Records, r.Signed, r.Refused, r.Open, r.Verified)
	if receipts {
		text += fmt.Sprintf("proved      %d signatures, by %d receipts in %d lanes of %d boots\n", r.Proved, r.Receipts, r.Lanes, r.Boots)
	}
	text += fmt.Sprintf("problems    %d\n", r.Problems)
	for _, f := range r.Findings {
		text += "  " + f + "\n"
	}
	if more := r.Problems - len(r.Findings); more > 0 {
		text += fmt.Sprintf("  and %d more\n", more)
	}
	_, err := io.WriteString(w, text)
	return err
}
