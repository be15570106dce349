package export

import (
	"context"
	"errors"
	"sync"

	"github.com/keyhold/keyhold/internal/payload"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/parent/store"
)

// errKey says that a stored key is not what its id names. The enclave would
// refuse to load it; here nothing of it may be shown either.
var errKey = errors.New("malformed, or the sealed key of another")

// PublicOf returns the public part of a stored key, once all that can be derived
// of it is: the key id from the public key, and so is the address, which no id
// covers.
func PublicOf(k *store.Key) (*sealed.Public, error) {
	e, err := sealed.DecodeEntry(k.Sealed)
	if err != nil {
		return nil, errKey
	}
	p, address := &e.Public, ""
	if p.Algorithm == record.Secp256k1 {
		address = payload.Address(p.PublicKey)
	}
	if p.KeyID != k.ID || p.Address != address || k.Keyring != sealed.KeyringID(p.Keyring, p.Epoch) {
		return nil, errKey
	}
	return p, nil
}

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
	if k.ID != id {
		return nil, errKey
	}
	if p, err = PublicOf(&k); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.m) >= keptKeys {
		clear(c.m)
	}
	c.m[id] = p
	return p, nil
}
