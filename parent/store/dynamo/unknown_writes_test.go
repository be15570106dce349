package dynamo_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

func claimWrites() []write {
	claimed := func(t *testing.T, s store.Store, w world) store.Batch {
		t.Helper()
		w.fill(t, s)
		return must[store.Batch](t)(s.Claim(t.Context(), w.claim()))
	}
	end := store.End{State: record.Ready, Reason: "reason", Attempt: true, KeepKey: true, Now: start}
	return []write{
		{
			name: "Claim",
			prepare: func(t *testing.T, s store.Store, w world) func(context.Context, store.Store) error {
				t.Helper()
				w.fill(t, s)
				return func(ctx context.Context, s store.Store) error { _, err := s.Claim(ctx, w.claim()); return err }
			},
			state: single(batchIs(record.Claimed, 1)),
		},
		{
			name: "Claim by taking over",
			prepare: func(t *testing.T, s store.Store, w world) func(context.Context, store.Store) error {
				t.Helper()
				c := w.claim()
				c.Batch, c.TakeOver, c.KeySeen, c.ClaimID = claimed(t, s, w), true, 1, "another"
				return func(ctx context.Context, s store.Store) error { _, err := s.Claim(ctx, c); return err }
			},
			state: single(batchIs(record.Claimed, 2)),
		},
		{
			name: "Commit",
			prepare: func(t *testing.T, s store.Store, w world) func(context.Context, store.Store) error {
				t.Helper()
				c := store.Commit{Batch: claimed(t, s, w), Result: []byte("result"), Receipt: w.receipt().Ref, Now: start}
				return func(ctx context.Context, s store.Store) error { return s.Commit(ctx, c) }
			},
			state: single(func(t *testing.T, s store.Store, w world) bool {
				t.Helper()
				signed := batchIs(record.Signed, 1)(t, s, w)
				result, err := s.Result(t.Context(), w.batch(0).ID)
				if present(t, result, err) != signed {
					t.Errorf("signed: %v, but the result: %q", signed, result)
				}
				return signed
			}),
		},
		{
			name: "Release",
			prepare: func(t *testing.T, s store.Store, w world) func(context.Context, store.Store) error {
				t.Helper()
				b := claimed(t, s, w)
				return func(ctx context.Context, s store.Store) error { return s.Release(ctx, b, end) }
			},
			state: single(batchIs(record.Ready, 1)),
		},
		{
			name: "Release into quarantine",
			prepare: func(t *testing.T, s store.Store, w world) func(context.Context, store.Store) error {
				t.Helper()
				b, end := claimed(t, s, w), end
				end.State = record.Quarantined
				return func(ctx context.Context, s store.Store) error { return s.Release(ctx, b, end) }
			},
			state: single(batchIs(record.Quarantined, 1)),
		},
		{
			name: "NoteCrash",
			prepare: func(t *testing.T, s store.Store, w world) func(context.Context, store.Store) error {
				t.Helper()
				b := claimed(t, s, w)
				return func(ctx context.Context, s store.Store) error { return s.NoteCrash(ctx, b, []uint32{7}) }
			},
			state: single(func(t *testing.T, s store.Store, w world) bool {
				t.Helper()
				return slices.Equal(must[store.Batch](t)(s.Batch(t.Context(), w.batch(0).ID)).Crashed, []uint32{7})
			}),
		},
		{
			name: "Requeue",
			prepare: func(t *testing.T, s store.Store, w world) func(context.Context, store.Store) error {
				t.Helper()
				quarantine := end
				quarantine.State = record.Quarantined
				noError(t, s.Release(t.Context(), claimed(t, s, w), quarantine))
				return func(ctx context.Context, s store.Store) error {
					return s.Requeue(ctx, w.batch(0).ID, start.Add(time.Hour))
				}
			},
			state: single(batchIs(record.Ready, 0)),
		},
	}
}

