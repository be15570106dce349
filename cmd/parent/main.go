// Command keyhold-parent runs on the EC2 host beside its enclaves: it feeds them
// from DynamoDB and carries their bytes to KMS. It refuses to give work to an
// enclave that does not attest to the wanted image and config.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	code := execute(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
