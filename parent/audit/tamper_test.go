package audit_test

import (
	"bytes"
	"crypto/ed25519"
	"fmt"
	"os"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/awslocal/dynoxide/dynoxidetest"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/parent/audit"
	"github.com/keyhold/keyhold/parent/store"
)

// documentStep is how far the changed bytes of a boot document are apart: it has
// 5 KB, and each audit verifies five signatures of P-384. Of everything else
// every byte is changed, but for short runs.
const documentStep = 32

// step is 1 in make test, and more where less will do.
func step() int {
	switch {
	case testing.Short():
		return 16
	case os.Getenv(dynoxidetest.RequireEnv) == "":
		return 5
	}
	return 1
}

func TestEveryByteOfAPayloadIsCovered(t *testing.T) {
	w := of(t, oneBoot)
	for id := range w.tables.batches {
		whole := w.tables.payloads[id]
		for i := range whole {
			w.tables.payloads[id] = flipped(whole, i)
			signaturesFind(t, w, fmt.Sprintf("byte %d of the payload", i), id)
		}
		w.tables.payloads[id] = whole
	}
}

// The length of a signature says nothing in a result that has none: it is the
// one number that may differ, and all that is left out here.
func TestEveryByteOfAResultIsCovered(t *testing.T) {
	w := of(t, oneBoot)
	for id, b := range w.tables.batches {
		whole := w.tables.results[id]
		for i := 0; i < len(whole); i += step() {
			if b.Refused == b.Count && i == 2 {
				continue
			}
			w.tables.results[id] = flipped(whole, i)
			found(t, w, fmt.Sprintf("byte %d of the result of %s", i, id), "batch "+string(id)+": ")
		}
		w.tables.results[id] = whole
	}
}

func signaturesFind(t *testing.T, w *world, what string, id record.BatchID) {
	t.Helper()
	alone := *w
	alone.opt = audit.Options{Imports: []record.ImportID{w.tables.batches[id].ImportID}}
	found(t, &alone, what, "batch "+string(id)+": ")
}

func TestEveryByteOfAReceiptIsCovered(t *testing.T) {
	w := of(t, oneBoot)
	for _, in := range w.tables.receipts {
		r := in[len(in)/2]
		for i := 0; i < len(r.Signed); i += step() {
			w.tables.replace(r.Ref, flipped(r.Signed, i))
			found(t, w, fmt.Sprintf("byte %d of receipt %d of lane %d", i, r.Ref.Seq, r.Ref.Lane),
				fmt.Sprintf("receipt %d of lane %d of boot %s", r.Ref.Seq, r.Ref.Lane, r.Ref.BootID))
		}
		w.tables.replace(r.Ref, r.Signed)
	}
	honest(t, w)
}

func TestEveryByteOfABootIsCovered(t *testing.T) {
	w := of(t, oneBoot)
	b := w.tables.boots[0]
	says := "boot " + b.ID.String() + ": "
	for i := 0; i < len(b.Statement); i += step() {
		w.tables.boots[0].Statement = flipped(b.Statement, i)
		found(t, w, fmt.Sprintf("byte %d of the statement", i), says)
	}
	w.tables.boots[0] = b
	for i := 0; i < len(b.Document); i += documentStep * step() {
		w.tables.boots[0].Document = flipped(b.Document, i)
		found(t, w, fmt.Sprintf("byte %d of the document", i), says)
	}
	w.tables.boots[0] = b
	for i := range b.ID {
		w.tables.boots[0].ID[i] ^= 1
		found(t, w, fmt.Sprintf("byte %d of the id", i), "boot "+w.tables.boots[0].ID.String()+": ")
		w.tables.boots[0].ID[i] ^= 1
	}
	honest(t, w)
}

// Nonce and ciphertext only the enclave can check.
func TestEveryByteOfASealedKeysPublicPartIsCovered(t *testing.T) {
	w := of(t, oneBoot)
	for id, k := range w.tables.keys { // one of them
		e, err := sealed.DecodeEntry(k.Sealed)
		must(t, err)
		public := e.Public.AAD()
		from := bytes.Index(k.Sealed, public)
		if from < 0 {
			t.Fatal("the entry does not hold its public part")
		}
		for i := 0; i < len(public); i += step() {
			changed := k
			changed.Sealed = flipped(k.Sealed, from+i)
			w.tables.keys[id] = changed
			found(t, w, fmt.Sprintf("byte %d of the key", i), "key")
		}
		w.tables.keys[id] = k
		break
	}
	honest(t, w)
}

