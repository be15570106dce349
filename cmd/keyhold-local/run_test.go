package main_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/awslocal/dynoxide/dynoxidetest"
	"github.com/keyhold/keyhold/internal/e2e"
)

// work is one command: run on a folder, with its files.
type work struct {
	dir, export, history string
	records, keys, batch int
	parents, enclaves    int
	workers              int
	algorithm            string
}

func newWork(t *testing.T, records, keys, batch int) *work {
	t.Helper()
	dir := t.TempDir()
	return &work{
		dir: filepath.Join(dir, "run"), export: filepath.Join(dir, "records.jsonl"), history: filepath.Join(dir, "batches.jsonl"),
		records: records, keys: keys, batch: batch, parents: 1, enclaves: 1, algorithm: "secp256k1",
	}
}

func (w *work) args() []string {
	return []string{
		"--records", strconv.Itoa(w.records), "--keys", strconv.Itoa(w.keys), "--batch-size", strconv.Itoa(w.batch),
		"--algorithm", w.algorithm, "--parents", strconv.Itoa(w.parents), "--enclaves", strconv.Itoa(w.enclaves),
		"--workers", strconv.Itoa(w.workers), "--export", w.export, "--history", w.history, "--json",
	}
}

func (w *work) start(t *testing.T) *running {
	t.Helper()
	return start(t, w.dir, nil, "run", w.args()...)
}

// finish runs the command to its good end.
func (w *work) finish(t *testing.T) report {
	t.Helper()
	r := w.start(t)
	r.mustEnd(0, "")
	return r.report()
}

// holds checks what a finished command left: everything signed once, each receipt verified, and a
// history without contradiction.
func (w *work) holds(t *testing.T, got report) []e2e.Batch {
	t.Helper()
	batches := (w.records + w.batch - 1) / w.batch
	want := report{Records: w.records, Signed: w.records, Verified: w.records, Keys: w.keys, Batches: batches}
	if got.Receipts < batches+1 { // and one for the keys
		t.Errorf("%d receipts verified, want %d at least", got.Receipts, batches+1)
	}
	got.Receipts, got.SecondsSign, got.RecordsPerSecond = 0, 0, 0
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("report (-want +got):\n%s", diff)
	}
	f, err := os.Open(w.history)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	history, err := e2e.ReadHistory(f)
	if err != nil {
		t.Fatal(err)
	}
	if err := e2e.Check(history); err != nil {
		t.Error(err)
	}
	count := 0
	for _, b := range history {
		count += b.RecordCount
	}
	if len(history) != batches || count != w.records {
		t.Errorf("the history has %d batches of %d records, want %d of %d", len(history), count, batches, w.records)
	}
	return history
}

// exported reads the export, which must have a line for each record.
func (w *work) exported(t *testing.T) []byte {
	t.Helper()
	raw, err := os.ReadFile(w.export)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(raw, []byte("\n")); n != w.records {
		t.Errorf("the export has %d lines, want %d", n, w.records)
	}
	return raw
}

// verifyIndependently has every signature of the export verified by tools/verify-export.mjs.
func (w *work) verifyIndependently(t *testing.T) {
	t.Helper()
	code, out := verifyExport(t, w.export)
	want := fmt.Sprintf(`{"records":%d,"verified":%d,"failed":0,"keys":%d,"states":{"SIGNED":%d}}`, w.records, w.records, w.keys, w.records)
	if got := strings.TrimSpace(out); code != 0 || got != want {
		t.Errorf("exit code %d, %s; want 0, %s", code, got, want)
	}
}

func verifyExport(t *testing.T, file string) (code int, out string) {
	t.Helper()
	tools := filepath.Join("..", "..", "tools")
	_, err := os.Stat(filepath.Join(tools, "node_modules", "ethers"))
	if err == nil {
		_, err = exec.LookPath("node")
	}
	if err != nil {
		if os.Getenv(dynoxidetest.RequireEnv) == "1" {
			t.Fatal(err)
		}
		t.Skipf("node and ethers verify signatures here; run `make tools`: %v", err)
	}
	raw, err := exec.CommandContext(t.Context(), "node", filepath.Join(tools, "verify-export.mjs"), file).Output()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
		t.Fatal(err)
	} else if exited {
		code = 1
	}
	return code, string(raw)
}

func TestEverySignatureOfSeveralProcessesIsVerifiedByAnotherLibrary(t *testing.T) {
	t.Parallel()
	w := newWork(t, 1000, 20, 10)
	w.parents, w.enclaves = 2, 2
	w.holds(t, w.finish(t))
	w.verifyIndependently(t)
}

func TestSeveralParentsAndEnclavesShareTheKeys(t *testing.T) {
	whole(t)
	t.Parallel()
	w := newWork(t, 9000, 40, 30)
	w.parents, w.enclaves, w.workers = 2, 2, 1
	r := w.start(t)
	r.until("the first parent signs", func() bool { return r.signs(0) })
	r.signal("parent-0", syscall.SIGSTOP) // on a busy machine it could be done before the second begins
	r.until("the second parent signs", func() bool { return r.signs(1) })
	r.signal("parent-0", syscall.SIGCONT)
	r.mustEnd(0, "")
	history := w.holds(t, r.report())
	w.samples(t)
	const inFlight = 2 * 2 * 1 * 2 // parents x enclaves x connections x requests
	if over := e2e.CountOvertaken(history, w.keys); over.Most > inFlight {
		t.Errorf("a claim overtook %d older idle keys, want at most %d: %+v", over.Most, inFlight, over)
	}
	owners, boots := map[string]int{}, map[string]int{}
	for _, b := range history {
		owners[b.Owner]++
		boots[b.BootID]++
	}
	if len(owners) != w.parents {
		t.Errorf("batches by owner %v, want %d owners", owners, w.parents)
	}
	t.Logf("batches by owner %v and by boot %v", owners, boots)
}

