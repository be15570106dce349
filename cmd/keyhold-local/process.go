package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/enclave"
	"github.com/keyhold/keyhold/parent"
	"github.com/keyhold/keyhold/parent/egress"
)

// image is what the software NSM measures: the name of this program instead of
// a real image, in place of PCR0 to 2.
const image = "keyhold-local"

// Credentials of the emulated instance role. They open nothing anywhere else.
const (
	accessKeyID     = "LOCALKEYHOLDPARENT"
	secretAccessKey = "local-mode-has-no-secrets" //nolint:gosec // it opens the emulator alone
)

func socketPath(kind string, n int) string {
	return filepath.Join(sockets, fmt.Sprintf("%s-%d.sock", kind, n))
}

// processFlags are how the supervisor tells a child what it is.
type processFlags struct {
	index    int
	parents  int
	enclaves int
	workers  int
	endpoint string // of DynamoDB
	kms      string // host:port
}

// processCommand is the hidden command that the supervisor's children run.
func processCommand() *cobra.Command {
	var f processFlags
	cmd := &cobra.Command{Use: "process", Hidden: true, Short: "Run as a child of the supervisor"}
	cmd.PersistentFlags().IntVar(&f.index, "index", 0, "number of this process among its like")
	cmd.PersistentFlags().IntVar(&f.parents, "parents", 1, "number of parents")
	cmd.PersistentFlags().IntVar(&f.enclaves, "enclaves", 1, "number of enclaves")
	cmd.PersistentFlags().IntVar(&f.workers, "workers", 0, "connections per enclave")
	cmd.PersistentFlags().StringVar(&f.endpoint, "endpoint", "", "DynamoDB endpoint")
	cmd.PersistentFlags().StringVar(&f.kms, "kms", "", "KMS address")
	cmd.AddCommand(
		&cobra.Command{Use: "enclave", Short: "Run as an enclave with a software NSM", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
			return runEnclave(cmd.Context(), f)
		}},
		&cobra.Command{Use: "parent", Short: "Run as a parent", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
			return runParent(cmd.Context(), f)
		}},
	)
	return cmd
}

// runEnclave differs from cmd/enclave in the values it passes to enclave.Run.
func runEnclave(ctx context.Context, f processFlags) error {
	ca, err := nsmCA()
	if err != nil {
		return err
	}
	session, err := nsmtest.New(ca, nsmtest.Options{PCRs: nsmtest.Measurements(image)})
	if err != nil {
		return fmt.Errorf("start the software NSM: %w", err)
	}
	roots := x509.NewCertPool()
	raw, err := os.ReadFile(kmsRootFile)
	if err != nil {
		return fmt.Errorf("read the local KMS root: %w", err)
	}
	if !roots.AppendCertsFromPEM(raw) {
		return fmt.Errorf("read the local KMS root: %s holds no certificate", kmsRootFile)
	}
	l, err := listenUnix(ctx, socketPath("enclave", f.index))
	if err != nil {
		return err
	}
	return enclave.Run(ctx, enclave.Config{
		Listener: l, NSM: session, KMSRoots: roots,
		DialKMS:         dialAny("kms", f),
		DialCredentials: dialAny("credentials", f),
		Entropy:         kernelSeeded,
		Logger:          logTo(os.Stderr),
	})
}

// kernelSeeded stands in for the check that the NSM feeds the kernel's
// generator: a laptop has no NSM, but its kernel must have gathered enough.
func kernelSeeded() error {
	if _, err := unix.Getrandom(make([]byte, 1), unix.GRND_NONBLOCK); err != nil {
		return fmt.Errorf("the kernel's random generator is not ready: %w", err)
	}
	return nil
}

// dialAny reaches the port that every parent has for its enclaves, whichever
// parent is up. On EC2 there is one address, context id 3.
func dialAny(kind string, f processFlags) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		var errs []error
		for i := range f.parents {
			conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socketPath(kind, (f.index+i)%f.parents))
			if err == nil {
				return conn, nil
			}
			errs = append(errs, err)
		}
		return nil, fmt.Errorf("reach a parent: %w", errors.Join(errs...))
	}
}

func runParent(ctx context.Context, f processFlags) error {
	log := logTo(os.Stderr)
	raw, err := os.ReadFile(configFile)
	if err != nil {
		return fmt.Errorf("read the enclave config: %w", err)
	}
	root, images, err := wanted()
	if err != nil {
		return err
	}
	c := parent.Config{
		Store: openStore(f.endpoint, nil), EnclaveConfig: raw, Root: root, Images: images,
		Credentials: egress.Static(accessKeyID, secretAccessKey, ""),
		DialKMS: func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", f.kms)
		},
		Workers: f.workers, Logger: log,
	}
	for i := range f.enclaves {
		path := socketPath("enclave", i)
		c.Enclaves = append(c.Enclaves, parent.Enclave{
			Name: fmt.Sprintf("enclave-%d", i),
			Dial: func(ctx context.Context) (net.Conn, error) { return (&net.Dialer{}).DialContext(ctx, "unix", path) },
		})
	}
	for kind, to := range map[string]*[]net.Listener{"kms": &c.KMSListeners, "credentials": &c.CredentialListeners} {
		l, err := listenUnix(ctx, socketPath(kind, f.index))
		if err != nil {
			return err
		}
		*to = append(*to, l)
	}
	if c.HTTP, err = (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0"); err != nil {
		return fmt.Errorf("listen for metrics: %w", err)
	}
	if err := writeFile(filepath.Join(sockets, fmt.Sprintf("parent-%d.http", f.index)), []byte(c.HTTP.Addr().String()+"\n")); err != nil {
		return err
	}
	return parent.Run(ctx, c)
}

// wanted is what an enclave of local mode must attest to; parent.Run adds PCR16.
func wanted() (attestation.Root, []attestation.Image, error) {
	ca, err := nsmCA()
	if err != nil {
		return attestation.Root{}, nil, err
	}
	return attestation.TestRoot(ca.Root()), []attestation.Image{{PCRs: nsmtest.Measurements(image)}}, nil
}

// listenUnix listens on a socket whose earlier owner is gone.
func listenUnix(ctx context.Context, path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return l, nil
}

func pemCertificate(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// hostOf cuts the scheme off an endpoint.
func hostOf(endpoint string) string {
	return strings.TrimPrefix(strings.TrimPrefix(endpoint, "http://"), "https://")
}
