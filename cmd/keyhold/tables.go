package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
)

func tablesCmd() *cobra.Command {
	return noun("tables", "Make the DynamoDB tables", tablesCreateCmd())
}

func tablesCreateCmd() *cobra.Command {
	var at cli.StoreOptions
	c := &cobra.Command{
		Use:   "create",
		Short: "Create the tables that are not there yet",
		Long: `Create the nine tables of Keyhold, billed per request, and wait until they can
be used. Tables that are there are left as they are, and one that has another
layout is an error, so running it again is safe.`,
		Example: `  # In the region of AWS_REGION, with names keyhold-imports, keyhold-batches ...
  keyhold tables create

  # A second deployment beside it
  keyhold tables create --table-prefix staging-

  # In a DynamoDB on this machine
  KEYHOLD_DYNAMODB_ENDPOINT=http://127.0.0.1:8000 keyhold tables create`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			at.Unmade = true
			s, err := cli.OpenStore(c.Context(), at)
			if err != nil {
				return err
			}
			if err := s.CreateTables(c.Context()); err != nil {
				return err
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "the tables %s* are ready\n", at.Prefix)
			return err
		},
	}
	at.AddFlags(c)
	return c
}