func TestOneClaimerUsesKeysExactlyLeastRecentlyUsedFirst(t *testing.T) {
	whole(t)
	t.Parallel()
	w := newWork(t, 3000, 50, 6)
	w.workers = 1
	history := w.holds(t, w.finish(t))
	if over := e2e.CountOvertaken(history, w.keys); over.Total != 0 {
		t.Errorf("older idle keys were overtaken: %+v", over)
	}
}

func TestEveryAlgorithmIsSignedAndVerified(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		algorithm     string
		records, keys int
	}{{"secp256k1", 120, 5}, {"ed25519", 400, 5}, {"p256", 400, 5}, {"rsa2048", 120, 2}} {
		t.Run(tc.algorithm, func(t *testing.T) {
			t.Parallel()
			w := newWork(t, tc.records, tc.keys, 20)
			w.algorithm = tc.algorithm
			w.holds(t, w.finish(t))
			w.verifyIndependently(t)
			spoil(t, w)
		})
	}
}

// spoil changes one digit of a signature, which the independent check must notice.
func spoil(t *testing.T, w *work) {
	t.Helper()
	raw := w.exported(t)
	const field = `"signature":"`
	at := bytes.LastIndex(raw, []byte(field)) + len(field) + 20
	if raw[at] != '0' {
		raw[at] = '0'
	} else {
		raw[at] = '1'
	}
	bad := filepath.Join(t.TempDir(), "spoilt.jsonl")
	if err := os.WriteFile(bad, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if code, out := verifyExport(t, bad); code != 1 || !strings.Contains(out, `"failed":1,`) {
		t.Errorf("a spoilt signature: exit code %d, %s", code, out)
	}
}

func TestTheSameCommandAgainSignsNothingTwice(t *testing.T) {
	t.Parallel()
	w := newWork(t, 2000, 10, 100)
	first := w.finish(t)
	before := w.holds(t, first)
	export := w.exported(t)
	if first.RecordsPerSecond <= 0 || first.SecondsSign <= 0 {
		t.Errorf("the first run: %+v, want a rate", first)
	}
	again := w.finish(t)
	if again.RecordsPerSecond != 0 || again.SecondsSign != 0 || again.Receipts != first.Receipts {
		t.Errorf("the second run: %+v, want no rate, and the receipts of the first: %+v", again, first)
	}
	if diff := cmp.Diff(before, w.holds(t, again)); diff != "" {
		t.Errorf("the history changed (-first +second):\n%s", diff)
	}
	if !bytes.Equal(export, w.exported(t)) { //nolint:forbidigo // an export is public
		t.Error("the export changed")
	}

	for _, tc := range []struct {
		name   string
		change func(w *work)
	}{
		{"records", func(w *work) { w.records++ }},
		{"keys", func(w *work) { w.keys++ }},
		{"batch size", func(w *work) { w.batch++ }},
		{"algorithm", func(w *work) { w.algorithm = "p256" }},
	} {
		other := *w
		tc.change(&other)
		t.Run("other "+tc.name, func(t *testing.T) { other.start(t).mustEnd(2, "dir_mismatch") })
	}
	t.Run("a damaged run.json", func(t *testing.T) {
		if err := os.WriteFile(filepath.Join(w.dir, "run.json"), []byte(`{"records":`), 0o600); err != nil {
			t.Fatal(err)
		}
		w.start(t).mustEnd(2, "run.json is damaged")
	})
}

func TestTwoRunsOnOneFolderExcludeEachOther(t *testing.T) {
	t.Parallel()
	w := newWork(t, 500, 2, 50)
	up := start(t, w.dir, nil, "up")
	up.until("it is up", func() bool { return up.signal("parent-0", 0) != 0 })
	w.start(t).mustEnd(1, "dir_busy")
	start(t, w.dir, nil, "up").mustEnd(1, "dir_busy")
	up.signal("supervisor", syscall.SIGINT)
	up.mustEnd(0, "")
	w.holds(t, w.finish(t))
}

func TestWrongUsageEndsWithTwoAndMakesNothing(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name string
		args []string
		want string
	}{
		{"no records", []string{"run", "--records", "0"}, "--records must be"},
		{"no number", []string{"run", "--records", "many"}, "invalid argument"},
		{"no keys", []string{"run", "--keys", "0"}, "--keys must be"},
		{"a huge batch", []string{"run", "--batch-size", "1000000"}, "--batch-size must be"},
		{"an unknown algorithm", []string{"run", "--algorithm", "dsa"}, "--algorithm must be"},
		{"no parents", []string{"run", "--parents", "0"}, "--parents must be"},
		{"too many enclaves", []string{"up", "--enclaves", "17"}, "--enclaves between"},
		{"an unknown flag", []string{"run", "--speed", "9"}, "unknown flag"},
		{"an argument", []string{"run", "now"}, "unknown command"},
		{"no folder", []string{"up", "--dir", ""}, "--dir is needed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "new")
			r := start(t, dir, nil, tc.args[0], tc.args[1:]...)
			r.mustEnd(2, tc.want)
			if !strings.Contains(r.stderr.String(), "--help") {
				t.Error("stderr does not say where help is")
			}
			if _, err := os.Stat(dir); err == nil {
				t.Error("the folder was made")
			}
		})
	}
}
