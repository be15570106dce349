// Command keyhold-enclave is the program inside the Nitro Enclave image. It has
// no flags and reads no environment: what it does with keys is in the config
// that the parent hands over and the NSM measures.
package main

import (
	_ "embed"

	"github.com/keyhold/keyhold/cmd/internal/guest"
)

// amazonRoots vouch for KMS (https://www.amazontrust.com/repository/). A test
// pins the fingerprint of each.
//
//go:embed amazon.pem
var amazonRoots []byte

func main() {
	guest.Main(amazonRoots)
}
