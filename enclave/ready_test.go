package enclave_test

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"testing"

	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/enclave"
	"github.com/keyhold/keyhold/internal/refusal"
)

func TestAnEnclaveIsReadyBeforeItServesAndNotWithoutEntropy(t *testing.T) {
	errReady := errors.New("nobody wants to know")
	for _, tc := range []struct {
		name    string
		entropy error
		ready   error
		want    error
		called  bool
	}{
		{"weak entropy", errors.New("weak"), nil, refusal.EntropyWeak, false},
		{"the news is refused", nil, errReady, errReady, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ca, err := nsmtest.NewCA(nil)
			if err != nil {
				t.Fatal(err)
			}
			device, err := nsmtest.New(ca, nsmtest.Options{PCRs: nsmtest.Measurements(image)})
			if err != nil {
				t.Fatal(err)
			}
			l, err := new(net.ListenConfig).Listen(t.Context(), "unix", filepath.Join(t.TempDir(), "e"))
			if err != nil {
				t.Fatal(err)
			}
			none := func(context.Context) (net.Conn, error) { return nil, errors.New("none") }
			called := false
			err = enclave.Run(t.Context(), enclave.Config{
				Listener: l, NSM: device, KMSRoots: x509.NewCertPool(), DialKMS: none, DialCredentials: none, Logger: slog.New(slog.DiscardHandler),
				Entropy: func() error { return tc.entropy },
				Ready: func(context.Context) error {
					called = true
					return tc.ready
				},
			})
			if !errors.Is(err, tc.want) || called != tc.called {
				t.Errorf("got %v, called %t", err, called)
			}
			if conn, err := new(net.Dialer).DialContext(t.Context(), "unix", l.Addr().String()); err == nil {
				conn.Close()
				t.Error("the listener is still open")
			}
		})
	}
}
