package enclave

import (
	"context"
	"net"

	"github.com/keyhold/keyhold/attestation/nsm"
)

// TestingOnlyCheckEntropy is the check of production with its two ends given.
func TestingOnlyCheckEntropy(session nsm.Session, current string, credit func([]byte) error) error {
	return checkEntropy(session, current, credit)
}

// TestingOnlyCreditKernel credits b to the kernel of this machine.
func TestingOnlyCreditKernel(b []byte) error { return creditKernel(b) }

// TestingOnlyCredentials asks a parent for credentials and returns the access
// key id.
func TestingOnlyCredentials(ctx context.Context, dial func(context.Context) (net.Conn, error)) (string, error) {
	c, err := credentialsFrom(dial)(ctx)
	return c.AccessKeyID, err
}
