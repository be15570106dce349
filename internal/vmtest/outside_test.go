package vmtest_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/enclave"
)

// childEnv makes this program an enclave outside of any machine, whose files and
// sockets are in the folder that it names.
const childEnv = "KEYHOLD_VM_OUTSIDE"

const outsideImage = "the enclave outside of a machine"

func TestMain(m *testing.M) {
	folder := os.Getenv(childEnv)
	if folder == "" {
		goleak.VerifyTestMain(m)
		return
	}
	if err := runOutside(context.Background(), folder); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1) //nolint:forbidigo // this is a main
	}
}

// runOutside differs from the images' mains in the values that it passes to
// enclave.Run.
func runOutside(ctx context.Context, folder string) error {
	authority, err := os.ReadFile(filepath.Join(folder, "ca.pem"))
	if err != nil {
		return err
	}
	ca, err := nsmtest.ParseCA(authority, nil)
	if err != nil {
		return err
	}
	session, err := nsmtest.New(ca, nsmtest.Options{PCRs: nsmtest.Measurements(outsideImage)})
	if err != nil {
		return err
	}
	raw, err := os.ReadFile(filepath.Join(folder, "kms.pem"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(raw) {
		return errors.New("kms.pem holds no certificate")
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", filepath.Join(folder, "enclave"))
	if err != nil {
		return err
	}
	return enclave.Run(ctx, enclave.Config{
		Listener: l, NSM: session, KMSRoots: roots, DialKMS: dialUnix(folder, "kms"), DialCredentials: dialUnix(folder, "creds"),
		Entropy: func() error {
			_, err := unix.Getrandom(make([]byte, 1), unix.GRND_NONBLOCK)
			return err
		},
		Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
}

func dialUnix(folder, name string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(folder, name))
	}
}

// outside starts an enclave of the same code as a process of its own, on one
// processor as in a machine, and returns the ways to it.
func (s *site) outside() ways {
	s.t.Helper()
	folder, err := os.MkdirTemp("", "keyhold-vm-") // not t.TempDir: the names of sockets have 107 bytes at most
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = os.RemoveAll(folder) })
	authority, err := s.ca.MarshalPEM()
	if err != nil {
		s.t.Fatal(err)
	}
	for name, data := range map[string][]byte{"ca.pem": authority, "kms.pem": s.kms.CACertificate()} {
		if err := os.WriteFile(filepath.Join(folder, name), data, 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
	listen := func(name string) net.Listener {
		l, err := (&net.ListenConfig{}).Listen(s.t.Context(), "unix", filepath.Join(folder, name))
		if err != nil {
			s.t.Fatal(err)
		}
		return l
	}
	w := ways{dialUnix(folder, "enclave"), listen("kms"), listen("creds")}
	s.run("the enclave outside", func(ctx context.Context) error {
		runtime.LockOSThread() // Pdeathsig comes when the thread that started the child ends
		defer runtime.UnlockOSThread()
		cmd := exec.CommandContext(ctx, os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+folder, "GOMAXPROCS=1")
		cmd.Stderr = s.said
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Run(); ctx.Err() == nil {
			return err
		}
		return nil // it was told to end
	})
	return w
}
