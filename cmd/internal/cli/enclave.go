package cli

import (
	"context"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/mdlayher/vsock"
	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/parent/signclient"
)

// DefaultEnclavePort is where an enclave listens.
const DefaultEnclavePort = 5000

// EnclaveOptions say which enclave to talk to.
type EnclaveOptions struct {
	Address string // see ParseEnclave
}

// AddFlags lets c's command line fill o.
func (o *EnclaveOptions) AddFlags(c *cobra.Command) {
	c.Flags().StringVar(&o.Address, "enclave", os.Getenv(EnvEnclave),
		"the enclave's `address`: vsock:CID[:PORT] or unix:PATH (env "+EnvEnclave+")")
}

// Dialer leads to that enclave.
func (o *EnclaveOptions) Dialer() (signclient.Dialer, error) {
	if o.Address == "" {
		return nil, Usagef("no enclave: give --enclave vsock:CID or set %s", EnvEnclave)
	}
	return ParseEnclave(o.Address)
}

// ParseEnclave returns a dialer for "vsock:CID[:PORT]" (port 5000 where none is
// named) or "unix:PATH".
func ParseEnclave(address string) (signclient.Dialer, error) {
	kind, rest, _ := strings.Cut(address, ":")
	switch kind {
	case "unix":
		if rest == "" {
			break
		}
		return func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", rest)
		}, nil
	case "vsock":
		cidText, portText, hasPort := strings.Cut(rest, ":")
		cid, err := strconv.ParseUint(cidText, 10, 32)
		port := uint64(DefaultEnclavePort)
		if hasPort && err == nil {
			port, err = strconv.ParseUint(portText, 10, 32)
		}
		// CIDs below 4 are the hypervisor, this machine and the parent.
		if err != nil || cid < 4 || port == 0 {
			break
		}
		return DialVsock(uint32(cid), uint32(port)), nil
	}
	return nil, Usagef("%q is no enclave address: want vsock:CID[:PORT] with a CID from 4, or unix:PATH", address)
}

// DialVsock returns a dialer. vsock knows no contexts, so a connection that
// comes after the context's end is closed.
func DialVsock(cid, port uint32) signclient.Dialer {
	return func(ctx context.Context) (net.Conn, error) {
		type dialled struct {
			conn *vsock.Conn
			err  error
		}
		done := make(chan dialled, 1)
		go func() {
			conn, err := vsock.Dial(cid, port, nil)
			done <- dialled{conn, err}
		}()
		select {
		case d := <-done:
			if d.err != nil {
				return nil, d.err
			}
			return d.conn, nil
		case <-ctx.Done():
			go func() {
				if d := <-done; d.err == nil {
					_ = d.conn.Close() // nobody wants it any more
				}
			}()
			return nil, context.Cause(ctx)
		}
	}
}
