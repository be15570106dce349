package checker_test

import (
	"context"
	"crypto/sha512"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/keyhold/keyhold/internal/awslocal/dynoxide"
	"github.com/keyhold/keyhold/internal/awslocal/dynoxide/dynoxidetest"
	"github.com/keyhold/keyhold/internal/checker"
	"github.com/keyhold/keyhold/internal/e2e/local"
)

const (
	// seedEnv repeats the order in which processes are killed.
	seedEnv = "KEYHOLD_TEST_SEED"

	parents, enclaves = 4, 2
	inFlight          = parents * enclaves * 2 * 2 // connections of each parent to each enclave, requests on each

	rounds = 60 // of the same command; a kill of the supervisor ends one
)

// work is one command on a folder.
type work struct {
	program, database    string
	dir, export, history string
	records, keys, batch int
}

func newWork(t *testing.T, records, keys, batch int) *work {
	t.Helper()
	database, err := local.FindDatabase()
	if errors.Is(err, dynoxide.ErrNotFound) && os.Getenv(dynoxidetest.RequireEnv) != "1" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	tmp := t.TempDir()
	program, err := local.Build(t.Context(), root, tmp, "keyhold-local")
	if err != nil {
		t.Fatal(err)
	}
	return &work{
		program: program, database: database, dir: filepath.Join(tmp, "run"),
		export: filepath.Join(tmp, "records.jsonl"), history: filepath.Join(tmp, "batches.jsonl"),
		records: records, keys: keys, batch: batch,
	}
}

func (w *work) start(t *testing.T) *local.Run {
	t.Helper()
	r, err := local.Start(w.program, w.database, w.dir, "run",
		"--records", strconv.Itoa(w.records), "--keys", strconv.Itoa(w.keys), "--batch-size", strconv.Itoa(w.batch),
		"--parents", strconv.Itoa(parents), "--enclaves", strconv.Itoa(enclaves), "--workers", "2", "--export", w.export, "--history", w.history)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.End)
	return r
}

// until waits for so, and reports whether it came before the run ended.
func until(t *testing.T, r *local.Run, so func() bool) bool {
	t.Helper()
	for !so() {
		select {
		case <-r.Ended():
			return false
		default:
		}
		if err := local.Pause(t.Context(), 20*time.Millisecond); err != nil {
			t.Fatal(err)
		}
	}
	return true
}

// finish gives the command until it comes to its end, while killer works.
func (w *work) finish(t *testing.T, killer *local.Killer, limit int) {
	t.Helper()
	for round := range rounds {
		r := w.start(t)
		// What is killed while keys are made or records come in ends the run: that is tested elsewhere.
		imported := fmt.Sprintf("import: %d of %d ", w.records, w.records)
		if until(t, r, func() bool {
			s := r.Stderr.String()
			return strings.Contains(s, imported) || strings.Contains(s, "sign: ")
		}) {
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() {
				defer close(done)
				killer.Work(ctx, r, limit)
			}()
			// Nor is the verification at the end outlasted by a database that dies in it.
			until(t, r, func() bool { return strings.Contains(r.Stderr.String(), "verify: ") })
			cancel()
			<-done
		}
		code := r.ExitCode()
		r.End()
		switch {
		case code == 0 || code == 3:
			t.Logf("round %d ended with %d: %s", round+1, code, r.Stdout.String())
			return
		case code == 1 && strings.Contains(r.Stderr.String(), "batch_state"): // quarantined ones; files are written
			t.Logf("round %d: %s", round+1, r.Stderr.String())
			return
		case code != -1:
			t.Logf("round %d ended with %d: %s", round+1, code, r.Stderr.String())
		}
	}
	t.Fatalf("no end in %d rounds", rounds)
}

// options of the checker for the folder, whose tables are served there.
func (w *work) options(t *testing.T, endpoint string) checker.Options {
	t.Helper()
	read := func(name string) []byte {
		raw, err := os.ReadFile(filepath.Join(w.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	block, _ := pem.Decode(read("nsm-root.pem"))
	if block == nil {
		t.Fatal("no certificate in nsm-root.pem")
	}
	root, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	pcr0 := sha512.Sum384([]byte("keyhold-nsmtest-pcr0 keyhold-local")) // what the software NSM measures
	return checker.Options{
		Endpoint: endpoint, Prefix: "keyhold-", Root: root, PCR0: pcr0[:], Config: read("config.json"), InFlight: inFlight,
	}
}

// judge runs the checker on the tables and the two exports.
func (w *work) judge(t *testing.T, o checker.Options) checker.Report {
	t.Helper()
	export, err := os.Open(w.export)
	if err != nil {
		t.Fatal(err)
	}
	defer export.Close()
	history, err := os.Open(w.history)
	if err != nil {
		t.Fatal(err)
	}
	defer history.Close()
	o.Export, o.History = export, history
	report, err := checker.Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// serve starts the database on the folder's file.
func (w *work) serve(t *testing.T) string {
	t.Helper()
	endpoint, end, err := local.Serve(t.Context(), w.database, w.dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := end(); err != nil {
			t.Error(err)
		}
	})
	return endpoint
}

// killer of everything that a run consists of, the supervisor now and then.
func killer(t *testing.T) *local.Killer {
	t.Helper()
	seed := uint64(1)
	if text := os.Getenv(seedEnv); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%s=%d", seedEnv, seed)
	k := &local.Killer{Dice: rand.New(rand.NewPCG(seed, 0)), Every: 150 * time.Millisecond}
	for range 5 {
		for i := range parents {
			k.Victims = append(k.Victims, "parent-"+strconv.Itoa(i))
		}
		k.Victims = append(k.Victims, "enclave-0", "enclave-1", "dynamodb")
	}
	k.Victims = append(k.Victims, local.Supervisor)
	return k
}

// size of the run with kills: the whole in make test, a tenth where somebody just runs go test.
func size(t *testing.T) (records, kills int) {
	t.Helper()
	if testing.Short() {
		t.Skip("it waits for leases to run out")
	}
	if os.Getenv(dynoxidetest.RequireEnv) == "1" {
		return 20_000, 200
	}
	return 2_000, 20
}

func TestWhateverIsKilledTheTablesKeepThePromises(t *testing.T) {
	t.Parallel()
	records, kills := size(t)
	w := newWork(t, records, 100, 4)
	if err := local.Shorten(t.Context(), w.program, w.database, w.dir); err != nil {
		t.Fatal(err)
	}
	k := killer(t)
	began := time.Now()
	w.finish(t, k, kills)
	t.Logf("%d kills in %s: %v", k.Total, time.Since(began).Round(time.Second), k.Killed)
	if k.Total < kills/2 {
		t.Errorf("%d kills fell into the run, want %d", k.Total, kills)
	}
	report := w.judge(t, w.options(t, w.serve(t)))
	for _, f := range report.Findings {
		t.Error(f)
	}
	report.Findings = nil
	t.Logf("%+v", report)
	if report.Records != records || report.Signed+report.Refused+report.Quarantined != records || report.Keys != w.keys {
		t.Errorf("%d records and %d keys were judged, want %d and %d", report.Records, report.Keys, records, w.keys)
	}
}
