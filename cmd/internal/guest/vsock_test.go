package guest_test

import (
	"context"
	"net"
	"testing"

	"github.com/mdlayher/vsock"

	"github.com/keyhold/keyhold/cmd/internal/guest"
)

// peer is a connection from somewhere.
type peer struct {
	net.Conn
	addr net.Addr
}

func (p peer) RemoteAddr() net.Addr { return p.addr }

func TestOnlyTheParentIsServed(t *testing.T) {
	for _, tc := range []struct {
		name string
		addr net.Addr
		ok   bool
	}{
		{"the parent", &vsock.Addr{ContextID: 3, Port: 40000}, true},
		{"another enclave", &vsock.Addr{ContextID: 17, Port: 40000}, false},
		{"the hypervisor", &vsock.Addr{ContextID: 0, Port: 40000}, false},
		{"this machine itself", &vsock.Addr{ContextID: 1, Port: 40000}, false},
		{"no vsock at all", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := guest.TestingOnlyFromParent(peer{addr: tc.addr}); (err == nil) != tc.ok {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestDialGivesUpWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	conn, err := guest.TestingOnlyDialParent(ctx, 8443)
	if err == nil {
		conn.Close()
		t.Fatal("there is a parent here")
	}
	if conn != nil {
		t.Error("a connection came with an error")
	}
}
