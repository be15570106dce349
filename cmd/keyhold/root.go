package main

import (
	"github.com/spf13/cobra"
)

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "keyhold",
		Short: "Sign records with keys that nobody can read",
		Long: `keyhold is the operator's tool of Keyhold, a signing appliance for AWS Nitro
Enclaves. It makes the tables and keyrings, imports the records that shall be
signed, and exports and verifies what was signed.

The tables are those of --table-prefix in DynamoDB. An enclave is reached with
--enclave; what it must prove to be is said with --pcr0 or --measurements, and
--config. keyhold-local up prints the environment that points keyhold at a
Keyhold on this machine.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 some records were refused.`,
		Example: `  # From nothing to signatures
  keyhold tables create
  keyhold keyring create --algorithm secp256k1 --policy payouts --pool default --keys 100
  keyhold records generate --records 1000 -o records.jsonl
  keyhold records import records.jsonl --pool default
  keyhold records status --watch
  keyhold records export -o signed.jsonl
  keyhold receipt verify`,
		Args: cobra.NoArgs,
	}
	root.AddCommand(
		tablesCmd(), configCmd(), keyringCmd(), keysCmd(), recordsCmd(), importCmd(), batchesCmd(),
		attestCmd(), receiptCmd(), imageCmd(), policyCmd(), versionCmd(),
	)
	return root
}

// noun groups the commands of one thing.
func noun(use, short string, verbs ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short}
	c.AddCommand(verbs...)
	return c
}
