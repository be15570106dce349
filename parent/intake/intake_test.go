package intake_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/intake"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/memory"
)

func options(t *testing.T, id string, size int) intake.Options {
	t.Helper()
	return intake.Options{
		ImportID: record.ImportID(id), Pool: "main", Kind: record.Message, BatchSize: size, SigLen: 65,
		SpoolDir: t.TempDir(), Now: func() time.Time { return time.Unix(1_700_000_000, 0) },
	}
}

func run(t *testing.T, s intake.Store, input string, o intake.Options) intake.Summary {
	t.Helper()
	sum, err := intake.Run(t.Context(), s, strings.NewReader(input), o)
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// records returns what all batches of an import hold, in order.
func records(t *testing.T, s *memory.Store, id record.ImportID) (all []string) {
	t.Helper()
	for n := 0; ; n++ {
		b, err := s.Batch(t.Context(), record.MakeBatchID(id, n))
		if errors.Is(err, store.ErrNotFound) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		raw, err := s.Payload(t.Context(), b.ID)
		if err != nil {
			t.Fatal(err)
		}
		rs, err := record.DecodePayload(raw)
		if err != nil || len(rs) != b.Count {
			t.Fatalf("batch %s: %d records, count %d, %v", b.ID, len(rs), b.Count, err)
		}
		for i, r := range rs {
			all = append(all, r.ID+"="+string(r.Payload))
			if r.ID == "" {
				continue
			}
			ref, err := s.Record(t.Context(), r.ID)
			if err != nil || ref.BatchID != b.ID || ref.Index != i {
				t.Errorf("record %s is said to be at %s.%d (%v), but is at %s.%d", r.ID, ref.BatchID, ref.Index, err, b.ID, i)
			}
		}
	}
}

func TestRecordsAreCutIntoBatchesInOrder(t *testing.T) {
	t.Parallel()
	s := memory.New()
	var in strings.Builder
	var want []string
	for i := range 23 {
		fmt.Fprintf(&in, "{\"text\":\"%d\"}\n\n", i)
		want = append(want, fmt.Sprintf("=%d", i))
	}
	var last int
	o := options(t, "", 10)
	o.Progress = func(done, total int) { last = done*1000 + total }
	sum := run(t, s, in.String(), o)
	if sum.Import.Batches != 3 || sum.Import.Records != 23 || sum.Import.State != store.ImportDone || last != 23023 {
		t.Errorf("got %+v, progress %d", sum.Import, last)
	}
	if d := cmp.Diff(want, records(t, s, sum.Import.ID)); d != "" {
		t.Error(d)
	}
}

func TestTheSameInputAgainDoesNothing(t *testing.T) {
	t.Parallel()
	s := memory.New()
	first := run(t, s, `{"text":"a"}`, options(t, "", 10))
	again := run(t, s, `{ "text" : "a" }`, options(t, "", 10))
	if first.Already || !again.Already || first.Import.ID != again.Import.ID {
		t.Errorf("first %+v, again %+v", first, again)
	}
	_, err := intake.Run(t.Context(), s, strings.NewReader(`{"text":"a"}`), options(t, "", 11))
	if !errors.Is(err, refusal.ImportConflict) {
		t.Errorf("another batch size: %v", err)
	}
}

func TestABatchEndsBeforeItsSegmentsGrowTooLong(t *testing.T) {
	t.Parallel()
	s := memory.New()
	line := `{"payload":"` + base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{7}, record.MaxPayloadLen)) + "\"}\n"
	sum := run(t, s, strings.Repeat(line, 12), options(t, "big", 500))
	if got := len(records(t, s, "big")); got != 12 || sum.Import.Batches != 3 {
		t.Errorf("%d records in %d batches", got, sum.Import.Batches)
	}
	o := options(t, "rsa", record.MaxBatchSize)
	o.SigLen = 256
	sum = run(t, s, strings.Repeat("{\"text\":\"x\"}\n", 3000), o)
	b, err := s.Batch(t.Context(), record.MakeBatchID("rsa", 0))
	if err != nil || b.Count*256 > record.MaxSegmentLen || sum.Import.Batches != 3 {
		t.Errorf("%d records in the first of %d batches, %v", b.Count, sum.Import.Batches, err)
	}
}