func intakeWrites() []write {
	opened := func(t *testing.T, s store.Store, w world) {
		t.Helper()
		must[store.Import](t)(s.OpenImport(t.Context(), w.newImport()))
	}
	holds := func(n int) func(*testing.T, store.Store, world) bool {
		return func(t *testing.T, s store.Store, w world) bool {
			t.Helper()
			ref, err := s.Record(t.Context(), w.ref(0).ID)
			return present(t, ref, err) && ref == w.ref(n)
		}
	}
	return []write{
		{
			name: "OpenImport",
			prepare: func(_ *testing.T, _ store.Store, w world) func(context.Context, store.Store) error {
				return func(ctx context.Context, s store.Store) error { _, err := s.OpenImport(ctx, w.newImport()); return err }
			},
			state: single(func(t *testing.T, s store.Store, w world) bool {
				t.Helper()
				i, err := s.Import(t.Context(), w.importID())
				return present(t, i, err)
			}),
		},
		{
			name: "ReserveRecord",
			prepare: func(_ *testing.T, _ store.Store, w world) func(context.Context, store.Store) error {
				return func(ctx context.Context, s store.Store) error { return reserve(ctx, s, w.ref(0), nil) }
			},
			state: single(holds(0)),
		},
		{
			name: "ReserveRecord over another",
			prepare: func(t *testing.T, s store.Store, w world) func(context.Context, store.Store) error {
				t.Helper()
				over := w.ref(0)
				noError(t, reserve(t.Context(), s, over, nil))
				return func(ctx context.Context, s store.Store) error { return reserve(ctx, s, w.ref(1), &over) }
			},
			state: single(holds(1)),
		},
		{
			name: "PutPayload",
			prepare: func(_ *testing.T, _ store.Store, w world) func(context.Context, store.Store) error {
				return func(ctx context.Context, s store.Store) error {
					_, err := s.PutPayload(ctx, w.batch(0).ID, []byte("payload"))
					return err
				}
			},
			state: single(func(t *testing.T, s store.Store, w world) bool {
				t.Helper()
				p, err := s.Payload(t.Context(), w.batch(0).ID)
				return present(t, p, err)
			}),
		},
		{
			name: "PutBatch",
			prepare: func(t *testing.T, s store.Store, w world) func(context.Context, store.Store) error {
				t.Helper()
				opened(t, s, w)
				return func(ctx context.Context, s store.Store) error { return s.PutBatch(ctx, w.batch(0)) }
			},
			state: single(func(t *testing.T, s store.Store, w world) bool {
				t.Helper()
				b, err := s.Batch(t.Context(), w.batch(0).ID)
				return present(t, b, err)
			}),
		},
		{
			name: "FinishImport",
			prepare: func(t *testing.T, s store.Store, w world) func(context.Context, store.Store) error {
				t.Helper()
				opened(t, s, w)
				return func(ctx context.Context, s store.Store) error { return s.FinishImport(ctx, w.newImport()) }
			},
			state: single(func(t *testing.T, s store.Store, w world) bool {
				t.Helper()
				return must[store.Import](t)(s.Import(t.Context(), w.importID())).State == store.ImportDone
			}),
		},
		{
			name: "AbortImport", many: true,
			prepare: func(t *testing.T, s store.Store, w world) func(context.Context, store.Store) error {
				t.Helper()
				w.fill(t, s)
				return func(ctx context.Context, s store.Store) error { _, err := s.AbortImport(ctx, w.importID()); return err }
			},
			state: func(t *testing.T, s store.Store, w world) (begun, done bool) {
				t.Helper()
				begun = must[store.Import](t)(s.Import(t.Context(), w.importID())).State == store.ImportAborted
				done = begun
				for n := range 2 {
					b, err := s.Batch(t.Context(), w.batch(n).ID)
					p, payloadErr := s.Payload(t.Context(), w.batch(n).ID)
					done = done && !present(t, b, err) && !present(t, p, payloadErr)
				}
				return begun, done
			},
		},
	}
}

func reserve(ctx context.Context, s store.Store, ref store.RecordRef, over *store.RecordRef) error {
	holder, err := s.ReserveRecord(ctx, ref, over)
	if err == nil && holder != ref {
		return store.ErrTaken
	}
	return err
}

func archiveWrites() []write {
	const keys = 60 // two transactions
	return []write{
		{
			name: "PutReceipt",
			prepare: func(_ *testing.T, _ store.Store, w world) func(context.Context, store.Store) error {
				return func(ctx context.Context, s store.Store) error { return s.PutReceipt(ctx, w.receipt()) }
			},
			state: single(func(t *testing.T, s store.Store, w world) bool {
				t.Helper()
				r, err := s.Receipt(t.Context(), w.receipt().Ref)
				return present(t, r, err)
			}),
		},
		{
			name: "PutBoot",
			prepare: func(_ *testing.T, _ store.Store, w world) func(context.Context, store.Store) error {
				return func(ctx context.Context, s store.Store) error {
					return s.PutBoot(ctx, store.Boot{ID: w.bootID(), Document: []byte("d"), Statement: []byte("s")})
				}
			},
			state: single(func(t *testing.T, s store.Store, w world) bool {
				t.Helper()
				b, err := s.Boot(t.Context(), w.bootID())
				return present(t, b, err)
			}),
		},
		{
			name: "PutKeyring",
			prepare: func(_ *testing.T, _ store.Store, w world) func(context.Context, store.Store) error {
				return func(ctx context.Context, s store.Store) error {
					return s.PutKeyring(ctx, w.ref(0).ID, []byte("header"))
				}
			},
			state: single(func(t *testing.T, s store.Store, w world) bool {
				t.Helper()
				h, err := s.Keyring(t.Context(), w.ref(0).ID)
				return present(t, h, err)
			}),
		},
		{
			name: "PutKeys", many: true,
			prepare: func(_ *testing.T, _ store.Store, w world) func(context.Context, store.Store) error {
				var all []store.Key
				for n := range keys {
					all = append(all, w.key(n))
				}
				return func(ctx context.Context, s store.Store) error { return s.PutKeys(ctx, all) }
			},
			state: func(t *testing.T, s store.Store, w world) (begun, done bool) {
				t.Helper()
				done = true
				for n := range keys {
					k, err := s.Key(t.Context(), w.key(n).ID)
					l, leaseErr := s.Lease(t.Context(), w.key(n).ID)
					there := present(t, k, err)
					if there != present(t, l, leaseErr) {
						t.Errorf("key %d and its lease were not written together", n)
					}
					begun, done = begun || there, done && there
				}
				return begun, done
			},
		},
	}
}
