// Command keyhold-local runs all of Keyhold on one machine: dynoxide as
// DynamoDB, an emulated KMS, and enclaves and parents as processes of their own,
// with a software NSM. It is for development and refuses nothing that an
// enclave would; its keys are worth nothing outside of its folder.
package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
)

func main() { os.Exit(cli.Main(command())) }

func command() *cobra.Command {
	root := &cobra.Command{
		Use:   "keyhold-local",
		Short: "Run all of Keyhold on one machine, for development",
		Long: `keyhold-local runs all of Keyhold on one machine: a local DynamoDB (dynoxide), an
emulated KMS that verifies attestation, and enclaves and parents as processes of
their own. The enclaves have a software NSM in place of Nitro hardware. Nothing
here protects keys: it is for development, tests and demonstrations.`,
		Example: `  keyhold-local run --dir /tmp/demo --records 100000 --keys 100
  keyhold-local up --dir /tmp/dev`,
	}
	root.AddCommand(runCommand(), upCommand(), processCommand())
	return root
}
