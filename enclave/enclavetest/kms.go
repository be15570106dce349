package enclavetest

import (
	"context"
	"crypto/rand"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/keyhold/keyhold/enclave/internal/kms"
	"github.com/keyhold/keyhold/enclave/internal/secret"
	"github.com/keyhold/keyhold/keypolicy"
)

// KMS is one KMS key in memory. Its data keys are opened under the context that
// they were made with and no other. The zero value is ready.
type KMS struct {
	// Fail, where set, is called with each operation, GenerateDataKey, Decrypt or
	// ReadLock; its error is returned.
	Fail func(op string) error

	// Alter, where set, changes what ReadLock answers.
	Alter func(*kms.Lock)

	mu       sync.Mutex
	keys     map[string]dataKey // by wrapped form
	arn      string
	admitted []keypolicy.Pair // by the key policy, the newest last
	policy   []byte           // that admits them; nil until it is asked for
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

// ReadLock implements boot.KMS.
func (k *KMS) ReadLock(context.Context) (*kms.Lock, error) {
	if err := k.fail("ReadLock"); err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	account := strings.Split(k.arn, ":")[4]
	if k.policy == nil {
		p, err := keypolicy.Build(keypolicy.Spec{
			Account: account, Pairs: k.admitted, Creating: true, Mode: keypolicy.Managed,
			Parent: "arn:aws:iam::" + account + ":role/keyhold-parent", Admins: []string{"arn:aws:iam::" + account + ":role/keyhold-admin"},
		})
		if err != nil {
			return nil, fmt.Errorf("make a key policy: %w", err)
		}
		k.policy = p.JSON()
	}
	lock := &kms.Lock{Policy: k.policy, Key: keypolicy.KeyFacts{
		ARN: k.arn, Account: account, KeyManager: "CUSTOMER", KeyState: "Enabled", Enabled: true, MultiRegion: new(bool),
		Origin: "AWS_KMS", KeySpec: "SYMMETRIC_DEFAULT", KeyUsage: "ENCRYPT_DECRYPT",
	}}
	if k.Alter != nil {
		k.Alter(lock)
	}
	return lock, nil
}

// Admit makes this the key of that ARN, whose policy admits the two pairs that
// were named last.
func (k *KMS) Admit(keyARN string, pair keypolicy.Pair) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.arn = keyARN
	k.admitted = append(slices.DeleteFunc(k.admitted, func(p keypolicy.Pair) bool { return p == pair }), pair)
	k.admitted = k.admitted[max(0, len(k.admitted)-2):]
	k.policy = nil
}

// proofs are those that were made before: a simulator boots thousands of equal
// enclaves.
//
//nolint:gochecknoglobals // a cache of a pure function
var proofs sync.Map

// Prove is keypolicy.Prove with a memory.
func Prove(policy []byte, want keypolicy.Expectation) (keypolicy.Result, error) {
	type question struct {
		policy, account string
		mine            keypolicy.Pair
		mode            keypolicy.Mode
	}
	type answer struct {
		result keypolicy.Result
		err    error
	}
	q := question{string(policy), want.Account, *want.Mine, want.Mode}
	if a, ok := proofs.Load(q); ok {
		known, _ := a.(answer)
		return known.result, known.err
	}
	result, err := keypolicy.Prove(policy, want)
	proofs.Store(q, answer{result, err})
	return result, err
}

func (k *KMS) fail(op string) error {
	if k.Fail == nil {
		return nil
	}
	return k.Fail(op)
}
