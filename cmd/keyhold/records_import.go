package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/payload"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/intake"
	"github.com/keyhold/keyhold/parent/store"
)

type importOptions struct {
	at                              cli.StoreOptions
	pool, kind, key, id, rejects    string
	batchSize                       int
	keepGoing, asJSON, poolWasGiven bool
}

func recordsImportCmd() *cobra.Command {
	var o importOptions
	c := &cobra.Command{
		Use:   "import FILE",
		Short: "Import records to be signed, from JSON Lines",
		Long: `Import records from a file, or from stdin with -. Each line is

  {"id": "optional", "payload": "<base64>"}   or   {"id": "optional", "text": "<string>"}

All of the input is checked before any of it is signed. A line that is no record
ends the import with its number and the reason; with --keep-going such lines go
to a rejects file instead and the exit code is 3.

A record with an id is signed once: imported again it is a duplicate, and with
another payload it is an error. The same input imported again does nothing, or
continues an import that was interrupted.`,
		Example: `  # Sign with any key of the pool
  keyhold records import records.jsonl --pool default

  # From another program, named, so that it can be repeated safely
  produce | keyhold records import - --pool payouts --import-id payouts-2026-11-20

  # Sign all of it with one key
  keyhold records import records.jsonl --key 5f3a...e1

  # Import what is good and put the rest aside
  keyhold records import records.jsonl --pool default --keep-going --rejects bad.jsonl`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			o.poolWasGiven = c.Flags().Changed("pool")
			return importRecords(c, o, args[0])
		},
	}
	o.at.AddFlags(c)
	f := c.Flags()
	f.StringVar(&o.pool, "pool", "default", "`name` of the pool whose keys sign")
	f.StringVar(&o.kind, "kind", string(record.Message), "what the payloads are: message, raw or digest")
	f.StringVar(&o.key, "key", "", "`id` of the one key that signs, in place of any of the pool")
	f.IntVar(&o.batchSize, "batch-size", intake.DefaultBatchSize, fmt.Sprintf("`records` in a batch, 1 to %d", record.MaxBatchSize))
	f.StringVar(&o.id, "import-id", "", "`name` of the import; without one it is made of the input's hash")
	f.BoolVar(&o.keepGoing, "keep-going", false, "put lines that are no records aside and import the rest")
	f.StringVar(&o.rejects, "rejects", "", "`file` for those lines (default FILE.rejects.jsonl, stdin.rejects.jsonl for -)")
	f.BoolVar(&o.asJSON, "json", false, "print the summary as JSON")
	return c
}

func importRecords(c *cobra.Command, o importOptions, path string) (err error) {
	opts, err := o.parse()
	if err != nil {
		return err
	}
	src, closeSrc, err := openInput(c, path)
	if err != nil {
		return err
	}
	defer closeSrc()
	s, err := cli.OpenStore(c.Context(), o.at)
	if err != nil {
		return err
	}
	if err := o.findAlgorithm(c.Context(), s, &opts); err != nil {
		return err
	}
	rejects := rejectsFile{path: o.rejectsPath(path)}
	if o.keepGoing {
		opts.Rejects = &rejects
	}
	p := cli.NewProgress(c.ErrOrStderr(), "importing", 0)
	opts.Progress = func(done, total int) { p.SetTotal(total); p.Set(done) }
	sum, err := intake.Run(c.Context(), s, src, opts)
	p.Finish()
	if err != nil && sum.Import.State == store.ImportOpen {
		id := sum.Import.ID
		err = fmt.Errorf("%w; import %s stays open: run it again, or give it up with keyhold import abort %s", err, id, id)
	}
	if err := errors.Join(err, rejects.Close()); err != nil {
		return err
	}
	return o.tell(c, sum, rejects.path)
}

// parse checks everything that can be checked without the tables.
func (o *importOptions) parse() (intake.Options, error) {
	opts := intake.Options{Pool: o.pool, Kind: record.Kind(o.kind), BatchSize: o.batchSize, ImportID: record.ImportID(o.id), Now: time.Now}
	if o.batchSize < 1 {
		return opts, cli.Usagef("--batch-size: want 1 to %d", record.MaxBatchSize)
	}
	if o.rejects != "" && !o.keepGoing {
		return opts, cli.Usagef("--rejects is for --keep-going")
	}
	if o.key != "" {
		id, err := record.ParseKeyID(o.key)
		if err != nil {
			return opts, cli.Usagef("--key: %w: see keyhold keys list", err)
		}
		opts.KeyID = id
	}
	opts.SigLen = 1 // until the algorithm is known
	if err := opts.Validate(); err != nil {
		return opts, cli.Usagef("%w", err)
	}
	return opts, nil
}

