package export_test

import (
	"bytes"
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/parent/export"
	"github.com/keyhold/keyhold/parent/store"
)

const hello = "Hello World"

// The key with the scalar 1, its address, and the EIP-191 digest of hello, as
// the documentation of ethers prints them.
const (
	generator = "79be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798483ada7726a3c4655da4fbfc0e1108a8fd17b448a68554199c47d08ffb10d4b8"
	addressOf = "0x7E5F4552091A69125d5DfCb7b8C2659029395Bdf"
	eip191    = "a1de988600a42c4b4ab089b619297c17d53cffae5d5120d82d8a92d0bb3b78f2"
)

func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

// publicKey in the form that sealed keys have it.
func publicKey(a record.Algorithm) []byte {
	switch a {
	case record.Secp256k1:
		return unhex("04" + generator)
	case record.Ed25519:
		return ed25519Key(1)
	case record.P256:
		g := elliptic.P256().Params()
		return append(append([]byte{4}, g.Gx.FillBytes(make([]byte, 32))...), g.Gy.FillBytes(make([]byte, 32))...)
	case record.RSA2048:
		return bytes.Repeat([]byte{0x30}, 294) // as long as the PKIX DER of one
	}
	return nil
}

// world is an import "a" whose batches are signed with one key.
type world struct {
	*tables
	algorithm record.Algorithm
	keyID     record.KeyID
}

func newWorld(t *testing.T, a record.Algorithm) *world {
	t.Helper()
	w := &world{tables: newTables(), algorithm: a, keyID: sealed.KeyID(a, publicKey(a))}
	w.imports = []store.Import{{ID: "a", State: store.ImportDone, Pool: "main", Kind: record.Message}}
	e := sealed.Entry{
		Public: sealed.Public{
			Version: 1, Keyring: "test", Epoch: 1, KeyID: w.keyID, Algorithm: a, PublicKey: publicKey(a), Policy: "default",
		},
		Nonce: make([]byte, sealed.NonceLen), Ciphertext: make([]byte, 48),
	}
	if a == record.Secp256k1 {
		e.Public.Address = addressOf
	}
	w.keys[w.keyID] = store.Key{ID: w.keyID, Keyring: "test#1", Pool: "main", Sealed: sealed.EncodeEntry(&e)}
	return w
}

func (w *world) key() store.Key { return w.keys[w.keyID] }

func (w *world) keyed(change func(*store.Key)) {
	k := w.key()
	change(&k)
	w.keys[w.keyID] = k
}

func (w *world) public(change func(*sealed.Public)) {
	w.keyed(func(k *store.Key) {
		e, err := sealed.DecodeEntry(k.Sealed)
		if err != nil {
			panic(err)
		}
		change(&e.Public)
		k.Sealed = sealed.EncodeEntry(e)
	})
}

func (w *world) id(n int) record.BatchID { return record.MakeBatchID("a", n) }

func (w *world) edit(n int, change func(*store.Batch)) {
	b := w.batches[w.id(n)]
	change(&b)
	w.batches[w.id(n)] = b
}

// signature of the first record; secp256k1 ends with v.
func (w *world) signature() []byte {
	sig := bytes.Repeat([]byte{0xab}, w.algorithm.SignatureLen())
	if w.algorithm == record.Secp256k1 {
		sig[64] = 28
	}
	return sig
}

// signed adds batch n: hello without an id, and one with. Nil: both are signed.
func (w *world) signed(n int, out []record.Outcome) {
	ref := store.ReceiptRef{BootID: record.BootID{0xb0}, Lane: 3, Seq: uint64(n) + 1}
	at := time.Date(2026, 11, 21, 1, 2, 3, 4, time.FixedZone("", 3600))
	b := store.Batch{
		ID: w.id(n), ImportID: "a", State: record.Signed, Pool: "main", Kind: record.Message, KeyID: w.keyID,
		Fence: 2, KeyFence: 7, Owner: "parent-1", BootID: ref.BootID, Attempts: 1, Used: 12, UsedBefore: 9,
		History:   []store.Attempt{{Owner: "parent-0", KeyFence: 6, End: "lost"}, {Owner: "parent-1", KeyFence: 7, End: "signed"}},
		ClaimedAt: at, CommittedAt: at.Add(time.Second - 4), Receipt: ref,
	}
	if out == nil {
		out = []record.Outcome{{Signature: w.signature()}, {Signature: w.signature()}}
	}
	for _, o := range out {
		if o.Refusal != "" {
			b.Refused++
		}
	}
	w.put(b, []record.Record{{Payload: []byte(hello)}, {ID: "mine", Payload: []byte{0xff, 0xfe}}})
	w.results[b.ID] = record.EncodeResult(w.algorithm.SignatureLen(), out)
	w.receipts[ref] = []byte("signed receipt")
	w.imports[0].Batches = n + 1
}

