package hostile_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"os"
	"slices"
	"testing"

	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/parent/store"
)

func tableAttacks() []attack {
	return []attack{
		{"rewrites results: flips bytes, exchanges signatures, says refused", "H3", []outcome{found}, rewriteResults},
		{"rewrites payloads and exchanges them between batches", "H3", []outcome{found}, rewritePayloads},
		{"rewrites every field of the control items that says what was signed", "H3", []outcome{found}, rewriteControl},
		{"rewrites a result and signs its receipt, statement and boot with a key of its own", "H3", []outcome{found}, ownReceiptKey},
		{"drops each receipt that another follows or that a batch names", "H3", []outcome{found}, dropReceipts},
		{"reorders the receipts and mixes them between lanes and boots, every pair", "H3", []outcome{found}, mixReceipts},
		{"cuts receipts and flips their bytes", "H3", []outcome{found}, spoilReceipts},
		{"drops boots, exchanges their parts, shows a challenge as one", "H3", []outcome{found}, spoilBoots},
		{"swaps, relabels and drops sealed keys of the tables", "H3", []outcome{found}, spoilKeys},
		{"hides the newest receipts of a lane with their batches", "H5", []outcome{notSeen}, hideNewest},
	}
}

// stride is how far the changed bytes are apart: wide, since each change costs an
// audit of a tenth of a second and the tests of parent/audit change them all, and
// n where everything is to be tried.
func stride(n int) int {
	if os.Getenv("KEYHOLD_HOSTILE") == "full" {
		return n
	}
	return 8 * n
}

func rewriteResults(t *testing.T, got *tally) {
	s := tablesOf(t)
	change := func(what string, id record.BatchID, f func([]byte, []record.Outcome) []byte) {
		t.Helper()
		s.result = func(of record.BatchID, raw []byte) []byte {
			if of != id {
				return raw
			}
			_, out, err := record.DecodeResult(raw)
			must(t, err)
			return f(raw, out)
		}
		s.tries(t, got, what, found)
	}
	for n, b := range s.batches {
		whole, err := s.Store.Result(t.Context(), b.ID)
		must(t, err)
		for i := n; i < len(whole); i += stride(len(s.batches)) { // each batch another part of them
			change(fmt.Sprintf("byte %d", i), b.ID, func(raw []byte, _ []record.Outcome) []byte { raw[i] ^= 1 << (i % 8); return raw })
		}
		change("two signatures exchanged", b.ID, func(_ []byte, out []record.Outcome) []byte {
			out[0], out[1] = out[1], out[0]
			return record.EncodeResult(65, out)
		})
		change("one refused", b.ID, func(_ []byte, out []record.Outcome) []byte {
			out[0] = record.Outcome{Refusal: string(refusal.EnclaveCrash)}
			return record.EncodeResult(65, out)
		})
		change("one fewer", b.ID, func(_ []byte, out []record.Outcome) []byte { return record.EncodeResult(65, out[:2]) })
		change("nothing", b.ID, func([]byte, []record.Outcome) []byte { return nil })
		other := s.batches[(n+1)%len(s.batches)].ID
		change("another batch's", b.ID, func([]byte, []record.Outcome) []byte {
			raw, err := s.Store.Result(t.Context(), other)
			must(t, err)
			return raw
		})
	}
}

func rewritePayloads(t *testing.T, got *tally) {
	s := tablesOf(t)
	for n, b := range s.batches {
		for what, f := range map[string]func([]byte) []byte{
			"a byte":        func(p []byte) []byte { p[len(p)-1] ^= 1; return p },
			"a record less": func([]byte) []byte { return records("boot 0 record 0", "boot 0 record 1") },
			"another batch's": func([]byte) []byte {
				raw, err := s.Store.Payload(t.Context(), s.batches[(n+1)%len(s.batches)].ID)
				must(t, err)
				return raw
			},
		} {
			s.pay = func(id record.BatchID, p []byte) []byte {
				if id == b.ID {
					return f(bytes.Clone(p))
				}
				return p
			}
			s.tries(t, got, what, found)
		}
	}
}

