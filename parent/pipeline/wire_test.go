package pipeline_test

import (
	"context"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/signclient"
)

// link is the way from one parent to one enclave: answers take time, and it can
// be cut while the enclave goes on.
type link struct {
	enclave *enclavetest.Server
	slow    func() time.Duration

	mu    sync.Mutex
	conns []net.Conn
}

func newLink(e *enclavetest.Server, seed uint64, longest time.Duration) *link {
	r := rand.New(rand.NewPCG(seed, 5))
	var mu sync.Mutex
	return &link{enclave: e, slow: func() time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return time.Duration(1 + r.Int64N(int64(longest)))
	}}
}

func (l *link) dial(ctx context.Context) (net.Conn, error) {
	conn, err := l.enclave.Dial(ctx)
	if err != nil {
		return nil, err
	}
	slow := &slowConn{Conn: conn, link: l, boot: l.enclave.BootID(), closed: make(chan struct{})}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns = append(l.conns, slow)
	return slow, nil
}

func (l *link) connect(ctx context.Context) (*signclient.Client, error) {
	return signclient.Connect(ctx, l.dial, signclient.Options{})
}

// cut ends every connection. The enclave keeps its boot.
func (l *link) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.conns {
		c.Close()
	}
	l.conns = nil
}

// slowConn delivers what it reads a while later, or never once it is closed.
type slowConn struct {
	net.Conn
	link   *link
	boot   record.BootID
	once   sync.Once
	closed chan struct{}
}

func (c *slowConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

func (c *slowConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		return n, err
	}
	t := time.NewTimer(c.link.slow())
	defer t.Stop()
	select {
	case <-t.C:
		if c.link.enclave.BootID() != c.boot {
			return 0, net.ErrClosed // what was on its way is gone with the enclave
		}
		return n, nil
	case <-c.closed:
		return 0, net.ErrClosed
	}
}
