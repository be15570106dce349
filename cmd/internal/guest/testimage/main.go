// Command testimage is the program of an image under test: keyhold-enclave but for the roots of KMS, which it
// reads from its own ramdisk, so that they are measured with it. It refuses to run without them.
package main

import (
	"os"

	"github.com/keyhold/keyhold/cmd/internal/guest"
)

func main() {
	roots, _ := os.ReadFile("/kms-root.pem") // guest.Main refuses what is no certificate, and says so
	guest.Main(roots)
}