func rewriteControl(t *testing.T, got *tally) {
	s := tablesOf(t)
	for n, own := range s.batches {
		if n%stride(1) != 0 {
			continue
		}
		another := s.batches[(n+batchesOfBoot)%len(s.batches)] // of the other boot
		for what, change := range map[string]func(*store.Batch){
			"import": func(b *store.Batch) { b.ImportID = another.ImportID }, "id": func(b *store.Batch) { b.ID = another.ID },
			"kind": func(b *store.Batch) { b.Kind = record.Raw }, "key": func(b *store.Batch) { b.KeyID[0] ^= 1 },
			"fence": func(b *store.Batch) { b.Fence++ }, "key fence": func(b *store.Batch) { b.KeyFence++ },
			"count": func(b *store.Batch) { b.Count-- }, "refused": func(b *store.Batch) { b.Refused = b.Count },
			"root": func(b *store.Batch) { b.PayloadRoot[0] ^= 1 }, "boot": func(b *store.Batch) { b.BootID = another.BootID },
			"no receipt": func(b *store.Batch) { b.Receipt = store.ReceiptRef{} }, "another receipt": func(b *store.Batch) { b.Receipt = another.Receipt },
			"all": func(b *store.Batch) { *b = another },
			"all but the id": func(b *store.Batch) {
				id, imp := b.ID, b.ImportID
				*b = another
				b.ID, b.ImportID = id, imp
			},
		} {
			s.batch = func(b *store.Batch) {
				if b.ID == own.ID {
					change(b)
				}
			}
			s.tries(t, got, fmt.Sprintf("%s of %s", what, own.ID), found)
		}
	}
}

func ownReceiptKey(t *testing.T, got *tally) {
	s := tablesOf(t)
	_, mine, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	public, ok := mine.Public().(ed25519.PublicKey)
	if !ok {
		t.Fatal("no public key")
	}
	boot := receipt.BootIDOf(public)
	for _, withBoot := range []bool{false, true} {
		for _, victim := range s.batches {
			var forged []store.Receipt
			for _, r := range s.receipts {
				body := read(t, r.Signed)
				if withBoot {
					body.BootID, r.Ref.BootID = boot, boot
				} else if r.Ref != victim.Receipt {
					continue
				}
				if body.BatchID == victim.ID {
					raw, err := s.Store.Result(t.Context(), victim.ID)
					must(t, err)
					_, out, err := record.DecodeResult(raw)
					must(t, err)
					out[0] = record.Outcome{Refusal: string(refusal.EnclaveCrash)}
					body.ResultRoot = receipt.ResultRoot(out)
					s.result = func(id record.BatchID, raw []byte) []byte {
						if id == victim.ID {
							return record.EncodeResult(65, out)
						}
						return raw
					}
				}
				forged = append(forged, store.Receipt{Ref: r.Ref, Signed: receipt.Sign(mine, receipt.Encode(body))})
			}
			s.lane = func(all []store.Receipt) []store.Receipt {
				return append(slices.DeleteFunc(all, func(r store.Receipt) bool { return r.Ref == victim.Receipt }), forged...)
			}
			s.batch = func(b *store.Batch) {
				if b.ID == victim.ID {
					b.Refused = 1
					if withBoot {
						b.BootID, b.Receipt.BootID = boot, boot
					}
				}
			}
			if withBoot {
				s.boot = func(all []store.Boot) []store.Boot {
					st, err := receipt.Decode[receipt.Statement](all[0].Statement)
					must(t, err)
					st.BootID = boot
					return append(all, store.Boot{ID: boot, Document: all[0].Document, Statement: receipt.Encode(st)})
				}
			}
			s.tries(t, got, fmt.Sprintf("a receipt key of its own (boot: %v)", withBoot), found)
		}
	}
}

