package hostvsock

import (
	"fmt"
	"net"
	"sync"
)

const network = "vsock"

// Addr is one end of a connection.
type Addr struct{ CID, Port uint32 }

// Network implements net.Addr.
func (Addr) Network() string { return network }

// String implements net.Addr.
func (a Addr) String() string { return fmt.Sprintf("%d:%d", a.CID, a.Port) }

// listener implements net.Listener on a port of the parent instance.
type listener struct {
	device  *Device
	port    uint32
	waiting chan *Conn // filled with the device's lock held
	done    chan struct{}
	once    sync.Once
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case <-l.done: // before what waits
	default:
		select {
		case c := <-l.waiting:
			return c, nil
		case <-l.done:
		}
	}
	return nil, &net.OpError{Op: "accept", Net: network, Addr: l.Addr(), Err: net.ErrClosed}
}

// Close implements net.Listener. What was not accepted is reset.
func (l *listener) Close() error {
	err := error(&net.OpError{Op: "close", Net: network, Addr: l.Addr(), Err: net.ErrClosed})
	l.once.Do(func() {
		err = nil
		close(l.done)
		l.device.mu.Lock()
		defer l.device.mu.Unlock()
		delete(l.device.listeners, l.port)
		for {
			select {
			case c := <-l.waiting:
				c.reset()
				continue
			default:
			}
			break
		}
		l.device.pump()
	})
	return err
}

// Addr implements net.Listener.
func (l *listener) Addr() net.Addr { return Addr{ParentCID, l.port} }
