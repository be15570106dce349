package watch

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/signclient"
)

// pulseTimeout bounds one round trip: a third of DefaultPatience.
const pulseTimeout = 15 * time.Second

const nonceLen = 32 // bytes

// Pulse makes round trips to one enclave over one connection, which it opens anew
// where the last was lost. Each is a challenge: it goes through the vsock, the
// enclave's program and its security module. Pulse verifies no document; that is
// for the parent, which gives the enclave work.
type Pulse struct {
	Dial   signclient.Dialer
	Rand   io.Reader // of nonces; nil is crypto/rand
	Logger *slog.Logger

	mu     sync.Mutex
	client *signclient.Client // nil where there is no connection
}

// Probe makes one round trip. An enclave that has no connection to spare is busy,
// one that waits for its parent is not configured: both are alive.
func (p *Pulse) Probe(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	kept := p.client != nil
	err := p.probe(ctx)
	if kept && errors.Is(err, signclient.ErrLost) {
		p.drop() // it was lost since, or with this: a new one tells which
		err = p.probe(ctx)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, refusal.NotConfigured):
		return nil
	case errors.Is(err, refusal.Busy):
		p.drop()
		return nil
	}
	p.drop()
	return err
}

func (p *Pulse) probe(ctx context.Context) error {
	if p.client == nil {
		c, err := signclient.Connect(ctx, p.Dial, signclient.Options{Timeout: pulseTimeout, Logger: p.Logger})
		if err != nil {
			return err
		}
		p.client = c
	}
	source := p.Rand
	if source == nil {
		source = rand.Reader
	}
	nonce := make([]byte, nonceLen)
	if _, err := io.ReadFull(source, nonce); err != nil {
		return fmt.Errorf("make a nonce: %w", err)
	}
	reply, err := p.client.Attest(ctx, &wire.Attest{Nonce: nonce})
	if err != nil {
		return err
	}
	if len(reply.Document) == 0 {
		return fmt.Errorf("attest: %w: no document", refusal.NSMFailed)
	}
	return nil
}

// drop ends the connection.
func (p *Pulse) drop() {
	if p.client != nil {
		p.client.Close()
		p.client = nil
	}
}

// Close ends the connection.
func (p *Pulse) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.drop()
}
