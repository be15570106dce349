package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/parent/export"
)

func recordsExportCmd() *cobra.Command {
	var at cli.StoreOptions
	var out string
	c := &cobra.Command{
		Use:   "export",
		Short: "Write every record with its signature, as JSON Lines",
		Long: `Write one JSON object per record: record_id, kind, payload (base64), algorithm,
key_id, public_key, address, digest, signature (hex), batch_id, index, state and
refusal; what does not apply is null. Records that are not signed yet are there
too, with their state. A file appears only once it is whole.`,
		Example: `  keyhold records export -o signed.jsonl

  # One import, signatures only
  keyhold records export --import payouts-2026-11-20 | jq -r 'select(.signature) | .signature'

  # Why records were refused
  keyhold records export | jq -r 'select(.state=="REFUSED") | [.record_id, .refusal] | @tsv'`,
		Args: cobra.NoArgs,
	}
	at.AddFlags(c)
	ids := importsFlag(c)
	c.Flags().StringVarP(&out, "output", "o", "-", "`file` to write, - for stdout")
	c.RunE = func(c *cobra.Command, _ []string) error {
		s, err := cli.OpenStore(c.Context(), at)
		if err != nil {
			return err
		}
		imports, err := selected(c.Context(), s, *ids)
		if err != nil {
			return err
		}
		var n export.Counts
		err = writeLines(c, out, "exporting", recordsOf(imports), func(w io.Writer) error {
			n, err = export.Records(c.Context(), s, imports, w)
			return err
		})
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(c.ErrOrStderr(), "exported %d records: %d signed, %d refused, %d neither yet\n", n.Records, n.Signed, n.Refused, n.Other)
		return err
	}
	return c
}