func TestABrokenLineIsNamedAndNothingIsImported(t *testing.T) {
	t.Parallel()
	s := memory.New()
	_, err := intake.Run(t.Context(), s, strings.NewReader("{\"text\":\"a\"}\n{\"text\":5}\n"), options(t, "x", 10))
	if !errors.Is(err, refusal.ImportLine) || !strings.Contains(err.Error(), "line 2") {
		t.Errorf("got %v", err)
	}
	if all, err := s.Imports(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("imports: %v, %v", all, err)
	}
}

func TestKeepGoingSendsBrokenLinesToTheRejects(t *testing.T) {
	t.Parallel()
	s := memory.New()
	var rejects bytes.Buffer
	o := options(t, "x", 10)
	o.Rejects = &rejects
	input := "{\"text\":\"a\"}\n{\"text\":5}\n" + `{"text":"` + strings.Repeat("y", intake.MaxLine) + "\"}\n" +
		"{\"id\":\"k\",\"text\":\"1\"}\n{\"id\":\"k\",\"text\":\"2\"}\n{\"text\":\"b\"}"
	sum := run(t, s, input, o)
	if sum.Rejects != 3 || sum.Import.Records != 3 {
		t.Errorf("got %+v", sum)
	}
	if d := cmp.Diff([]string{"=a", "k=1", "=b"}, records(t, s, "x")); d != "" {
		t.Error(d)
	}
	for _, want := range []string{`"line":2,"code":"import_line"`, `"line":3,"code":"import_line"`, `"line":5,"code":"record_conflict"`, `"input":"{\"text\":5}"`} {
		if !strings.Contains(rejects.String(), want) {
			t.Errorf("rejects lack %s:\n%.300s", want, rejects.String())
		}
	}
}

