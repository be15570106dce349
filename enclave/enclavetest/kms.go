package enclavetest

import (
	"context"
	"crypto/rand"
	"fmt"
	"maps"
	"sync"

	"github.com/keyhold/keyhold/enclave/internal/kms"
	"github.com/keyhold/keyhold/enclave/internal/secret"
)

// KMS is one KMS key in memory. Its data keys are opened under the context that
// they were made with and no other. The zero value is ready.
type KMS struct {
	// Fail, where set, is called with each operation, GenerateDataKey or
	// Decrypt; its error is returned.
	Fail func(op string) error

	mu   sync.Mutex
	keys map[string]dataKey // by wrapped form
}

type dataKey struct {
	plain   []byte
	context map[string]string
}

const (
	wrappedLen = 64 // bytes; a random name, where AWS has a ciphertext
	dataKeyLen = 32
)

// GenerateDataKey implements boot.KMS.
func (k *KMS) GenerateDataKey(_ context.Context, encCtx map[string]string) ([]byte, *secret.Bytes, error) {
	if err := k.fail("GenerateDataKey"); err != nil {
		return nil, nil, err
	}
	wrapped, plain := make([]byte, wrappedLen), make([]byte, dataKeyLen)
	for _, b := range [][]byte{wrapped, plain} {
		if _, err := rand.Read(b); err != nil {
			return nil, nil, fmt.Errorf("make data key: %w", err)
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.keys == nil {
		k.keys = make(map[string]dataKey)
	}
	k.keys[string(wrapped)] = dataKey{plain: plain, context: maps.Clone(encCtx)}
	return wrapped, secret.New(append([]byte(nil), plain...)), nil
}

// Decrypt implements boot.KMS.
func (k *KMS) Decrypt(_ context.Context, wrapped []byte, encCtx map[string]string) (*secret.Bytes, error) {
	if err := k.fail("Decrypt"); err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	d, ok := k.keys[string(wrapped)]
	if !ok || !maps.Equal(d.context, encCtx) {
		return nil, kms.ErrWrappedKey
	}
	return secret.New(append([]byte(nil), d.plain...)), nil
}

func (k *KMS) fail(op string) error {
	if k.Fail == nil {
		return nil
	}
	return k.Fail(op)
}