func (w *world) recordLines(t *testing.T) (string, export.Counts) {
	t.Helper()
	var b bytes.Buffer
	n, err := export.Records(t.Context(), w, w.imports, &b)
	must(t, err)
	return b.String(), n
}

// quoted is a JSON string, or null for nothing.
func quoted(s string) string {
	if s == "" {
		return "null"
	}
	return `"` + s + `"`
}

func TestASignedRecordsLineIsThisForEachAlgorithm(t *testing.T) {
	prefixed := sha256.Sum256([]byte("\x19Keyhold Signed Message:\n11" + hello))
	for a, want := range map[record.Algorithm]struct{ public, address, digest, signature string }{
		record.Secp256k1: {"04" + generator, addressOf, eip191, strings.Repeat("ab", 64) + "1c"},
		record.Ed25519:   {hex.EncodeToString(ed25519Key(1)), "", "", strings.Repeat("ab", 64)},
		record.P256: {
			"046b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c2964fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5",
			"", hex.EncodeToString(prefixed[:]), strings.Repeat("ab", 64),
		},
		record.RSA2048: {strings.Repeat("30", 294), "", hex.EncodeToString(prefixed[:]), strings.Repeat("ab", 256)},
	} {
		w := newWorld(t, a)
		w.signed(0, nil)
		got, n := w.recordLines(t)
		first, _, _ := strings.Cut(got, "\n")
		line := fmt.Sprintf(`{"record_id":"a-b0000000.0","kind":"message","payload":"SGVsbG8gV29ybGQ=","algorithm":%q,"key_id":"%x",`+
			`"public_key":%q,"address":%s,"digest":%s,"signature":%q,"signed_transaction":null,`+
			`"batch_id":"a-b0000000","index":0,"state":"SIGNED","refusal":null}`,
			a, w.keyID[:], want.public, quoted(want.address), quoted(want.digest), want.signature)
		if diff := cmp.Diff(line, first); diff != "" {
			t.Errorf("%s: %s", a, diff)
		}
		if diff := cmp.Diff(export.Counts{Batches: 1, Records: 2, Signed: 2}, n); diff != "" {
			t.Errorf("%s: %s", a, diff)
		}
	}
}

func TestARefusedRecordsLineHasItsReasonAndNoSignature(t *testing.T) {
	w := newWorld(t, record.Secp256k1)
	w.signed(0, []record.Outcome{{Signature: w.signature()}, {Refusal: "digest_length"}})
	got, n := w.recordLines(t)
	second := strings.Split(got, "\n")[1]
	line := fmt.Sprintf(`{"record_id":"mine","kind":"message","payload":%q,"algorithm":"secp256k1","key_id":"%x",`+
		`"public_key":"04%s","address":%q,"digest":null,"signature":null,"signed_transaction":null,`+
		`"batch_id":"a-b0000000","index":1,"state":"REFUSED","refusal":"digest_length"}`,
		base64.StdEncoding.EncodeToString([]byte{0xff, 0xfe}), w.keyID[:], generator, addressOf)
	if diff := cmp.Diff(line, second); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(export.Counts{Batches: 1, Records: 2, Signed: 1, Refused: 1}, n); diff != "" {
		t.Error(diff)
	}
}

func TestALineOfARecordThatIsNotSignedHasNullsInstead(t *testing.T) {
	for _, state := range []record.State{record.Ready, record.Claimed, record.Quarantined} {
		for _, keyed := range []bool{false, true} {
			w := newWorld(t, record.Secp256k1)
			w.signed(0, nil)
			w.edit(0, func(b *store.Batch) {
				b.State, b.Receipt = state, store.ReceiptRef{}
				if !keyed {
					b.KeyID = record.KeyID{}
				}
			})
			got, n := w.recordLines(t)
			key := `"algorithm":null,"key_id":null,"public_key":null,"address":null`
			if keyed {
				key = fmt.Sprintf(`"algorithm":"secp256k1","key_id":"%x","public_key":"04%s","address":%q`, w.keyID[:], generator, addressOf)
			}
			line := fmt.Sprintf(`{"record_id":"a-b0000000.0","kind":"message","payload":"SGVsbG8gV29ybGQ=",%s,"digest":null,"signature":null,`+
				`"signed_transaction":null,"batch_id":"a-b0000000","index":0,"state":%q,"refusal":null}`, key, state)
			first, _, _ := strings.Cut(got, "\n")
			if diff := cmp.Diff(line, first); diff != "" {
				t.Errorf("%s: %s", state, diff)
			}
			if diff := cmp.Diff(export.Counts{Batches: 1, Records: 2, Other: 2}, n); diff != "" {
				t.Errorf("%s: %s", state, diff)
			}
		}
	}
}

