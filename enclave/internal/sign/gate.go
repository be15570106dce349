package sign

import (
	"context"
	"sync"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
)

// use is what a key fence was used for: the hash of batch, batch fence and payload
// root, which covers the kind. The same use is answered again, another is refused.
type use [32]byte

// gates lets one batch at a time use a key, and only under its newest fence. It
// keeps one gate for each key that was ever signed with or fenced.
type gates struct {
	mu   sync.Mutex
	keys map[record.KeyID]*gate
}

// gate is what is remembered of a key. A million of them take about 100 MB.
type gate struct {
	revoked record.Fence  // nothing under this fence or an older one is released; never below fence - 1
	fence   record.Fence  // the newest that signed
	used    use           // what it signed
	turn    chan struct{} // holds one token while the key is in use; nil while nobody wants it
	users   int           // who has the turn or waits for it
}

// admit says whether fence may sign for u.
func (k *gate) admit(fence record.Fence, u use) error {
	if fence <= k.revoked {
		return refusal.FenceStale
	}
	if fence == k.fence && u != k.used {
		return refusal.FenceConflict
	}
	return nil
}

func (g *gates) of(id record.KeyID) *gate {
	k := g.keys[id]
	if k == nil {
		k = &gate{}
		g.keys[id] = k
	}
	return k
}

// revoke ends everything under fence and older ones.
func (g *gates) revoke(id record.KeyID, fence record.Fence) {
	g.mu.Lock()
	defer g.mu.Unlock()
	k := g.of(id)
	k.revoked = max(k.revoked, fence)
}

// enter waits until the key is free, for patience at most, and takes it. A
// newer fence than the one at work revokes that one at once: its holder has
// lost the claim. The caller calls leave exactly once where err is nil.
func (g *gates) enter(ctx context.Context, id record.KeyID, fence record.Fence, u use, patience time.Duration) (leave func(), err error) {
	turn, err := g.queue(id, fence, u)
	if err != nil {
		return nil, err
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case turn <- struct{}{}:
	case <-timer.C:
		g.unqueue(id)
		return nil, refusal.Deadline
	case <-ctx.Done():
		g.unqueue(id)
		return nil, context.Cause(ctx)
	}
	leave = func() {
		<-turn
		g.unqueue(id)
	}
	if err := g.begin(id, fence, u); err != nil {
		leave()
		return nil, err
	}
	return leave, nil
}

func (g *gates) queue(id record.KeyID, fence record.Fence, u use) (chan struct{}, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	k := g.of(id)
	if err := k.admit(fence, u); err != nil {
		return nil, err
	}
	k.revoked = max(k.revoked, fence-1)
	if k.turn == nil {
		k.turn = make(chan struct{}, 1)
	}
	k.users++
	return k.turn, nil
}

func (g *gates) unqueue(id record.KeyID) {
	g.mu.Lock()
	defer g.mu.Unlock()
	k := g.of(id)
	if k.users--; k.users == 0 {
		k.turn = nil
	}
}

// begin records what fence is used for. What was admitted before the wait may
// have been overtaken in it.
func (g *gates) begin(id record.KeyID, fence record.Fence, u use) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	k := g.of(id)
	if err := k.admit(fence, u); err != nil {
		return err
	}
	k.fence, k.used = fence, u
	return nil
}

// check says whether fence may still be released.
func (g *gates) check(id record.KeyID, fence record.Fence) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if fence <= g.of(id).revoked {
		return refusal.FenceStale
	}
	return nil
}
