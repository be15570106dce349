package main

import (
	"bytes"
	"context"
	crand "crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/audit"
	"github.com/keyhold/keyhold/parent/export"
	"github.com/keyhold/keyhold/parent/intake"
	"github.com/keyhold/keyhold/parent/provision"
	"github.com/keyhold/keyhold/parent/signclient"
	"github.com/keyhold/keyhold/parent/store"
)

const (
	importID    = record.ImportID("run")
	payloadSize = 100 // bytes of each random record

	keyAttempts = 600 // of making keys, restartFirst apart: an enclave and a parent start in a moment
)

// runFlags of keyhold-local run.
type runFlags struct {
	dir string
	values
	size
	export, history string
	json            bool
}

// report is the last line of stdout with --json. Its form is fixed: tools read it.
type report struct {
	Records          int     `json:"records"`
	Signed           int     `json:"signed"`
	Refused          int     `json:"refused"`
	Keys             int     `json:"keys"`
	Batches          int     `json:"batches"`
	SecondsSign      float64 `json:"seconds_sign"`
	RecordsPerSecond float64 `json:"records_per_second"` // 0 where nothing was left to sign
	Verified         int     `json:"verified"`
	Receipts         int     `json:"receipts"`
	Quarantined      int     `json:"quarantined"` // batches
}