func TestRecordsOfOtherKindsSayWhatWasSigned(t *testing.T) {
	w := newWorld(t, record.P256)
	w.imports[0].Kind = record.Raw
	w.signed(0, nil)
	w.edit(0, func(b *store.Batch) { b.Kind = record.Raw })
	got, _ := w.recordLines(t)
	raw := sha256.Sum256([]byte(hello))
	if m := lines(t, []byte(got))[0]; m["kind"] != "raw" || m["digest"] != hex.EncodeToString(raw[:]) {
		t.Errorf("%v", m)
	}
}

func TestABatchLineIsThis(t *testing.T) {
	w := newWorld(t, record.Ed25519)
	w.signed(0, nil)
	w.signed(1, nil)
	w.edit(1, func(b *store.Batch) {
		*b = store.Batch{ID: b.ID, ImportID: "a", State: record.Ready, Pool: "main", Kind: record.Message, Count: 2}
	})
	w.signed(2, nil)
	w.edit(2, func(b *store.Batch) {
		b.State, b.Receipt, b.CommittedAt = record.Claimed, store.ReceiptRef{}, time.Time{}
		b.History = b.History[1:]
		b.History[0].End = ""
	})
	var b bytes.Buffer
	n, err := export.Batches(t.Context(), w, w.imports, nil, &b)
	must(t, err)
	boot := "b0" + strings.Repeat("00", 31)
	want := fmt.Sprintf(`{"batch_id":"a-b0000000","import_id":"a","state":"SIGNED","key_id":"%x","fence":2,"key_fence":7,"used":12,"used_before":9,`+
		`"attempts":[{"owner":"parent-0","key_fence":6,"end":"lost"},{"owner":"parent-1","key_fence":7,"end":"signed"}],"record_count":2,`+
		`"owner":"parent-1","boot_id":%q,"claimed_at":"2026-11-21T00:02:03.000000004Z","committed_at":"2026-11-21T00:02:04.000000000Z",`+
		`"receipt":{"boot_id":%q,"lane":3,"seq":1,"signed":%q}}`+"\n",
		w.keyID[:], boot, boot, base64.StdEncoding.EncodeToString([]byte("signed receipt"))) +
		`{"batch_id":"a-b0000001","import_id":"a","state":"READY","key_id":null,"fence":0,"key_fence":0,"used":0,"used_before":0,` +
		`"attempts":[],"record_count":2,"owner":null,"boot_id":null,"claimed_at":null,"committed_at":null,"receipt":null}` + "\n" +
		fmt.Sprintf(`{"batch_id":"a-b0000002","import_id":"a","state":"CLAIMED","key_id":"%x","fence":2,"key_fence":7,"used":12,"used_before":9,`+
			`"attempts":[{"owner":"parent-1","key_fence":7,"end":""}],"record_count":2,"owner":"parent-1","boot_id":%q,`+
			`"claimed_at":"2026-11-21T00:02:03.000000004Z","committed_at":null,"receipt":null}`+"\n", w.keyID[:], boot)
	if diff := cmp.Diff(want, b.String()); diff != "" || n != 3 {
		t.Errorf("%d lines: %s", n, diff)
	}
}

func TestBatchesCanBeLeftOut(t *testing.T) {
	w := newWorld(t, record.Ed25519)
	w.signed(0, nil)
	w.signed(1, nil)
	var b bytes.Buffer
	n, err := export.Batches(t.Context(), w, w.imports, func(b *store.Batch) bool { return b.ID == w.id(1) }, &b)
	must(t, err)
	if m := lines(t, b.Bytes()); n != 1 || len(m) != 1 || m[0]["batch_id"] != "a-b0000001" {
		t.Errorf("%d: %v", n, m)
	}
}

// Tools read these names; a new field needs a migration like a lost one.
func TestTheFieldsOfALineAreTheFixedOnes(t *testing.T) {
	w := newWorld(t, record.Ed25519)
	w.signed(0, nil)
	got, _ := w.recordLines(t)
	want := []string{
		"address", "algorithm", "batch_id", "digest", "index", "key_id", "kind", "payload", "public_key", "record_id", "refusal",
		"signature", "signed_transaction", "state",
	}
	if diff := cmp.Diff(want, slices.Sorted(maps.Keys(lines(t, []byte(got))[0]))); diff != "" {
		t.Error(diff)
	}
	var b bytes.Buffer
	_, err := export.Batches(t.Context(), w, w.imports, nil, &b)
	must(t, err)
	want = []string{
		"attempts", "batch_id", "boot_id", "claimed_at", "committed_at", "fence", "import_id", "key_fence", "key_id", "owner", "receipt",
		"record_count", "state", "used", "used_before",
	}
	if diff := cmp.Diff(want, slices.Sorted(maps.Keys(lines(t, b.Bytes())[0]))); diff != "" {
		t.Error(diff)
	}
}