func TestAKeyThatIsChangedAsAWholeIsFound(t *testing.T) {
	w := of(t, oneBoot)
	var a, b store.Key // of both pools
	for _, k := range w.tables.keys {
		if k.Pool == "open" {
			b = k
		} else {
			a = k
		}
	}
	for name, tt := range map[string]struct {
		change func(*sealed.Public)
		says   string
	}{
		"address":            {func(p *sealed.Public) { p.Address = "0x000000000000000000000000000000000000dEaD" }, "key " + a.ID.String()},
		"no address":         {func(p *sealed.Public) { p.Address = "" }, "key " + a.ID.String()},
		"fingerprint":        {func(p *sealed.Public) { p.Fingerprint[0] ^= 1 }, "key " + a.ID.String()},
		"keyring":            {func(p *sealed.Public) { p.Keyring = "else" }, "key " + a.ID.String()},
		"epoch":              {func(p *sealed.Public) { p.Epoch = 2 }, "key " + a.ID.String()},
		"a policy too wide":  {func(p *sealed.Public) { p.Policy = "open" }, "it holds 3 secp256k1 keys of one policy, but receipts tell of 2"},
		"no policy there is": {func(p *sealed.Public) { p.Policy = "none" }, "it holds 1 secp256k1 keys of one policy, but receipts tell of 0"},
	} {
		e, err := sealed.DecodeEntry(a.Sealed)
		must(t, err)
		tt.change(&e.Public)
		changed := a
		changed.Sealed = sealed.EncodeEntry(e)
		w.tables.keys[a.ID] = changed
		found(t, w, name, tt.says)
	}
	w.tables.keys[a.ID] = store.Key{ID: a.ID, Keyring: a.Keyring, Pool: a.Pool, Sealed: b.Sealed}
	found(t, w, "another key in its place", "key "+a.ID.String())
	delete(w.tables.keys, a.ID)
	for id, b := range w.tables.batches {
		if b.KeyID == a.ID && b.Receipt.Seq != 0 {
			found(t, w, "no key", "the key that signed batch "+string(id)+" is missing")
		}
	}
}

func TestAKeyWithoutACreationReceiptIsFound(t *testing.T) {
	other, err := enclavetest.New(t.Context(), enclavetest.Options{Keys: 1})
	must(t, err)
	t.Cleanup(other.Close)
	for _, configs := range [][]*config.Config{of(t, oneBoot).opt.Configs, nil} {
		w := of(t, oneBoot)
		w.opt.Configs = configs
		var e *sealed.Entry
		for _, k := range w.tables.keys {
			e, err = sealed.DecodeEntry(k.Sealed)
			must(t, err)
		}
		foreign, err := sealed.DecodeEntry(other.Sealed().Entries[0])
		must(t, err)
		foreign.Public.Fingerprint, foreign.Public.Policy = e.Public.Fingerprint, e.Public.Policy
		id := foreign.Public.KeyID
		w.tables.keys[id] = store.Key{ID: id, Keyring: "test#1", Pool: "default", Sealed: sealed.EncodeEntry(foreign)}
		found(t, w, "a key that no enclave made", "secp256k1 keys of one policy, but receipts tell of")
	}
}

