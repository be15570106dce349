// Command keyhold is the operator's tool: it makes tables, keyrings and keys,
// imports records, and exports and verifies what was signed. It sees no private
// key, and nothing it does can make an enclave sign what its policy forbids.
package main

import (
	"os"

	"github.com/keyhold/keyhold/cmd/internal/cli"
)

func main() { os.Exit(cli.Main(newRoot())) }
