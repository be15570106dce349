// Package provision makes keyrings and keys: it asks an enclave and stores what
// the enclave sealed. It never sees a plaintext key, and asks for no key before
// the ones made earlier are stored.
package provision

import (
	"context"
	"errors"
	"fmt"
	"time"

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
	Receipts(ctx context.Context, req *wire.Receipts) (*wire.ReceiptsReply, error)
}

// Store is where headers, keys, receipts and what vouches for them go.
type Store interface {
	store.Keyrings
	PutReceipt(ctx context.Context, r store.Receipt) error
	PutBoot(ctx context.Context, b store.Boot) error
}

// Options of one run.
type Options struct {
	Algorithm record.Algorithm
	Policy    string
	Pool      string
	Count     int                   // keys of this algorithm, policy and pool that there shall be in the end
	Progress  func(done, total int) // may be nil
	Now       func() time.Time      // when the boot was seen; nil is time.Now
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
// call again makes what is missing, so a run that died is continued by it. Runs
// side by side do not see each other's keys and may make Count each.
func Run(ctx context.Context, e Enclave, s Store, cfg *config.Config, o Options) (sum Summary, err error) {
	if record.CheckPool(o.Pool) != nil || o.Count < 0 || o.Algorithm.SignatureLen() == 0 {
		return sum, fmt.Errorf("provision keys: pool, algorithm or count: %w", refusal.UsageWrong)
	}
	sum.KeyringID = sealed.KeyringID(cfg.Keyring, cfg.SealEpoch)
	b, err := keyring(ctx, e, s, sum.KeyringID)
	if err != nil {
		return sum, err
	}
	h, err := sealed.DecodeHeader(b.header)
	if err != nil {
		return sum, fmt.Errorf("keyring %s: %w", sum.KeyringID, err)
	}
	sum.Created, sum.Fingerprint = b.created, h.Fingerprint()
	if sum.Had, err = count(ctx, s, sum.KeyringID, o); err != nil {
		return sum, err
	}
	if err := keepBoot(ctx, s, b, o.Now); err != nil {
		return sum, err
	}
	if err := settle(ctx, e, s, []wire.LaneSeq{}); err != nil {
		return sum, err
	}
	atOnce := wire.MaxAddKeys
	if o.Algorithm == record.RSA2048 {
		atOnce = rsaAtOnce
	}
	var last store.ReceiptRef
	for sum.Had+sum.Made < o.Count {
		n := min(atOnce, o.Count-sum.Had-sum.Made)
		if last, err = add(ctx, e, s, h, o, n, last.Seq); err != nil {
			return sum, err
		}
		sum.Made += n
		if o.Progress != nil {
			o.Progress(sum.Had+sum.Made, o.Count)
		}
	}
	if sum.Made == 0 {
		return sum, nil
	}
	return sum, settle(ctx, e, s, []wire.LaneSeq{{Lane: last.Lane, Seq: last.Seq}})
}

// settle acknowledges what is stored, and stores and acknowledges whatever else
// waits in the enclave: a run that died between an answer and its receipt would
// leave a gap in its lane, and nobody could tell that from a theft.
func settle(ctx context.Context, e Enclave, s Store, stored []wire.LaneSeq) error {
	for {
		reply, err := e.Receipts(ctx, &wire.Receipts{Ack: stored})
		if err != nil {
			return fmt.Errorf("fetch the receipts that wait: %w", err)
		}
		if len(reply.Receipts) == 0 {
			return nil
		}
		stored = stored[:0]
		for _, raw := range reply.Receipts {
			r, err := readReceipt(raw)
			if err != nil {
				return err
			}
			ref := refOf(r)
			if err := s.PutReceipt(ctx, store.Receipt{Ref: ref, Signed: raw}); err != nil {
				return fmt.Errorf("store a receipt that waited: %w", err)
			}
			stored = append(stored, wire.LaneSeq{Lane: ref.Lane, Seq: ref.Seq})
		}
	}
}

// opened is a boot with its keyring.
type opened struct {
	header              []byte
	created             bool // the keyring is new
	document, statement []byte
}

// keyring has the enclave open the stored keyring, or a new one.
func keyring(ctx context.Context, e Enclave, s Store, id string) (*opened, error) {
	header, err := s.Keyring(ctx, id)
	if err == nil {
		reply, err := e.Load(ctx, &wire.Load{Header: header, Keys: [][]byte{}})
		if err != nil {
			return nil, fmt.Errorf("open keyring %s: %w", id, err)
		}
		return &opened{header: header, document: reply.Document, statement: reply.Statement}, nil
	}
	if !errors.Is(err, store.ErrNotFound) {
		return nil, fmt.Errorf("read keyring %s: %w", id, err)
	}
	reply, err := e.CreateKeyring(ctx)
	if err != nil {
		return nil, fmt.Errorf("create keyring %s: %w", id, err)
	}
	if h, err := sealed.DecodeHeader(reply.Header); err != nil || h.ID() != id {
		return nil, fmt.Errorf("create keyring %s: the enclave made another: %w", id, refusal.KeyringInvalid)
	}
	err = s.PutKeyring(ctx, id, reply.Header)
	if errors.Is(err, store.ErrDiffers) {
		return nil, fmt.Errorf("store keyring %s: somebody made another one at the same time; restart this enclave: %w", id, refusal.KeyringConflict)
	}
	if err != nil {
		return nil, fmt.Errorf("store keyring %s: %w", id, err)
	}
	return &opened{header: reply.Header, created: true, document: reply.Document, statement: reply.Statement}, nil
}

// keepBoot stores what the boot says of itself before it makes a key: without it
// nobody could verify the receipts of its keys.
func keepBoot(ctx context.Context, s Store, b *opened, now func() time.Time) error {
	st, err := receipt.Decode[receipt.Statement](b.statement)
	if err != nil {
		return fmt.Errorf("the boot statement: %w: %w", refusal.ReceiptInvalid, err)
	}
	if now == nil {
		now = time.Now
	}
	err = s.PutBoot(ctx, store.Boot{ID: st.BootID, Document: b.document, Statement: b.statement, SeenAt: now()})
	if err != nil {
		return fmt.Errorf("store boot %s: %w", st.BootID, err)
	}
	return nil
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

// add makes n keys, stores their receipt and then the keys, and returns where
// the receipt is. Keys whose answer was lost were never stored and sign nothing.
func add(ctx context.Context, e Enclave, s Store, h *sealed.Header, o Options, n int, acked uint64) (ref store.ReceiptRef, err error) {
	reply, err := e.AddKeys(ctx, &wire.AddKeys{Algorithm: o.Algorithm, Policy: o.Policy, Count: uint32(n), Ack: acked}) //nolint:gosec // at most wire.MaxAddKeys
	if err != nil {
		return ref, fmt.Errorf("make %d keys: %w", n, err)
	}
	r, err := readReceipt(reply.Receipt)
	if err != nil {
		return ref, err
	}
	keys := make([]store.Key, 0, len(reply.Keys))
	for _, b := range reply.Keys {
		entry, err := sealed.DecodeEntry(b)
		if err != nil {
			return ref, fmt.Errorf("a new key: %w", err)
		}
		if p := &entry.Public; p.Algorithm != o.Algorithm || p.Policy != o.Policy || p.Fingerprint != h.Fingerprint() {
			return ref, fmt.Errorf("a new key is not the one that was asked for: %w", refusal.SealedInvalid)
		}
		keys = append(keys, store.Key{ID: entry.Public.KeyID, Keyring: h.ID(), Pool: o.Pool, Sealed: b})
	}
	if len(keys) != n || r.Subject != receipt.SubjectKeys || int(r.Count) != n || r.ResultRoot != receipt.KeysRoot(reply.Keys) {
		return ref, fmt.Errorf("%d new keys and their receipt do not belong together: %w", n, refusal.ReceiptInvalid)
	}
	ref = refOf(r)
	if err := s.PutReceipt(ctx, store.Receipt{Ref: ref, Signed: reply.Receipt}); err != nil {
		return ref, fmt.Errorf("store the receipt of %d new keys: %w", n, err)
	}
	if err := s.PutKeys(ctx, keys); err != nil {
		return ref, fmt.Errorf("store %d new keys: %w", n, err)
	}
	return ref, nil
}

// readReceipt takes a receipt apart. Whoever made the keys need not be convinced
// by it; its signature is for those who read the archive.
func readReceipt(signed []byte) (*receipt.Receipt, error) {
	outer, err := receipt.Decode[receipt.Signed](signed)
	if err != nil {
		return nil, fmt.Errorf("a receipt of the enclave: %w: %w", refusal.ReceiptInvalid, err)
	}
	r, err := receipt.Decode[receipt.Receipt](outer.Body)
	if err != nil {
		return nil, fmt.Errorf("a receipt of the enclave: %w: %w", refusal.ReceiptInvalid, err)
	}
	return r, nil
}

func refOf(r *receipt.Receipt) store.ReceiptRef {
	return store.ReceiptRef{BootID: r.BootID, Lane: r.Lane, Seq: r.Seq}
}
