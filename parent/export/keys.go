package export

import (
	"context"
	"fmt"
	"sync"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
)

// keyCache keeps the public parts of keys that were looked up. It forgets all of
// them when it is full.
type keyCache struct {
	s  Store
	mu sync.Mutex
	m  map[record.KeyID]*sealed.Public
}

func newKeyCache(s Store) *keyCache {
	return &keyCache{s: s, m: map[record.KeyID]*sealed.Public{}}
}

func (c *keyCache) get(ctx context.Context, id record.KeyID) (*sealed.Public, error) {
	c.mu.Lock()
	p := c.m[id]
	c.mu.Unlock()
	if p != nil {
		return p, nil
	}
	k, err := c.s.Key(ctx, id)
	if err != nil {
		return nil, err
	}
	e, err := sealed.DecodeEntry(k.Sealed)
	if err != nil {
		return nil, fmt.Errorf("key %s: %w", id, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.m) >= keptKeys {
		clear(c.m)
	}
	c.m[id] = &e.Public
	return &e.Public, nil
}