func TestEveryFieldOfAControlItemThatMattersIsCovered(t *testing.T) {
	w := of(t, twoBoots)
	id := batch(signedImport(0), 0)
	was := w.tables.batches[id]
	another := w.tables.batches[batch(signedImport(1), 0)]
	if was.KeyID == another.KeyID && was.Receipt == another.Receipt {
		t.Fatal("the world is too small")
	}
	for name, change := range map[string]func(*store.Batch){
		"import":          func(b *store.Batch) { b.ImportID = another.ImportID },
		"id":              func(b *store.Batch) { b.ID = another.ID },
		"kind":            func(b *store.Batch) { b.Kind = record.Raw },
		"unknown kind":    func(b *store.Batch) { b.Kind = "\x1b[2J" },
		"pool":            func(b *store.Batch) { b.Pool = "open" },
		"key":             func(b *store.Batch) { b.KeyID[31] ^= 1 },
		"no key":          func(b *store.Batch) { b.KeyID = record.KeyID{} },
		"fence":           func(b *store.Batch) { b.Fence++ },
		"key fence":       func(b *store.Batch) { b.KeyFence++ },
		"count":           func(b *store.Batch) { b.Count++ },
		"fewer":           func(b *store.Batch) { b.Count-- },
		"negative":        func(b *store.Batch) { b.Count = -1 },
		"refused":         func(b *store.Batch) { b.Refused = 1 },
		"all refused":     func(b *store.Batch) { b.Refused = b.Count },
		"root":            func(b *store.Batch) { b.PayloadRoot[0] ^= 1 },
		"boot":            func(b *store.Batch) { b.BootID[0] ^= 1 },
		"no receipt":      func(b *store.Batch) { b.Receipt = store.ReceiptRef{} },
		"receipt's boot":  func(b *store.Batch) { b.Receipt.BootID[0] ^= 1 },
		"receipt's lane":  func(b *store.Batch) { b.Receipt.Lane++ },
		"receipt's seq":   func(b *store.Batch) { b.Receipt.Seq += 100 },
		"another receipt": func(b *store.Batch) { b.Receipt = another.Receipt },
		"all at once":     func(b *store.Batch) { *b = another },
		"refused without a receipt": func(b *store.Batch) {
			b.Refused, b.Receipt = b.Count, store.ReceiptRef{}
		},
	} {
		w.tables.edit(id, change)
		found(t, w, name, "batch "+string(id)+": ")
		w.tables.batches[id] = was
	}
	honest(t, w)
}

func TestALaneThatIsNotInOrderIsFound(t *testing.T) {
	for name, tt := range map[string]struct {
		spoil func(in []store.Receipt) []store.Receipt
		says  string
	}{
		"the first removed": {func(in []store.Receipt) []store.Receipt { return in[1:] }, "the receipts before it are missing from 1 on"},
		"one removed":       {func(in []store.Receipt) []store.Receipt { return slices.Delete(in, 1, 2) }, "the receipts before it are missing from 2 on"},
		"all removed":       {func([]store.Receipt) []store.Receipt { return nil }, "is missing"},
		"two swapped": {func(in []store.Receipt) []store.Receipt {
			in[0].Signed, in[1].Signed = in[1].Signed, in[0].Signed
			return in
		}, "it belongs to another place"},
		"one twice":           {func(in []store.Receipt) []store.Receipt { in[1].Signed = in[0].Signed; return in }, "it belongs to another place"},
		"one moved to a next": {func(in []store.Receipt) []store.Receipt { in[0].Ref.Seq = 9; return append(in[1:], in[0]) }, "are missing from"},
	} {
		w := of(t, oneBoot)
		at := longest(w)
		w.tables.receipts[at] = tt.spoil(w.tables.receipts[at])
		found(t, w, name, tt.says)
	}
}

// longest is the lane with most receipts.
func longest(w *world) (at lane) {
	for k, in := range w.tables.receipts {
		if len(in) > len(w.tables.receipts[at]) {
			at = k
		}
	}
	return at
}

func TestReceiptsSwappedBetweenLanesAndBootsAreFound(t *testing.T) {
	w := of(t, twoBoots)
	var swapped int
	for a, x := range w.tables.receipts {
		for b, y := range w.tables.receipts {
			if a == b {
				continue
			}
			spoilt := *w
			spoilt.tables = w.tables.clone()
			spoilt.tables.receipts[a][0].Signed, spoilt.tables.receipts[b][0].Signed = y[0].Signed, x[0].Signed
			what := fmt.Sprintf("lanes %d and %d of boots %.8s and %.8s", a.number, b.number, a.boot, b.boot)
			found(t, &spoilt, what, fmt.Sprintf("receipt 1 of lane %d of boot %s: ", a.number, a.boot))
			swapped++
		}
	}
	if swapped < 2 {
		t.Error("nothing to swap")
	}
	// A whole lane under another number.
	for a := range w.tables.receipts {
		b := lane{a.boot, a.number + 100}
		for _, r := range w.tables.receipts[a] {
			r.Ref.Lane = b.number
			w.tables.add(r)
		}
		found(t, w, "a copy of a lane", fmt.Sprintf("receipt 1 of lane %d of boot %s: it belongs to another place", b.number, b.boot))
		break
	}
}