// findAlgorithm learns from the pool how long its signatures are.
func (o *importOptions) findAlgorithm(ctx context.Context, s store.Store, opts *intake.Options) error {
	key, err := o.sampleKey(ctx, s, opts)
	if err != nil {
		return err
	}
	if o.key != "" && o.poolWasGiven && key.pool != opts.Pool {
		return cli.Usagef("key %s is in pool %s, not in %s", opts.KeyID, key.pool, opts.Pool)
	}
	opts.Pool = key.pool
	if _, err := payload.NewHasher(key.algorithm, opts.Kind); err != nil {
		return cli.Usagef("%s keys, as those of pool %s are, sign no %s records", key.algorithm, key.pool, opts.Kind)
	}
	opts.SigLen = key.algorithm.SignatureLen()
	return nil
}

func (o *importOptions) sampleKey(ctx context.Context, s store.Store, opts *intake.Options) (publicKey, error) {
	if !opts.KeyID.IsZero() {
		return readKey(ctx, s, opts.KeyID)
	}
	return anyKey(ctx, s, opts.Pool)
}

func openInput(c *cobra.Command, path string) (io.Reader, func(), error) {
	if path == "-" {
		return c.InOrStdin(), func() {}, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, fmt.Errorf("read the records: %w", err)
	}
	return f, func() { _ = f.Close() }, nil // it was only read
}

func (o *importOptions) rejectsPath(input string) string {
	switch {
	case o.rejects != "":
		return o.rejects
	case input == "-":
		return "stdin.rejects.jsonl"
	}
	return input + ".rejects.jsonl"
}

// rejectsFile is created with the first reject, in place of an older one.
type rejectsFile struct {
	path string
	f    *os.File
}

func (r *rejectsFile) Write(b []byte) (int, error) {
	if r.f == nil {
		f, err := os.Create(r.path)
		if err != nil {
			return 0, err
		}
		r.f = f
	}
	return r.f.Write(b)
}

func (r *rejectsFile) Close() error {
	if r.f == nil {
		return nil
	}
	if err := r.f.Close(); err != nil {
		return fmt.Errorf("write the rejects file: %w", err)
	}
	return nil
}

// importSummary is the JSON of an import.
type importSummary struct {
	ImportID   string  `json:"import_id"`
	Already    bool    `json:"already"` // it was imported before; nothing was written
	Pool       string  `json:"pool"`
	Kind       string  `json:"kind"`
	KeyID      *string `json:"key_id"`
	Records    int     `json:"records"`    // of the input
	Duplicates int     `json:"duplicates"` // of them, that were imported before or stood twice in the input
	New        int     `json:"new"`        // that this import brought in
	Batches    int     `json:"batches"`
	BatchSize  int     `json:"batch_size"`
	Rejected   int     `json:"rejected"`     // lines that are no records
	Rejects    *string `json:"rejects_file"` // where they are
}

func (o *importOptions) tell(c *cobra.Command, sum intake.Summary, rejects string) error {
	im := sum.Import
	out := importSummary{
		ImportID: string(im.ID), Already: sum.Already, Pool: im.Pool, Kind: string(im.Kind), KeyID: keyText(im.KeyID),
		Records: im.Records, Duplicates: im.Duplicates, New: im.Records - im.Duplicates,
		Batches: im.Batches, BatchSize: im.BatchSize, Rejected: sum.Rejects,
	}
	if sum.Rejects > 0 {
		out.Rejects = &rejects
	}
	if err := o.print(c.OutOrStdout(), out); err != nil {
		return err
	}
	if sum.Rejects > 0 {
		return cli.Errorf(refusal.SomeRefused, "%d lines are no records and were put into %s, with the reason of each", sum.Rejects, rejects)
	}
	return nil
}

func (o *importOptions) print(w io.Writer, out importSummary) error {
	if o.asJSON {
		return cli.PrintJSON(w, out)
	}
	if out.Already {
		_, err := fmt.Fprintf(w, "import %s was done before: %d records in %d batches; nothing was written\n", out.ImportID, out.New, out.Batches)
		return err
	}
	_, err := fmt.Fprintf(w, "import %s: %d records in %d batches for pool %s, %d duplicates left out\n",
		out.ImportID, out.New, out.Batches, out.Pool, out.Duplicates)
	return err
}
