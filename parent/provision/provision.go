// Package provision makes keyrings and keys: it asks an enclave and stores what
// the enclave sealed. It never sees a plaintext key, and asks for no key before
// the ones made earlier are stored.
package provision

import (
	"context"
	"errors"
	"fmt"

	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/store"
)

// rsaAtOnce bounds RSA keys in one request: finding the primes of one takes
// about a tenth of a second, and a request must end within its deadline.
const rsaAtOnce = 20

// Enclave is what provisioning asks of one; signclient.Client is it.
type Enclave interface {
	CreateKeyring(ctx context.Context) (*wire.CreateKeyringReply, error)
	Load(ctx context.Context, req *wire.Load) (*wire.LoadReply, error)
	AddKeys(ctx context.Context, req *wire.AddKeys) (*wire.AddKeysReply, error)
}

// Store is where headers, keys and receipts go.
type Store interface {
	store.Keyrings
	PutReceipt(ctx context.Context, r store.Receipt) error
}

// Options of one run.
type Options struct {
	Algorithm record.Algorithm
	Policy    string
	Pool      string
	Count     int                   // keys of this algorithm, policy and pool that there shall be in the end
	Progress  func(done, total int) // may be nil
}

// Summary says what there is.
type Summary struct {
	KeyringID   string
	Fingerprint sealed.Fingerprint
	Created     bool // the keyring is new
	Had         int  // keys that were there before
	Made        int
}

// Run makes sure that the config's keyring exists and holds Count keys. The same
// call again makes what is missing, so a run that died is continued by it.
func Run(ctx context.Context, e Enclave, s Store, cfg *config.Config, o Options) (sum Summary, err error) {
	if record.CheckPool(o.Pool) != nil || o.Count < 0 || o.Algorithm.SignatureLen() == 0 {
		return sum, fmt.Errorf("provision keys: pool, algorithm or count: %w", refusal.UsageWrong)
	}
	sum.KeyringID = sealed.KeyringID(cfg.Keyring, cfg.SealEpoch)
	header, created, err := keyring(ctx, e, s, sum.KeyringID)
	if err != nil {
		return sum, err
	}
	h, err := sealed.DecodeHeader(header)
	if err != nil {
		return sum, fmt.Errorf("keyring %s: %w", sum.KeyringID, err)
	}
	sum.Created, sum.Fingerprint = created, h.Fingerprint()
	if sum.Had, err = count(ctx, s, sum.KeyringID, o); err != nil {
		return sum, err
	}
	atOnce := wire.MaxAddKeys
	if o.Algorithm == record.RSA2048 {
		atOnce = rsaAtOnce
	}
	var acked uint64
	for sum.Had+sum.Made < o.Count {
		n := min(atOnce, o.Count-sum.Had-sum.Made)
		if acked, err = add(ctx, e, s, sum.KeyringID, o, n, acked); err != nil {
			return sum, err
		}
		sum.Made += n
		if o.Progress != nil {
			o.Progress(sum.Had+sum.Made, o.Count)
		}
	}
	return sum, nil
}

// keyring returns the stored header, which the enclave then has open, or that of
// a new keyring.
func keyring(ctx context.Context, e Enclave, s Store, id string) (header []byte, created bool, err error) {
	header, err = s.Keyring(ctx, id)
	if err == nil {
		if _, err := e.Load(ctx, &wire.Load{Header: header, Keys: [][]byte{}}); err != nil {
			return nil, false, fmt.Errorf("open keyring %s: %w", id, err)
		}
		return header, false, nil
	}
	if !errors.Is(err, store.ErrNotFound) {
		return nil, false, fmt.Errorf("read keyring %s: %w", id, err)
	}
	reply, err := e.CreateKeyring(ctx)
	if err != nil {
		return nil, false, fmt.Errorf("create keyring %s: %w", id, err)
	}
	err = s.PutKeyring(ctx, id, reply.Header)
	if errors.Is(err, store.ErrDiffers) {
		return nil, false, fmt.Errorf("store keyring %s: somebody made another one at the same time; restart this enclave: %w", id, refusal.KeyringConflict)
	}
	if err != nil {
		return nil, false, fmt.Errorf("store keyring %s: %w", id, err)
	}
	return reply.Header, true, nil
}

// count returns how many keys of the wanted kind there are.
func count(ctx context.Context, s Store, keyringID string, o Options) (n int, err error) {
	err = s.Keys(ctx, keyringID, func(page []store.Key) error {
		for _, k := range page {
			e, err := sealed.DecodeEntry(k.Sealed)
			if err != nil {
				return fmt.Errorf("key %s: %w", k.ID, err)
			}
			if k.Pool == o.Pool && e.Public.Algorithm == o.Algorithm && e.Public.Policy == o.Policy {
				n++
			} else if k.Pool == o.Pool && e.Public.Algorithm != o.Algorithm {
				return fmt.Errorf("pool %s holds %s keys, and a pool has one algorithm: %w", o.Pool, e.Public.Algorithm, refusal.UsageWrong)
			}
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("count the keys of %s: %w", keyringID, err)
	}
	return n, nil
}

// add makes n keys, stores their receipt and then the keys, and returns the seq
// of the receipt. Keys whose answer was lost were never stored and sign nothing.
func add(ctx context.Context, e Enclave, s Store, keyringID string, o Options, n int, acked uint64) (uint64, error) {
	reply, err := e.AddKeys(ctx, &wire.AddKeys{Algorithm: o.Algorithm, Policy: o.Policy, Count: uint32(n), Ack: acked}) //nolint:gosec // at most wire.MaxAddKeys
	if err != nil {
		return 0, fmt.Errorf("make %d keys: %w", n, err)
	}
	ref, err := receiptRef(reply.Receipt)
	if err != nil {
		return 0, err
	}
	if err := s.PutReceipt(ctx, store.Receipt{Ref: ref, Signed: reply.Receipt}); err != nil {
		return 0, fmt.Errorf("store the receipt of %d new keys: %w", n, err)
	}
	keys := make([]store.Key, 0, len(reply.Keys))
	for _, b := range reply.Keys {
		entry, err := sealed.DecodeEntry(b)
		if err != nil {
			return 0, fmt.Errorf("a new key: %w", err)
		}
		keys = append(keys, store.Key{ID: entry.Public.KeyID, Keyring: keyringID, Pool: o.Pool, Sealed: b})
	}
	if err := s.PutKeys(ctx, keys); err != nil {
		return 0, fmt.Errorf("store %d new keys: %w", n, err)
	}
	return ref.Seq, nil
}

func receiptRef(signed []byte) (store.ReceiptRef, error) {
	outer, err := receipt.Decode[receipt.Signed](signed)
	if err != nil {
		return store.ReceiptRef{}, fmt.Errorf("the receipt of new keys: %w", err)
	}
	r, err := receipt.Decode[receipt.Receipt](outer.Body)
	if err != nil {
		return store.ReceiptRef{}, fmt.Errorf("the receipt of new keys: %w", err)
	}
	return store.ReceiptRef{BootID: r.BootID, Lane: r.Lane, Seq: r.Seq}, nil
}