// What root on the parent can have signed beside the run shows in the lanes.
func TestWhatWasSignedBesideTheRunIsFound(t *testing.T) {
	w := of(t, oneBoot)
	w.tables.add(w.twice)
	found(t, w, "one batch with two keys", "batch "+string(batch(signedImport(0), 0))+" was signed with two keys or as two payloads")
	w = of(t, oneBoot)
	w.tables.add(w.ghost)
	found(t, w, "a batch that is nowhere", "batch ghost-b0000000: an enclave signed it, but it is not in the tables")
	w.opt.Imports = []record.ImportID{signedImport(0)} // it was not asked for the other's
	honest(t, w)
}

// An attacker who signs receipts with a key of his own.
func TestAResultRewrittenWithAReceiptOfAnotherKeyIsFound(t *testing.T) {
	_, mine, err := ed25519.GenerateKey(nil)
	must(t, err)
	w := of(t, oneBoot)
	id := batch(signedImport(0), 0)
	rewrite(t, w, id, mine)
	found(t, w, "another receipt key", "batch "+string(id)+": its receipt: ")

	// With a boot of the same key it is the boot that does not verify.
	public, ok := mine.Public().(ed25519.PublicKey)
	if !ok {
		t.Fatal("no public key")
	}
	boot := receipt.BootIDOf(public)
	st, err := receipt.Decode[receipt.Statement](w.tables.boots[0].Statement)
	must(t, err)
	st.BootID = boot
	forged := store.Boot{ID: boot, Document: w.tables.boots[0].Document, Statement: receipt.Encode(st)}
	w.tables.boots = append(w.tables.boots, forged)
	w.tables.edit(id, func(b *store.Batch) {
		b.BootID, b.Receipt = boot, store.ReceiptRef{BootID: boot, Seq: 1}
	})
	rewrite(t, w, id, mine)
	found(t, w, "another boot", "boot "+boot.String()+": its statement", "batch "+string(id)+": its boot")
}

// rewrite drops the first signature of a batch and makes control item and
// receipt say so.
func rewrite(t *testing.T, w *world, id record.BatchID, key ed25519.PrivateKey) {
	t.Helper()
	_, out, err := record.DecodeResult(w.tables.results[id])
	must(t, err)
	out[0] = record.Outcome{Refusal: "enclave_crash"}
	w.tables.results[id] = record.EncodeResult(65, out)
	w.tables.edit(id, func(b *store.Batch) { b.Refused = 1 })
	b := w.tables.batches[id]
	e, err := sealed.DecodeEntry(w.tables.keys[b.KeyID].Sealed)
	must(t, err)
	policy, _ := w.opt.Configs[0].Policy(e.Public.Policy)
	r := receipt.Receipt{
		Domain: receipt.ReceiptDomain, Version: 1, Subject: receipt.SubjectBatch, BootID: b.Receipt.BootID, Lane: b.Receipt.Lane,
		Seq: b.Receipt.Seq, BatchID: id, ImportID: b.ImportID, KeyID: b.KeyID, Algorithm: e.Public.Algorithm, PublicKey: e.Public.PublicKey,
		PolicyHash: policy.Hash(), BatchFence: b.Fence, KeyFence: b.KeyFence, Count: 3, PayloadRoot: b.PayloadRoot, ResultRoot: receipt.ResultRoot(out),
	}
	signed := receipt.Sign(key, receipt.Encode(&r))
	if _, err := w.tables.Receipt(t.Context(), b.Receipt); err != nil {
		w.tables.add(store.Receipt{Ref: b.Receipt, Signed: signed})
		return
	}
	w.tables.replace(b.Receipt, signed)
}

// bootOf is what another enclave says of itself.
func bootOf(t *testing.T, o enclavetest.Options) (store.Boot, *enclavetest.Server) {
	t.Helper()
	e, err := enclavetest.New(t.Context(), o)
	must(t, err)
	t.Cleanup(e.Close)
	c, err := connect(t.Context(), e)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	h := c.Hello()
	return store.Boot{ID: h.BootID, Document: h.Document, Statement: h.Statement}, e
}

