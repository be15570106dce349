// Command keyhold-enclave is the program inside the Nitro Enclave image. It has
// no flags and reads no environment: what it does with keys is in the config
// that the parent hands over and the NSM measures.
package main

import (
	"context"
	"crypto/x509"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/mdlayher/vsock"

	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/enclave"
	"github.com/keyhold/keyhold/internal/wire"
)

const anyCID = 0xffffffff // VMADDR_CID_ANY: whatever number this enclave got

// amazonRoots vouch for KMS (https://www.amazontrust.com/repository/). A test
// pins the fingerprint of each.
//
//go:embed amazon.pem
var amazonRoots []byte

func main() {
	log := slog.New(slog.NewJSONHandler(os.Stdout, nil)) // the console; nobody sees it in production
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := run(ctx, log); err != nil {
		log.ErrorContext(ctx, "enclave ended", slog.Any("error", err))
		os.Exit(1)
	}
}

func run(ctx context.Context, log *slog.Logger) (err error) {
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(amazonRoots) {
		return errors.New("the embedded roots are no certificates")
	}
	session, err := nsm.Open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, session.Close()) }()
	l, err := vsock.ListenContextID(anyCID, wire.EnclavePort, nil)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	return enclave.Run(ctx, enclave.Config{
		Listener: l, CheckPeer: fromParent, NSM: session, KMSRoots: roots,
		DialKMS: dialParent(wire.KMSPort), DialCredentials: dialParent(wire.CredsPort), Logger: log,
	})
}

// fromParent refuses every peer but the parent instance.
func fromParent(c net.Conn) error {
	if a, ok := c.RemoteAddr().(*vsock.Addr); !ok || a.ContextID != wire.ParentCID {
		return errors.New("the peer is not the parent instance")
	}
	return nil
}