func runCommand() *cobra.Command {
	var f runFlags
	cmd := &cobra.Command{
		Use:   "run --dir DIR",
		Short: "Import random records, sign them, verify everything, stop",
		Long: `Imports random records, signs them with keys that are born in the emulated enclave,
verifies every signature and every receipt, and stops.

The state stays in the folder. The same command again continues where an earlier
one ended, however it ended, and signs nothing twice. Other --records, --keys,
--batch-size or --algorithm on the same folder are refused with exit code 2.
Exit code 3: some records were refused. Ctrl-C stops cleanly.`,
		Example: `  # the demonstration: 100,000 records, 100 keys
  keyhold-local run --dir /tmp/demo --records 100000 --keys 100

  # several processes, and what was signed as files
  keyhold-local run --dir /tmp/two --records 100000 --keys 100 --batch-size 50 \
      --parents 2 --enclaves 2 --export records.jsonl --history batches.jsonl --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return run(cmd, f) },
	}
	fl := cmd.Flags()
	fl.StringVar(&f.dir, "dir", "", "folder of the run; made where it is missing (required)")
	fl.IntVar(&f.Records, "records", 10_000, "number of records")
	fl.IntVar(&f.Keys, "keys", 100, "number of keys")
	fl.IntVar(&f.BatchSize, "batch-size", intake.DefaultBatchSize, "records in a batch")
	fl.StringVar(&f.Algorithm, "algorithm", string(record.Secp256k1), "secp256k1, ed25519, p256 or rsa2048")
	addSize(cmd, &f.size)
	fl.StringVar(&f.export, "export", "", "write one line of JSON per record to this file")
	fl.StringVar(&f.history, "history", "", "write one line of JSON per batch to this file")
	fl.BoolVar(&f.json, "json", false, "end stdout with one line of JSON")
	return cmd
}

func addSize(cmd *cobra.Command, n *size) {
	cmd.Flags().IntVar(&n.parents, "parents", 1, "number of parent processes")
	cmd.Flags().IntVar(&n.enclaves, "enclaves", 1, "number of enclave processes; every parent uses all of them")
	cmd.Flags().IntVar(&n.workers, "workers", 0, "connections of each parent to each enclave; 0: the parent's default")
}

func (f *runFlags) validate() error {
	switch {
	case f.dir == "":
		return cli.Usagef("--dir is needed: the folder that keeps the run's state")
	case f.Records < 1 || f.Records > 100_000_000:
		return cli.Usagef("--records must be between 1 and 100000000")
	case f.Keys < 1 || f.Keys > maxKeys:
		return cli.Usagef("--keys must be between 1 and %d", maxKeys)
	case f.BatchSize < 1 || f.BatchSize > record.MaxBatchSize:
		return cli.Usagef("--batch-size must be between 1 and %d", record.MaxBatchSize)
	}
	if _, err := record.ParseAlgorithm(f.Algorithm); err != nil {
		return cli.Usagef("--algorithm must be one of %v", record.Algorithms())
	}
	return f.size.validate()
}

func (n *size) validate() error {
	if n.parents < 1 || n.parents > 64 || n.enclaves < 1 || n.enclaves > 16 || n.workers < 0 || n.workers > 64 {
		return cli.Usagef("--parents must be between 1 and 64, --enclaves between 1 and 16, --workers between 0 and 64")
	}
	return nil
}

func run(cmd *cobra.Command, f runFlags) error {
	if err := f.validate(); err != nil {
		return err
	}
	for _, p := range []*string{&f.export, &f.history} {
		if *p != "" { // openFolder changes the working directory
			abs, err := filepath.Abs(*p)
			if err != nil {
				return fmt.Errorf("find %s: %w", *p, err)
			}
			*p = abs
		}
	}
	dir, err := openFolder(f.dir)
	if err != nil {
		return err
	}
	if f.values, err = dir.settle(withSeed(f.values)); err != nil {
		return errors.Join(err, dir.Close())
	}
	var r report
	err = withStack(cmd.Context(), dir, f.size, func(ctx context.Context, s *stack) (err error) {
		r, err = signAll(ctx, s, f, cmd.ErrOrStderr())
		return err
	})
	if err = errors.Join(err, dir.Close()); err != nil {
		return err
	}
	return printReport(cmd.OutOrStdout(), f.json, r)
}

func withSeed(v values) values {
	var b [8]byte
	crand.Read(b[:])
	v.Seed = binary.BigEndian.Uint64(b[:]) >> 1
	return v
}

// withStack runs work on a running stack and stops the stack in order, also
// where ctx ends: work sees ctx, the processes do not.
func withStack(ctx context.Context, dir *folder, n size, work func(context.Context, *stack) error) error {
	logFile, err := os.OpenFile(filepath.Join(logs, "supervisor.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open the supervisor's log: %w", full(err))
	}
	base, cancel := context.WithCancel(context.WithoutCancel(ctx))
	log := logTo(logFile)
	s, err := startStack(base, dir.database, n, log)
	if err != nil {
		cancel()
		return errors.Join(err, s.group.Wait(), logFile.Close())
	}
	ctx, stopWork := context.WithCancel(ctx)
	undo := context.AfterFunc(s.ctx, stopWork) //nolint:contextcheck // a stack that broke ends the work
	if err = work(ctx, s); err != nil && ctx.Err() == nil {
		err = blameDisk(log, err)
	}
	undo()
	stopWork()
	broken := s.close(cancel)
	if broken != nil && errors.Is(err, context.Canceled) {
		err = nil // the work ended because the stack broke
	}
	return errors.Join(err, broken, logFile.Close())
}

// signAll is the run: keys, import, signing, verification, files.
func signAll(ctx context.Context, s *stack, f runFlags, stderr io.Writer) (r report, err error) {
	algorithm := record.Algorithm(f.Algorithm)
	if err := provisionKeys(ctx, s, algorithm, f.Keys, stderr); err != nil {
		return r, err
	}
	if err := importRecords(ctx, s, algorithm, f.values, stderr); err != nil {
		return r, err
	}
	if r.SecondsSign, r.RecordsPerSecond, err = sign(ctx, s, f.values, stderr); err != nil {
		return r, err
	}
	checked, err := verify(ctx, s, f.values, stderr)
	if err != nil {
		return r, err
	}
	r.Records, r.Signed, r.Refused, r.Verified = checked.Records, checked.Signed, checked.Refused, checked.Verified
	r.Keys, r.Batches, r.Receipts = f.Keys, checked.Batches, checked.Receipts
	if r.Quarantined, err = s.store.CountReady(ctx, store.QuarantinedShard); err != nil {
		return r, fmt.Errorf("count the quarantined batches: %w", err)
	}
	return r, writeFiles(ctx, s, f)
}

// provisionKeys makes what is missing of the keys. It needs parents, through
// which the enclave reaches KMS.
func provisionKeys(ctx context.Context, s *stack, a record.Algorithm, count int, stderr io.Writer) error {
	if have, err := countKeys(ctx, s); err != nil || have >= count {
		return err
	}
	s.startParents() //nolint:contextcheck // processes end with the stack
	bar := cli.NewProgress(stderr, "keys", count)
	defer bar.Finish()
	opts := provision.Options{
		Algorithm: a, Policy: policyName, Pool: poolName, Count: count,
		Progress: func(done, _ int) { bar.Set(done) },
	}
	for failures := 1; ; failures++ {
		err := makeKeys(ctx, s, opts)
		if err == nil {
			return s.stopParents()
		}
		if !passes(err) || failures == keyAttempts {
			return err
		}
		s.log.WarnContext(ctx, "keys not made yet", slog.Any("error", err))
		if err := pause(ctx, restartFirst); err != nil {
			return err
		}
	}
}

// passes: a parent has not configured the enclave yet, KMS is not reached yet, or
// the enclave was started again in between.
func passes(err error) bool {
	for _, e := range []error{
		refusal.NotConfigured, refusal.NoKeyring, refusal.KMSUnreachable, refusal.KMSThrottled, refusal.KMSCredentials, signclient.ErrLost,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// makeKeys makes the keyring first and keeps what the boot says of itself, so that
// the receipt of every key can be verified, whatever ends the enclave afterwards.
func makeKeys(ctx context.Context, s *stack, opts provision.Options) error {
	ring := opts
	ring.Count, ring.Progress = 0, nil
	first, err := s.connect(ctx, 0)
	if err != nil {
		return err
	}
	_, err = provision.Run(ctx, first, s.store, s.config, ring)
	first.Close()
	if err != nil {
		return err
	}
	second, err := s.connect(ctx, 0) // whose hello has the boot statement
	if err != nil {
		return err
	}
	defer second.Close()
	h := second.Hello()
	if len(h.Document) == 0 {
		return fmt.Errorf("enclave 0 was started again: %w", refusal.NoKeyring)
	}
	err = s.store.PutBoot(ctx, store.Boot{ID: h.BootID, Document: h.Document, Statement: h.Statement, SeenAt: time.Now()})
	if err != nil {
		return fmt.Errorf("keep boot %s: %w", h.BootID, err)
	}
	_, err = provision.Run(ctx, second, s.store, s.config, opts)
	return err
}

func countKeys(ctx context.Context, s *stack) (n int, err error) {
	id := fmt.Sprintf("%s#%d", s.config.Keyring, s.config.SealEpoch)
	err = s.store.Keys(ctx, id, func(page []store.Key) error {
		n += len(page)
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("count the keys: %w", err)
	}
	return n, nil
}

// importRecords makes the random records and imports them, unless that is done.
func importRecords(ctx context.Context, s *stack, a record.Algorithm, v values, stderr io.Writer) error {
	im, err := s.store.Import(ctx, importID)
	if err == nil && im.State == store.ImportDone {
		return nil
	}
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("look for the import: %w", err)
	}
	bar := cli.NewProgress(stderr, "import", v.Records)
	defer bar.Finish()
	lines, w := io.Pipe()
	generated := make(chan error, 1)
	go func() {
		err := intake.Generate(w, v.Records, payloadSize, v.Seed, false)
		generated <- errors.Join(err, w.CloseWithError(err))
	}()
	_, err = intake.Run(ctx, s.store, lines, intake.Options{
		ImportID: importID, Pool: poolName, Kind: record.Message, BatchSize: v.BatchSize, SigLen: a.SignatureLen(),
		SpoolDir: ".", Now: time.Now, Progress: func(done, _ int) { bar.Set(done) },
	})
	err = errors.Join(full(err), lines.Close())
	if genErr := <-generated; err == nil {
		err = genErr
	}
	return err
}

// verify checks every signature and every receipt.
func verify(ctx context.Context, s *stack, v values, stderr io.Writer) (audit.Report, error) {
	root, images, err := s.pairs()
	if err != nil {
		return audit.Report{}, err
	}
	bar := cli.NewProgress(stderr, "verify", v.Records)
	defer bar.Finish()
	r, err := audit.Run(ctx, s.store, audit.Options{Receipts: true, Root: root, Images: images, Configs: []*config.Config{s.config}, Progress: bar.Set})
	if errors.Is(err, refusal.ReceiptInvalid) {
		err = fmt.Errorf("%w; the first: %s", err, r.Findings[0])
	}
	return r, err
}

// pairs of image and config that a boot of this folder may have.
func (s *stack) pairs() (attestation.Root, []attestation.Image, error) {
	root, images, err := wanted()
	if err != nil {
		return root, nil, err
	}
	pcr16 := config.PCR16(s.raw)
	for _, img := range images {
		img.PCRs[16] = pcr16[:]
	}
	return root, images, nil
}

func writeFiles(ctx context.Context, s *stack, f runFlags) error {
	if f.export == "" && f.history == "" {
		return nil
	}
	imports, err := export.Selected(ctx, s.store, []record.ImportID{importID})
	if err != nil {
		return err
	}
	if f.export != "" {
		err := cli.WriteOutput(f.export, nil, func(w io.Writer) error {
			_, err := export.Records(ctx, s.store, imports, w)
			return err
		})
		if err != nil {
			return fmt.Errorf("export the records: %w", err)
		}
	}
	if f.history == "" {
		return nil
	}
	err = cli.WriteOutput(f.history, nil, func(w io.Writer) error {
		_, err := export.Batches(ctx, s.store, imports, nil, w)
		return err
	})
	if err != nil {
		return fmt.Errorf("export the history: %w", err)
	}
	return nil
}

// printReport says what was done, and refuses to call it all well where records
// were refused or batches are in quarantine.
func printReport(stdout io.Writer, asJSON bool, r report) error {
	var text bytes.Buffer
	fmt.Fprintf(&text, "%d records: %d signed, %d refused, in %d batches with %d keys\n", r.Records, r.Signed, r.Refused, r.Batches, r.Keys)
	fmt.Fprintf(&text, "%d signatures and %d receipts verified\n", r.Verified, r.Receipts)
	if r.RecordsPerSecond > 0 {
		fmt.Fprintf(&text, "signing took %.1f s, %.0f records per second\n", r.SecondsSign, r.RecordsPerSecond)
	} else {
		fmt.Fprintln(&text, "nothing was left to sign")
	}
	if _, err := stdout.Write(text.Bytes()); err != nil {
		return fmt.Errorf("print the result: %w", err)
	}
	if asJSON {
		if err := cli.PrintJSON(stdout, r); err != nil {
			return err
		}
	}
	switch {
	case r.Quarantined > 0:
		return fmt.Errorf("%d batches are quarantined: %w", r.Quarantined, refusal.BatchState)
	case r.Refused > 0:
		return fmt.Errorf("%d of %d: %w", r.Refused, r.Records, refusal.SomeRefused)
	}
	return nil
}