func TestBootsOfAnotherImageOrConfigAreRefused(t *testing.T) {
	wide := enclavetest.DefaultConfig()
	wide.Policies[0].Kinds = record.Kinds()
	own, e := bootOf(t, enclavetest.Options{Keys: 1})
	image, _ := bootOf(t, enclavetest.Options{CA: e.CA(), PCR0: bytes.Repeat([]byte{7}, 48)})
	other, _ := bootOf(t, enclavetest.Options{CA: e.CA(), Config: wide})
	foreign, _ := bootOf(t, enclavetest.Options{})
	raw, err := config.Parse(e.Config())
	must(t, err)
	pcr16 := config.PCR16(e.Config())
	for name, tt := range map[string]struct {
		boot store.Boot
		ok   bool
	}{
		"the wanted one": {own, true}, "another image": {image, false}, "another config": {other, false}, "another root": {foreign, false},
		"another's statement": {store.Boot{ID: own.ID, Document: own.Document, Statement: other.Statement}, false},
		"another's document":  {store.Boot{ID: own.ID, Document: other.Document, Statement: own.Statement}, false},
		"another's id":        {store.Boot{ID: other.ID, Document: own.Document, Statement: own.Statement}, false},
	} {
		w := &world{tables: &tables{boots: []store.Boot{tt.boot}}, opt: audit.Options{
			Receipts: true, Root: attestation.TestRoot(e.CA().Root()), Configs: []*config.Config{raw},
			Images: []attestation.Image{{PCRs: map[int][]byte{0: e.PCR0(), 16: pcr16[:]}}},
		}}
		if tt.ok {
			honest(t, w)
			continue
		}
		found(t, w, name, "boot "+tt.boot.ID.String()+": ")
	}
}

func TestPoliciesAreCheckedAgainstTheMeasuredConfig(t *testing.T) {
	w := of(t, oneBoot)
	other := *w.opt.Configs[0]
	other.Keyring = "else"
	w.opt.Configs = []*config.Config{&other}
	found(t, w, "none of the configs", "boot "+w.tables.boots[0].ID.String()+": its config is none of the wanted ones")
	w.opt.Configs = append(w.opt.Configs, of(t, oneBoot).opt.Configs...)
	honest(t, w)

	// A key whose stored policy is wider than the one that it was used under.
	for _, pool := range []string{"default", "open"} {
		for id, k := range w.tables.keys {
			e, err := sealed.DecodeEntry(k.Sealed)
			must(t, err)
			if k.Pool != pool {
				continue
			}
			e.Public.Policy = map[string]string{"default": "open", "open": "default"}[pool]
			k.Sealed = sealed.EncodeEntry(e)
			w.tables.keys[id] = k
		}
	}
	found(t, w, "two keys with their policies exchanged", "its receipt names another policy than its key")
}

func TestAResultOfNoReasonOrWithADoubledIDIsFound(t *testing.T) {
	w := of(t, oneBoot)
	id := batch(deniedImport(0), 0)
	w.tables.results[id] = record.EncodeResult(65, []record.Outcome{{Refusal: "\x1b[31m"}})
	found(t, w, "a reason that is none", "batch "+string(id)+": record 0: refused for no known reason")

	w = of(t, oneBoot)
	id = batch(signedImport(0), 1)
	rs := []record.Record{{ID: "same", Payload: []byte("a")}, {ID: "same", Payload: []byte("b")}}
	w.tables.payloads[id] = record.EncodePayload(rs)
	w.tables.edit(id, func(b *store.Batch) { b.PayloadRoot = receipt.PayloadRoot(b.Kind, rs) })
	found(t, w, "one id for two records", "batch "+string(id)+": record 1: its id stands twice in the batch")
}

// Fields that no signature covers can be wrong, and say so in no finding: they
// are the parent's own word.
func TestWhatOnlyTheParentSaysIsNotProved(t *testing.T) {
	w := of(t, oneBoot)
	want := honest(t, w)
	w.tables.edit(batch(signedImport(0), 0), func(b *store.Batch) {
		b.Owner, b.Used, b.UsedBefore, b.Attempts = "nobody", 9, 8, 3
		b.ClaimedAt, b.CommittedAt = b.ClaimedAt.Add(1), b.CommittedAt.Add(1)
	})
	if diff := cmp.Diff(want, honest(t, w)); diff != "" {
		t.Error(diff)
	}
}