func without(ref store.ReceiptRef) func([]store.Receipt) []store.Receipt {
	return func(all []store.Receipt) []store.Receipt {
		return slices.DeleteFunc(all, func(r store.Receipt) bool { return r.Ref == ref })
	}
}

func dropReceipts(t *testing.T, got *tally) {
	s := tablesOf(t)
	for _, r := range s.receipts { // each is named by a batch, or vouches for keys
		s.lane = without(r.Ref)
		s.tries(t, got, fmt.Sprintf("without receipt %d of lane %d", r.Ref.Seq, r.Ref.Lane), found)
	}
	s.lane = func([]store.Receipt) []store.Receipt { return nil }
	s.tries(t, got, "without any", found)
}

func mixReceipts(t *testing.T, got *tally) {
	s := tablesOf(t)
	for i := range s.receipts {
		for j := range i {
			s.lane = func(all []store.Receipt) []store.Receipt {
				all[i].Signed, all[j].Signed = all[j].Signed, all[i].Signed
				return all
			}
			s.tries(t, got, fmt.Sprintf("%d and %d exchanged", i, j), found)
			if (i+j)%stride(1) != 0 {
				continue
			}
			s.lane = func(all []store.Receipt) []store.Receipt { all[i].Signed = all[j].Signed; return all }
			s.tries(t, got, fmt.Sprintf("%d in the place of %d", j, i), found)
			s.lane = func(all []store.Receipt) []store.Receipt {
				all[i].Ref, all[j].Ref = all[j].Ref, all[i].Ref
				all[i].Signed, all[j].Signed = resigned(t, all[i]), resigned(t, all[j])
				return all
			}
			s.tries(t, got, fmt.Sprintf("%d and %d renumbered", i, j), found)
		}
	}
}

// resigned is a receipt whose body says what its place in the tables says, under
// the signature that it had.
func resigned(t *testing.T, r store.Receipt) []byte {
	t.Helper()
	s, err := receipt.Decode[receipt.Signed](r.Signed)
	must(t, err)
	body, err := receipt.Decode[receipt.Receipt](s.Body)
	must(t, err)
	body.BootID, body.Lane, body.Seq = r.Ref.BootID, r.Ref.Lane, r.Ref.Seq
	return receipt.Encode(&receipt.Signed{Body: receipt.Encode(body), Signature: s.Signature})
}

func spoilReceipts(t *testing.T, got *tally) {
	s := tablesOf(t)
	for n, r := range s.receipts {
		for i := n; i < len(r.Signed); i += stride(3 * len(s.receipts)) {
			s.lane = func(all []store.Receipt) []store.Receipt {
				all[n].Signed = bytes.Clone(all[n].Signed)
				all[n].Signed[i] ^= 1 << (i % 8)
				return all
			}
			s.tries(t, got, fmt.Sprintf("byte %d", i), found)
			s.lane = func(all []store.Receipt) []store.Receipt { all[n].Signed = all[n].Signed[:i]; return all }
			s.tries(t, got, fmt.Sprintf("cut at %d", i), found)
		}
	}
}

func spoilBoots(t *testing.T, got *tally) {
	s := tablesOf(t)
	a, b := s.bootItems[0], s.bootItems[1]
	show := func(what string, all ...store.Boot) {
		t.Helper()
		s.boot = func([]store.Boot) []store.Boot { return all }
		s.tries(t, got, what, found)
	}
	show("none")
	show("one dropped", a)
	show("the other dropped", b)
	for i := range 2 {
		x, y := s.bootItems[i], s.bootItems[1-i]
		show("the other's document", store.Boot{ID: x.ID, Document: y.Document, Statement: x.Statement}, y)
		show("the other's statement", store.Boot{ID: x.ID, Document: x.Document, Statement: y.Statement}, y)
		show("both of the other", store.Boot{ID: x.ID, Document: y.Document, Statement: y.Statement}, y)
		show("a challenge as the document", store.Boot{ID: x.ID, Document: s.challenge, Statement: x.Statement}, y)
		st, err := receipt.Decode[receipt.Statement](x.Statement)
		must(t, err)
		for what, edit := range map[string]func(*receipt.Statement){
			"config": func(v *receipt.Statement) { v.ConfigHash[0] ^= 1 }, "keyring": func(v *receipt.Statement) { v.Keyring = "else" },
			"fingerprint": func(v *receipt.Statement) { v.Fingerprint[0] ^= 1 }, "mode": func(v *receipt.Statement) { v.Mode = "sealed" },
			"epoch": func(v *receipt.Statement) { v.Epoch = 2 }, "key": func(v *receipt.Statement) { v.KMSKeyARN += "0" },
		} {
			edited := *st
			edit(&edited)
			show("another "+what, store.Boot{ID: x.ID, Document: x.Document, Statement: receipt.Encode(&edited)}, y)
		}
	}
}

