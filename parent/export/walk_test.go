package export_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/parent/export"
	"github.com/keyhold/keyhold/parent/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// tables is a store of literals.
type tables struct {
	imports  []store.Import
	batches  map[record.BatchID]store.Batch
	payloads map[record.BatchID][]byte
	results  map[record.BatchID][]byte
	keys     map[record.KeyID]store.Key
	receipts map[store.ReceiptRef][]byte

	before func(ctx context.Context, call string) error // of each call; may be nil
	reads  atomic.Int64                                 // of control items
}

func newTables() *tables {
	return &tables{
		batches: map[record.BatchID]store.Batch{}, payloads: map[record.BatchID][]byte{}, results: map[record.BatchID][]byte{},
		keys: map[record.KeyID]store.Key{}, receipts: map[store.ReceiptRef][]byte{},
	}
}

func get[K comparable, V any](ctx context.Context, s *tables, call string, m map[K]V, k K) (v V, err error) {
	if s.before != nil {
		if err := s.before(ctx, call); err != nil {
			return v, err
		}
	}
	v, ok := m[k]
	if !ok {
		return v, store.ErrNotFound
	}
	return v, nil
}

func (s *tables) Imports(ctx context.Context) ([]store.Import, error) {
	_, err := get(ctx, s, "Imports", map[int]int{0: 0}, 0)
	return s.imports, err
}

func (s *tables) Import(_ context.Context, id record.ImportID) (store.Import, error) {
	i := slices.IndexFunc(s.imports, func(im store.Import) bool { return im.ID == id })
	if i < 0 {
		return store.Import{}, store.ErrNotFound
	}
	return s.imports[i], nil
}

func (s *tables) Batch(ctx context.Context, id record.BatchID) (store.Batch, error) {
	s.reads.Add(1)
	return get(ctx, s, "Batch", s.batches, id)
}

func (s *tables) Payload(ctx context.Context, id record.BatchID) ([]byte, error) {
	return get(ctx, s, "Payload", s.payloads, id)
}

func (s *tables) Result(ctx context.Context, id record.BatchID) ([]byte, error) {
	return get(ctx, s, "Result", s.results, id)
}

func (s *tables) Key(ctx context.Context, id record.KeyID) (store.Key, error) {
	return get(ctx, s, "Key", s.keys, id)
}

func (s *tables) Receipt(ctx context.Context, ref store.ReceiptRef) (store.Receipt, error) {
	b, err := get(ctx, s, "Receipt", s.receipts, ref)
	return store.Receipt{Ref: ref, Signed: b}, err
}

// ready puts batches of two records, with the numbers given, into an import.
func (s *tables) ready(im store.Import, numbers ...int) {
	im.Pool, im.Kind = "main", record.Message
	s.imports = append(s.imports, im)
	for _, n := range numbers {
		s.put(store.Batch{ID: record.MakeBatchID(im.ID, n), ImportID: im.ID, State: record.Ready, Pool: "main", Kind: record.Message},
			[]record.Record{{Payload: []byte("a")}, {Payload: []byte("b")}})
	}
}

func (s *tables) put(b store.Batch, rs []record.Record) {
	b.Count, b.PayloadRoot = len(rs), receipt.PayloadRoot(b.Kind, rs)
	s.batches[b.ID] = b
	s.payloads[b.ID] = record.EncodePayload(rs)
}

func numbers(from, to int) (out []int) {
	for n := from; n < to; n++ {
		out = append(out, n)
	}
	return out
}

// walked returns the numbers of the batches that a walk comes to.
func walked(t *testing.T, s *tables) (out []int) {
	t.Helper()
	must(t, export.Walk(t.Context(), s, s.imports, func(it export.Item) error {
		_, n, err := it.Batch.ID.Split()
		out = append(out, n)
		return errors.Join(err, it.Problem)
	}))
	return out
}

func TestBatchesComeInOrderWhateverTheStoresPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTables()
		s.ready(store.Import{ID: "a", State: store.ImportDone, Batches: 50}, numbers(0, 50)...)
		s.ready(store.Import{ID: "b", State: store.ImportDone, Batches: 3}, numbers(0, 3)...)
		var calls atomic.Int64
		s.before = func(context.Context, string) error {
			<-time.After(time.Duration(calls.Add(7)%13) * time.Millisecond)
			return nil
		}
		if diff := cmp.Diff(append(numbers(0, 50), numbers(0, 3)...), walked(t, s)); diff != "" {
			t.Error(diff)
		}
	})
}

func TestSomeBatchesAreReadAheadAndNoMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTables()
		s.ready(store.Import{ID: "a", State: store.ImportDone, Batches: 100}, numbers(0, 100)...)
		var inside, handled int64
		must(t, export.Walk(t.Context(), s, s.imports, func(export.Item) error {
			if inside++; inside != 1 {
				t.Error("called twice at once")
			}
			handled++
			synctest.Wait() // until the walk has read all that it will
			if ahead := s.reads.Load() - handled; handled == 1 && ahead < 8 || ahead > 20 {
				t.Errorf("%d batches read ahead of number %d", ahead, handled)
			}
			inside--
			return nil
		}))
		if handled != 100 {
			t.Errorf("%d batches", handled)
		}
	})
}

func TestAnUnfinishedImportEndsAfterAGap(t *testing.T) {
	for name, tt := range map[string]struct {
		im   store.Import
		have []int
		want []int
	}{
		"open, empty":             {store.Import{State: store.ImportOpen, Records: 1000, BatchSize: 2}, nil, nil},
		"open, with gaps":         {store.Import{State: store.ImportOpen, Records: 1000, BatchSize: 2}, []int{0, 3, 19}, []int{0, 3, 19}},
		"open, first late":        {store.Import{State: store.ImportOpen, Records: 1000, BatchSize: 2}, []int{15, 31}, []int{15, 31}},
		"open, the longest gap":   {store.Import{State: store.ImportOpen, Records: 1000, BatchSize: 2}, []int{16}, []int{16}},
		"open, behind its end":    {store.Import{State: store.ImportOpen, Records: 1000, BatchSize: 2}, []int{0, 18}, []int{0}},
		"aborted, empty":          {store.Import{State: store.ImportAborted, Records: 1000, BatchSize: 2}, nil, nil},
		"aborted, far apart":      {store.Import{State: store.ImportAborted, Records: 1000, BatchSize: 2}, []int{7, 499}, []int{7, 499}},
		"aborted, an odd record":  {store.Import{State: store.ImportAborted, Records: 1001, BatchSize: 2}, []int{500}, []int{500}},
		"aborted, behind its end": {store.Import{State: store.ImportAborted, Records: 100, BatchSize: 2}, []int{7, 99}, []int{7}},
		// Batches of two where ten were wanted: payloads were long.
		"aborted, short batches": {store.Import{State: store.ImportAborted, Records: 100, BatchSize: 10}, []int{0, 5, 49}, []int{0, 5, 49}},
	} {
		s := newTables()
		tt.im.ID = "a"
		s.ready(tt.im, tt.have...)
		if diff := cmp.Diff(tt.want, walked(t, s)); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

func TestAMissingBatchOfADoneImportIsAnError(t *testing.T) {
	s := newTables()
	s.ready(store.Import{ID: "a", State: store.ImportDone, Batches: 4}, 0, 1, 3)
	n := 0
	err := export.Walk(t.Context(), s, s.imports, func(export.Item) error { n++; return nil })
	if !errors.Is(err, store.ErrNotFound) || !strings.Contains(err.Error(), "batch a-b0000002 is missing") || n != 2 {
		t.Errorf("after %d batches: %v", n, err)
	}
	var missing []record.BatchID
	n = 0
	must(t, export.WalkOver(t.Context(), s, s.imports,
		func(id record.BatchID) error { missing = append(missing, id); return nil },
		func(export.Item) error { n++; return nil }))
	if diff := cmp.Diff([]record.BatchID{"a-b0000002"}, missing); diff != "" || n != 3 {
		t.Errorf("%d batches: %s", n, diff)
	}
}

func TestAFailingStoreIsNamedAndNotTakenForAMissingBatch(t *testing.T) {
	away := errors.New("the store is away")
	for _, call := range []string{"Batch", "Payload", "Result", "Key", "Receipt"} {
		w := newWorld(t, record.Ed25519)
		var n atomic.Int64
		w.before = func(_ context.Context, c string) error {
			if c == call && n.Add(1) > 1 { // the first batch is there
				return away
			}
			return nil
		}
		for i := range 40 {
			w.signed(i, nil)
		}
		handled := 0
		err := export.Walk(t.Context(), w, w.imports, func(it export.Item) error { handled++; return it.Problem })
		// The key of the first batch is asked for once and kept, if no other asks meanwhile.
		if call == "Key" && err == nil && n.Load() == 1 {
			continue
		}
		if !errors.Is(err, away) || errors.Is(err, store.ErrNotFound) || handled > 39 {
			t.Errorf("%s: after %d batches: %v", call, handled, err)
		}
	}
}

func TestAWalkEndsWithItsContextAndItsCaller(t *testing.T) {
	s := newTables()
	s.ready(store.Import{ID: "a", State: store.ImportDone, Batches: 100}, numbers(0, 100)...)
	enough := errors.New("enough")
	n := 0
	err := export.Walk(t.Context(), s, s.imports, func(export.Item) error {
		if n++; n == 3 {
			return enough
		}
		return nil
	})
	if !errors.Is(err, enough) || n != 3 {
		t.Errorf("after %d batches: %v", n, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	s.before = func(ctx context.Context, _ string) error { return ctx.Err() }
	err = export.Walk(ctx, s, s.imports, func(export.Item) error { cancel(); return nil })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestImportsAreSelected(t *testing.T) {
	s := newTables()
	s.ready(store.Import{ID: "a"})
	s.ready(store.Import{ID: "b"})
	all, err := export.Selected(t.Context(), s, nil)
	must(t, err)
	one, err := export.Selected(t.Context(), s, []record.ImportID{"b"})
	must(t, err)
	if len(all) != 2 || len(one) != 1 || one[0].ID != "b" {
		t.Errorf("%v, %v", all, one)
	}
	if _, err := export.Selected(t.Context(), s, []record.ImportID{"c"}); !errors.Is(err, store.ErrNotFound) {
		t.Error(err)
	}
	s.before = func(context.Context, string) error { return store.ErrNoTables }
	if _, err := export.Selected(t.Context(), s, nil); !errors.Is(err, store.ErrNoTables) {
		t.Error(err)
	}
}

// A walk of many batches holds only a few of them.
func TestTheMemoryOfAWalkDoesNotGrow(t *testing.T) {
	w := newWorld(t, record.Ed25519)
	var live atomic.Int64 // batches between their read and their end
	const n = 2000
	for i := range n {
		w.signed(i, nil)
	}
	w.before = func(_ context.Context, call string) error {
		if call == "Batch" && live.Add(1) > 20 {
			t.Error("more than 20 batches at a time")
		}
		return nil
	}
	must(t, export.Walk(t.Context(), w, w.imports, func(export.Item) error { live.Add(-1); return nil }))
}

func TestWhatIsWrongWithABatchIsItsProblem(t *testing.T) {
	other := newWorld(t, record.Secp256k1)
	for name, tt := range map[string]struct {
		spoil func(w *world)
		want  string
	}{
		"no payload":            {func(w *world) { delete(w.payloads, w.id(0)) }, "the payload of batch a-b0000000 is missing"},
		"no result":             {func(w *world) { delete(w.results, w.id(0)) }, "the result of batch a-b0000000 is missing"},
		"no key":                {func(w *world) { clear(w.keys) }, "the key that signed batch a-b0000000 is missing"},
		"no receipt":            {func(w *world) { clear(w.receipts) }, "the receipt of batch a-b0000000 is missing"},
		"a payload of no form":  {func(w *world) { w.payloads[w.id(0)] = []byte("\x1b[2J") }, "the payload of batch a-b0000000 is malformed"},
		"a result of no form":   {func(w *world) { w.results[w.id(0)] = []byte("\x1b[2J") }, "the result of batch a-b0000000 is malformed"},
		"a result too long":     {func(w *world) { w.edit(0, func(b *store.Batch) { b.Count = 1 }) }, "is malformed"},
		"a result of RSA":       {func(w *world) { w.results[w.id(0)] = record.EncodeResult(256, outcomes(256, 2)) }, "is not of its key's algorithm"},
		"a key of no form":      {func(w *world) { w.keyed(func(k *store.Key) { k.Sealed = []byte{0xa0} }) }, "the key of batch a-b0000000: malformed, or the sealed key of another"},
		"another key":           {func(w *world) { w.keyed(func(k *store.Key) { k.Sealed = other.key().Sealed }) }, "the key of batch a-b0000000: malformed, or the sealed key of another"},
		"a key of another name": {func(w *world) { w.keyed(func(k *store.Key) { *k = other.key() }) }, "the key of batch a-b0000000: malformed, or the sealed key of another"},
		"of another keyring":    {func(w *world) { w.keyed(func(k *store.Key) { k.Keyring = "else#1" }) }, "the key of batch a-b0000000: malformed, or the sealed key of another"},
		"another address": {func(w *world) {
			w.public(func(p *sealed.Public) { p.Address = "0x000000000000000000000000000000000000dEaD" })
		}, "the key of batch a-b0000000: malformed, or the sealed key of another"},
		"another import":         {func(w *world) { w.edit(0, func(b *store.Batch) { b.ImportID = "b" }) }, "batch a-b0000000 is not as its import asked for it"},
		"another id":             {func(w *world) { w.edit(0, func(b *store.Batch) { b.ID = "b-b0000000" }) }, "batch a-b0000000 is not as its import asked for it"},
		"a key it was not asked": {func(w *world) { w.imports[0].KeyID = record.KeyID{9} }, "batch a-b0000000 is not as its import asked for it"},
		// A refused count that lies must not hide that a key is missing.
		"all refused, it says": {func(w *world) { clear(w.keys); w.edit(0, func(b *store.Batch) { b.Refused = 2 }) }, "the key that signed batch a-b0000000 is missing"},
	} {
		w := newWorld(t, record.Ed25519)
		w.signed(0, nil)
		tt.spoil(w)
		var problem error
		must(t, export.Walk(t.Context(), w, w.imports, func(it export.Item) error { problem = it.Problem; return nil }))
		if problem == nil || strings.Contains(problem.Error(), "\n") || !strings.Contains(problem.Error(), tt.want) || strings.Contains(problem.Error(), "\x1b") {
			t.Errorf("%s: %v", name, problem)
		}
		if _, err := export.Records(t.Context(), w, w.imports, &bytes.Buffer{}); err == nil {
			t.Errorf("%s: the records were written", name)
		}
	}
}

func TestALostKeyIsNoProblemOfWhatItDidNotSign(t *testing.T) {
	w := newWorld(t, record.Ed25519)
	w.signed(0, []record.Outcome{{Refusal: "key_unavailable"}, {Refusal: "key_unavailable"}})
	w.signed(1, nil)
	w.edit(1, func(b *store.Batch) { b.State = record.Quarantined })
	clear(w.keys)
	must(t, export.Walk(t.Context(), w, w.imports, func(it export.Item) error {
		if it.Key != nil {
			t.Error("a key from nowhere")
		}
		return it.Problem
	}))
}

func outcomes(sigLen, n int) []record.Outcome {
	out := make([]record.Outcome, n)
	for i := range out {
		out[i].Signature = bytes.Repeat([]byte{byte(i + 1)}, sigLen)
	}
	return out
}

func TestAWriterThatFailsEndsTheExport(t *testing.T) {
	w := newWorld(t, record.Ed25519)
	w.signed(0, nil)
	full := errors.New("full")
	if _, err := export.Records(t.Context(), w, w.imports, failing{full}); !errors.Is(err, full) {
		t.Error(err)
	}
	if _, err := export.Batches(t.Context(), w, w.imports, nil, failing{full}); !errors.Is(err, full) {
		t.Error(err)
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

func ed25519Key(seed byte) ed25519.PublicKey {
	k, ok := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, 32)).Public().(ed25519.PublicKey)
	if !ok {
		panic("no public key")
	}
	return k
}

// lines parses JSON Lines into maps, so that every key and null is seen.
func lines(t *testing.T, b []byte) (out []map[string]any) {
	t.Helper()
	for _, line := range bytes.Split(bytes.TrimSuffix(b, []byte("\n")), []byte("\n")) {
		var m map[string]any
		if err := json.Unmarshal(line, &m); err != nil {
			t.Fatal(fmt.Errorf("line %s: %w", line, err))
		}
		out = append(out, m)
	}
	return out
}

func TestControlsReadNothingButControlItems(t *testing.T) {
	s := newTables()
	s.ready(store.Import{ID: "a", State: store.ImportDone, Batches: 40}, numbers(0, 40)...)
	s.before = func(_ context.Context, call string) error {
		if call != "Batch" {
			return fmt.Errorf("%s was called", call)
		}
		return nil
	}
	var got []int
	must(t, export.Controls(t.Context(), s, s.imports, func(b *store.Batch) error {
		_, n, err := b.ID.Split()
		got = append(got, n)
		return err
	}))
	if diff := cmp.Diff(numbers(0, 40), got); diff != "" {
		t.Error(diff)
	}
}
