// Package dials starts a process and opens a connection, so that a test can see that capslock sees both.
package dials

import (
	"context"
	"net"
	"os/exec"
)

// Both does both.
func Both(ctx context.Context) error {
	if err := exec.CommandContext(ctx, "true").Run(); err != nil {
		return err
	}
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", "127.0.0.1:1")
	if err != nil {
		return err
	}
	return conn.Close()
}