func TestTheSameIDTwice(t *testing.T) {
	t.Parallel()
	a, b := "{\"id\":\"a\",\"text\":\"1\"}\n", "{\"id\":\"b\",\"text\":\"2\"}\n"
	other := "{\"id\":\"a\",\"text\":\"other\"}\n"
	t.Run("in one file is signed once", func(t *testing.T) {
		t.Parallel()
		s := memory.New()
		sum := run(t, s, a+b+a, options(t, "x", 10))
		if d := cmp.Diff([]string{"a=1", "b=2"}, records(t, s, "x")); d != "" || sum.Import.Duplicates != 1 || sum.Import.Records != 3 {
			t.Errorf("%s %+v", d, sum.Import)
		}
	})
	t.Run("in one file with another payload is refused with its line", func(t *testing.T) {
		t.Parallel()
		_, err := intake.Run(t.Context(), memory.New(), strings.NewReader(a+b+other), options(t, "x", 10))
		if !errors.Is(err, refusal.RecordConflict) || !strings.Contains(err.Error(), "line 3") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("in two files is signed once, and batches are filled up", func(t *testing.T) {
		t.Parallel()
		s := memory.New()
		run(t, s, a, options(t, "x", 10))
		sum := run(t, s, "{\"text\":\"p\"}\n"+a+b+"{\"text\":\"q\"}\n", options(t, "y", 2))
		if d := cmp.Diff([]string{"=p", "b=2", "=q"}, records(t, s, "y")); d != "" || sum.Import.Duplicates != 1 || sum.Import.Batches != 2 {
			t.Errorf("%s %+v", d, sum.Import)
		}
	})
	t.Run("in two files with another payload is refused before anything is ready", func(t *testing.T) {
		t.Parallel()
		s := memory.New()
		run(t, s, a, options(t, "x", 10))
		_, err := intake.Run(t.Context(), s, strings.NewReader(b+b+"{\"text\":\"p\"}\n"+other), options(t, "y", 1))
		if !errors.Is(err, refusal.RecordConflict) {
			t.Errorf("got %v", err)
		}
		if got := records(t, s, "y"); got != nil {
			t.Errorf("ready: %v", got)
		}
	})
}

// stopAfter fails the import at its n-th write.
type stopAfter struct {
	*memory.Store
	left int
}

var errStopped = errors.New("stopped")

func (s *stopAfter) step() error {
	if s.left--; s.left < 0 {
		return errStopped
	}
	return nil
}

func (s *stopAfter) ReserveRecord(ctx context.Context, r store.RecordRef, over *store.RecordRef) (store.RecordRef, error) {
	if err := s.step(); err != nil {
		return store.RecordRef{}, err
	}
	return s.Store.ReserveRecord(ctx, r, over)
}

func (s *stopAfter) PutPayload(ctx context.Context, id record.BatchID, p []byte) ([]byte, error) {
	if err := s.step(); err != nil {
		return nil, err
	}
	return s.Store.PutPayload(ctx, id, p)
}

func (s *stopAfter) PutBatch(ctx context.Context, b store.Batch) error {
	if err := s.step(); err != nil {
		return err
	}
	return s.Store.PutBatch(ctx, b)
}

func (s *stopAfter) FinishImport(ctx context.Context, i store.Import) error {
	if err := s.step(); err != nil {
		return err
	}
	return s.Store.FinishImport(ctx, i)
}

func TestAnImportThatStoppedAnywhereIsFinishedByTheSameInput(t *testing.T) {
	t.Parallel()
	var in strings.Builder
	for i := range 9 {
		fmt.Fprintf(&in, "{\"id\":\"r%d\",\"text\":\"%d\"}\n{\"text\":\"anonymous %d\"}\n", i, i, i)
	}
	clean := memory.New()
	run(t, clean, in.String(), options(t, "x", 4))
	want := records(t, clean, "x")
	for stop := 0; ; stop++ {
		s := &stopAfter{memory.New(), stop}
		_, err := intake.Run(t.Context(), s, strings.NewReader(in.String()), options(t, "x", 4))
		if err == nil {
			if stop < 15 {
				t.Fatalf("only %d steps", stop)
			}
			return
		}
		if !errors.Is(err, errStopped) {
			t.Fatal(err)
		}
		s.left = 1 << 30
		run(t, s, in.String(), options(t, "x", 4))
		if d := cmp.Diff(want, records(t, s.Store, "x")); d != "" {
			t.Fatalf("stopped at step %d: %s", stop, d)
		}
	}
}

func TestAnUnfinishedImportHoldsItsIDsUntilItIsAborted(t *testing.T) {
	t.Parallel()
	a := "{\"id\":\"a\",\"text\":\"1\"}\n"
	s := &stopAfter{memory.New(), 1}
	if _, err := intake.Run(t.Context(), s, strings.NewReader(a), options(t, "first", 4)); !errors.Is(err, errStopped) {
		t.Fatal(err)
	}
	s.left = 1 << 30
	_, err := intake.Run(t.Context(), s, strings.NewReader(a), options(t, "second", 4))
	if !errors.Is(err, refusal.ImportPending) || !strings.Contains(err.Error(), "first") {
		t.Fatalf("got %v", err)
	}
	if _, err := s.AbortImport(t.Context(), "first"); err != nil {
		t.Fatal(err)
	}
	run(t, s, a, options(t, "second", 4))
	if d := cmp.Diff([]string{"a=1"}, records(t, s.Store, "second")); d != "" {
		t.Error(d)
	}
	if _, err := intake.Run(t.Context(), s, strings.NewReader(a), options(t, "first", 4)); !errors.Is(err, refusal.ImportAborted) {
		t.Errorf("the aborted import again: %v", err)
	}
}

func TestARecordThatAnEarlierRunSkippedIsSignedWhenItsHolderWasAborted(t *testing.T) {
	t.Parallel()
	s := &stopAfter{memory.New(), 1 << 30}
	run(t, s, "{\"id\":\"d\",\"text\":\"1\"}\n", options(t, "done", 4))
	in := "{\"id\":\"a\",\"text\":\"1\"}\n{\"id\":\"d\",\"text\":\"1\"}\n{\"id\":\"b\",\"text\":\"1\"}\n{\"id\":\"c\",\"text\":\"1\"}\n"
	s.left = 5 // reserves a and d, then b, and writes the first payload; stops at the second batch
	if _, err := intake.Run(t.Context(), s, strings.NewReader(in), options(t, "x", 2)); !errors.Is(err, errStopped) {
		t.Fatal(err)
	}
	s.left = 1 << 30
	sum := run(t, s, in, options(t, "x", 2))
	if d := cmp.Diff([]string{"a=1", "b=1", "c=1"}, records(t, s.Store, "x")); d != "" || sum.Import.Duplicates != 1 {
		t.Errorf("%s %+v", d, sum.Import)
	}
}

func TestWrongOptionsAreUsageErrors(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*intake.Options){
		"import id":  func(o *intake.Options) { o.ImportID = "No Spaces" },
		"pool":       func(o *intake.Options) { o.Pool = "" },
		"kind":       func(o *intake.Options) { o.Kind = "poem" },
		"batch size": func(o *intake.Options) { o.BatchSize = record.MaxBatchSize + 1 },
		"clock":      func(o *intake.Options) { o.Now = nil },
	} {
		o := options(t, "x", 10)
		change(&o)
		if _, err := intake.Run(t.Context(), memory.New(), strings.NewReader(""), o); !errors.Is(err, refusal.UsageWrong) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestGeneratedRecordsAreRepeatable(t *testing.T) {
	t.Parallel()
	make1 := func(seed uint64, ids bool) string {
		var b strings.Builder
		if err := intake.Generate(&b, 20, 100, seed, ids); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	if again := make1(1, true); again != make1(1, true) || make1(1, false) == make1(2, false) {
		t.Error("the same seed gives other records, or another seed the same")
	}
	for _, ids := range []bool{true, false} {
		s := memory.New()
		if sum := run(t, s, make1(1, ids), options(t, "x", 7)); sum.Import.Records != 20 || sum.Import.Batches != 3 {
			t.Errorf("ids %t: %+v", ids, sum.Import)
		}
	}
}

func TestANamedKeyMustBeInThePool(t *testing.T) {
	t.Parallel()
	s := memory.New()
	key := record.KeyID{1}
	if err := s.PutKeys(t.Context(), []store.Key{{ID: key, Keyring: "k#1", Pool: "main", Sealed: []byte{1}}}); err != nil {
		t.Fatal(err)
	}
	o := options(t, "x", 10)
	o.KeyID = key
	sum := run(t, s, `{"text":"a"}`, o)
	if b, err := s.Batch(t.Context(), record.MakeBatchID("x", 0)); err != nil || !b.Pinned || b.KeyID != key || sum.Import.KeyID != key {
		t.Errorf("batch %+v, %v", b, err)
	}
	for _, o := range []intake.Options{
		{ImportID: "y", Pool: "main", KeyID: record.KeyID{2}},
		{ImportID: "y", Pool: "other", KeyID: key},
	} {
		o.Kind, o.SigLen, o.Now = record.Message, 65, time.Now
		if _, err := intake.Run(t.Context(), s, strings.NewReader(`{"text":"a"}`), o); !errors.Is(err, refusal.UsageWrong) {
			t.Errorf("key %s of pool %s: %v", o.KeyID, o.Pool, err)
		}
	}
}