func spoilKeys(t *testing.T, got *tally) {
	s := tablesOf(t)
	for _, own := range s.keyItems {
		for what, change := range map[string]func(*store.Key, *sealed.Entry){
			"another key's entry": func(k *store.Key, _ *sealed.Entry) {
				i := slices.IndexFunc(s.keyItems, func(o store.Key) bool { return o.ID != k.ID })
				k.Sealed = s.keyItems[i].Sealed
			},
			"a wider policy":      func(k *store.Key, e *sealed.Entry) { e.Public.Policy = "wide"; k.Sealed = sealed.EncodeEntry(e) },
			"another address":     func(k *store.Key, e *sealed.Entry) { e.Public.Address = "0x00"; k.Sealed = sealed.EncodeEntry(e) },
			"another fingerprint": func(k *store.Key, e *sealed.Entry) { e.Public.Fingerprint[0] ^= 1; k.Sealed = sealed.EncodeEntry(e) },
			"a public key of its own": func(k *store.Key, e *sealed.Entry) {
				e.Public.PublicKey = bytes.Clone(e.Public.PublicKey)
				e.Public.PublicKey[9] ^= 1
				rename(e)
				k.Sealed = sealed.EncodeEntry(e)
			},
			"nothing": func(k *store.Key, _ *sealed.Entry) { k.Sealed = nil },
		} {
			s.key = func(k *store.Key) {
				if k.ID == own.ID {
					e, err := sealed.DecodeEntry(k.Sealed)
					must(t, err)
					change(k, e)
				}
			}
			s.tries(t, got, what+" for key "+own.ID.String()[:8], found)
		}
	}
}

// hideNewest is what no verifier of the tables can see, and a witness who kept
// the signed heads can.
func hideNewest(t *testing.T, got *tally) {
	s := tablesOf(t)
	for i := range s.batches {
		last := s.batches[i]
		at := slices.IndexFunc(s.receipts, func(r store.Receipt) bool { return r.Ref == last.Receipt })
		if slices.ContainsFunc(s.receipts, func(r store.Receipt) bool {
			return r.Ref.BootID == last.Receipt.BootID && r.Ref.Lane == last.Receipt.Lane && r.Ref.Seq > last.Receipt.Seq
		}) {
			continue // dropping it leaves a gap
		}
		s.lane = without(last.Receipt)
		s.batch = func(b *store.Batch) {
			if b.ID == last.ID { // as if no enclave had ever signed it
				*b = store.Batch{
					ID: b.ID, ImportID: b.ImportID, State: record.Ready, Pool: b.Pool, Kind: b.Kind, Count: b.Count, PayloadRoot: b.PayloadRoot, VisibleAt: b.VisibleAt,
				}
			}
		}
		s.tries(t, got, "the newest receipt and its batch", notSeen)
		heads := s.heads[last.Receipt.BootID]
		if !slices.ContainsFunc(heads.Lanes, func(h receipt.Head) bool {
			return h.Lane == last.Receipt.Lane && h.Seq == last.Receipt.Seq && h.Hash == receipt.ChainHash(s.receipts[at].Signed)
		}) {
			t.Error("the heads that a witness keeps do not show what was hidden")
		}
	}
}
