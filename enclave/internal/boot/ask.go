package boot

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

// errAlready answers what was done before, and is no refusal.
var errAlready = errors.New("boot: already done")

// ask is a request to Run: a config, a header, or nothing but its type.
type ask struct {
	typ  wire.Type
	body []byte
	done chan error // buffered, so Run never waits for who has gone away
}

func (q *ask) answer(err error) { q.done <- err }

// ask hands a request to Run and waits for its answer. already says that it had
// been done before.
func (b *Boot) ask(ctx context.Context, t wire.Type, body []byte) (already bool, err error) {
	q := &ask{typ: t, body: body, done: make(chan error, 1)}
	select {
	case b.asks <- q:
	case <-ctx.Done():
		return false, fmt.Errorf("%s: %w", t, ctx.Err())
	}
	select {
	case err = <-q.done:
	case <-ctx.Done():
		return false, fmt.Errorf("%s: %w", t, ctx.Err())
	}
	if errors.Is(err, errAlready) {
		return true, nil
	}
	return false, err
}

func (b *Boot) next(ctx context.Context) (*ask, error) {
	select {
	case q := <-b.asks:
		return q, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// nextOf waits for a request of that type and tells all others that there is no
// config.
func (b *Boot) nextOf(ctx context.Context, t wire.Type) (*ask, error) {
	for {
		q, err := b.next(ctx)
		if err != nil || q.typ == t {
			return q, err
		}
		q.answer(refusal.NotConfigured)
	}
}

// refuseAll answers everything with code until ctx ends. Only a restart helps.
func (b *Boot) refuseAll(ctx context.Context, code refusal.Code) error {
	for {
		q, err := b.next(ctx)
		if err != nil {
			return ended(ctx, err)
		}
		q.answer(code)
	}
}

// ended makes the wanted end of Run no error.
func ended(ctx context.Context, err error) error {
	if errors.Is(err, ctx.Err()) {
		return nil
	}
	return err
}

func (b *Boot) configured(raw []byte) {
	hash, pcr := config.Hash(raw), config.PCR16(raw)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.progress.State = wire.StateConfigured
	b.progress.ConfigHash, b.progress.PCR16 = hash[:], pcr[:]
}

func (b *Boot) proved() {
	at := b.clock.Mono()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.progress.Proofs++
	b.progress.Proved = at
}

func (b *Boot) ready() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.progress.State = wire.StateReady
}

// sameConfig compares hashes, so the config itself need not be kept.
func (b *Boot) sameConfig(raw []byte) error {
	hash := config.Hash(raw)
	if bytes.Equal(hash[:], b.Progress().ConfigHash) { //nolint:forbidigo // a config is public
		return errAlready
	}
	return refusal.ConfigConflict
}

func (b *Boot) sameHeader(raw []byte) error {
	if bytes.Equal(raw, b.Progress().Header) { //nolint:forbidigo // a header is public
		return errAlready
	}
	return refusal.KeyringConflict
}

// Configure hands over the config. The first bytes count.
func (b *Boot) Configure(ctx context.Context, m *wire.Configure) (*wire.ConfigureReply, error) {
	if len(m.Config) > config.MaxLen {
		return nil, refusal.TooLarge
	}
	already, err := b.ask(ctx, wire.TypeConfigure, m.Config)
	if err != nil {
		return nil, err
	}
	return &wire.ConfigureReply{Already: already, PCR16: b.Progress().PCR16}, nil
}

// CreateKeyring makes a keyring. Asked again in the same boot it answers the
// same one, so a lost answer loses no keyring.
func (b *Boot) CreateKeyring(ctx context.Context) (*wire.CreateKeyringReply, error) {
	if _, err := b.ask(ctx, wire.TypeCreateKeyring, nil); err != nil {
		return nil, err
	}
	p := b.Progress()
	return &wire.CreateKeyringReply{Header: p.Header, Document: p.Document, Statement: p.Statement}, nil
}

// Load opens the keyring of m, or finds it open, and then its keys.
func (b *Boot) Load(ctx context.Context, m *wire.Load) (*wire.LoadReply, error) {
	if len(m.Keys) > wire.MaxLoadKeys {
		return nil, refusal.TooLarge
	}
	already := true
	if p := b.Progress(); p.State == wire.StateReady { // without waiting for others
		if err := b.sameHeader(m.Header); !errors.Is(err, errAlready) {
			return nil, err
		}
	} else {
		var err error
		if already, err = b.ask(ctx, wire.TypeLoad, m.Header); err != nil {
			return nil, err
		}
	}
	refused, err := b.engine.Load(ctx, m.Keys)
	if err != nil {
		return nil, err
	}
	p := b.Progress()
	loaded := uint64(len(m.Keys) - len(refused)) //nolint:gosec // refused are some of m.Keys
	return &wire.LoadReply{
		Already: already, Loaded: loaded, Total: b.engine.Keys(), Refused: refused,
		Document: p.Document, Statement: p.Statement,
	}, nil
}
