package main

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"strconv"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/payload"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/parent/intake"
	"github.com/keyhold/keyhold/parent/store"
)

// The scripts run the tool against real tables. What parents and enclaves would
// do to these tables is done here, with Ed25519 keys that the test knows.

func scriptStore(ts *testscript.TestScript) store.Store {
	s, err := cli.OpenStore(context.Background(), cli.StoreOptions{
		Prefix: ts.Getenv(cli.EnvTablePrefix), Endpoint: ts.Getenv(cli.EnvEndpoint),
	})
	ts.Check(err)
	return s
}

func testKey(pool string, i int) ed25519.PrivateKey {
	seed := sha256.Sum256([]byte(pool + strconv.Itoa(i)))
	return ed25519.NewKeyFromSeed(seed[:])
}

// makeKeys is "keys POOL N": the keyring payouts#1 with N Ed25519 keys.
func makeKeys(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	s, ctx := scriptStore(ts), context.Background()
	h := &sealed.Header{
		Version: 1, Keyring: "payouts", Epoch: 1, WrappedDEK: []byte("wrapped"),
		KMSKeyARN: "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
	}
	ts.Check(s.PutKeyring(ctx, h.ID(), sealed.EncodeHeader(h)))
	var keys []store.Key
	for i := range n {
		public := []byte(testKey(args[0], i).Public().(ed25519.PublicKey))
		id := sealed.KeyID(record.Ed25519, public)
		e := &sealed.Entry{
			Public: sealed.Public{
				Version: 1, Keyring: h.Keyring, Fingerprint: h.Fingerprint(), Epoch: 1, KeyID: id,
				Algorithm: record.Ed25519, PublicKey: public, Policy: "messages",
			},
			Nonce: make([]byte, sealed.NonceLen), Ciphertext: make([]byte, 48),
		}
		keys = append(keys, store.Key{ID: id, Keyring: h.ID(), Pool: args[0], Sealed: sealed.EncodeEntry(e)})
	}
	ts.Check(s.PutKeys(ctx, keys))
}

// claim takes a batch with the first key of its pool.
func claim(ctx context.Context, ts *testscript.TestScript, s store.Store, b store.Batch) store.Batch {
	id := sealed.KeyID(record.Ed25519, testKey(b.Pool, 0).Public().(ed25519.PublicKey))
	l, err := s.Lease(ctx, id)
	ts.Check(err)
	now := time.Now()
	b, err = s.Claim(ctx, store.Claim{
		Batch: b, KeyID: id, KeySeen: l.Fence, Owner: "owner", ClaimID: string(b.ID) + strconv.Itoa(int(b.Fence)),
		Lease: 10 * time.Second, Used: l.Used + 1, Now: now, Next: now.Add(10 * time.Second),
	})
	ts.Check(err)
	return b
}

// signReady is "sign POOL [REFUSED]": signs every READY batch of the pool, but
// refuses the first REFUSED records of each.
func signReady(ts *testscript.TestScript, _ bool, args []string) {
	refused := 0
	if len(args) > 1 {
		var err error
		refused, err = strconv.Atoi(args[1])
		ts.Check(err)
	}
	s, ctx := scriptStore(ts), context.Background()
	ts.Check(openBatches(ctx, s, func(b *store.Batch) error {
		if b.Pool != args[0] || b.State != record.Ready {
			return nil
		}
		raw, err := s.Payload(ctx, b.ID)
		if err != nil {
			return err
		}
		rs, err := record.DecodePayload(raw)
		if err != nil {
			return err
		}
		out := make([]record.Outcome, len(rs))
		h, err := payload.NewHasher(record.Ed25519, b.Kind)
		if err != nil {
			return err
		}
		for i, r := range rs {
			if i < refused {
				out[i].Refusal = "policy_denied"
				continue
			}
			message, err := h.Sum(r.Payload)
			if err != nil {
				return err
			}
			out[i].Signature = ed25519.Sign(testKey(b.Pool, 0), message)
		}
		claimed := claim(ctx, ts, s, *b)
		return s.Commit(ctx, store.Commit{Batch: claimed, Result: record.EncodeResult(ed25519.SignatureSize, out), Refused: refused, Now: time.Now()})
	}))
}

// forge is "forge POOL": signs every READY batch of the pool with nonsense.
func forge(ts *testscript.TestScript, _ bool, args []string) {
	s, ctx := scriptStore(ts), context.Background()
	ts.Check(openBatches(ctx, s, func(b *store.Batch) error {
		if b.Pool != args[0] || b.State != record.Ready {
			return nil
		}
		out := make([]record.Outcome, b.Count)
		for i := range out {
			out[i].Signature = make([]byte, ed25519.SignatureSize)
		}
		claimed := claim(ctx, ts, s, *b)
		return s.Commit(ctx, store.Commit{Batch: claimed, Result: record.EncodeResult(ed25519.SignatureSize, out), Now: time.Now()})
	}))
}

// quarantine is "quarantine BATCH".
func quarantine(ts *testscript.TestScript, _ bool, args []string) {
	s, ctx := scriptStore(ts), context.Background()
	b, err := s.Batch(ctx, record.BatchID(args[0]))
	ts.Check(err)
	ts.Check(s.Release(ctx, claim(ctx, ts, s, b), store.End{
		State: record.Quarantined, Reason: "enclave_crash", Attempt: true, KeepKey: true, Now: time.Now(),
	}))
}

// unfinished is "unfinished IMPORT POOL ID TEXT": an import that died after it
// had reserved the id of one record.
func unfinished(ts *testscript.TestScript, _ bool, args []string) {
	s, ctx := scriptStore(ts), context.Background()
	id := record.ImportID(args[0])
	_, err := s.OpenImport(ctx, store.Import{
		ID: id, State: store.ImportOpen, BatchSize: 500, Pool: args[1], Kind: record.Message, Records: 1, CreatedAt: time.Now(),
	})
	ts.Check(err)
	ref := store.RecordRef{ID: args[2], BatchID: record.MakeBatchID(id, 0), PayloadHash: intake.PayloadHash(record.Message, []byte(args[3]))}
	holder, err := s.ReserveRecord(ctx, ref, nil)
	ts.Check(err)
	if holder != ref {
		ts.Check(errors.New("the id is taken"))
	}
}
