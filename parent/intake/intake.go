// Package intake brings records in: it validates the whole input, drops what was
// imported before, cuts the rest into batches and makes them ready. It refuses
// an input that is not wholly valid, an id that stands for another payload, and
// an import id that was used for another input.
package intake

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/store"
)

// DefaultBatchSize is the number of records in a batch.
const DefaultBatchSize = 500

// reserveParallel bounds the conditional puts of record ids in flight.
const reserveParallel = 32

// Store is what an import needs.
type Store interface {
	store.Intake
	Batch(ctx context.Context, id record.BatchID) (store.Batch, error)
	Payload(ctx context.Context, id record.BatchID) ([]byte, error)
	Lease(ctx context.Context, id record.KeyID) (store.Lease, error)
}

// Options of one import.
type Options struct {
	ImportID  record.ImportID // empty: "in-" and 20 hex digits of the input's hash
	Pool      string          // of the keys that sign
	Kind      record.Kind
	KeyID     record.KeyID // zero: any key of the pool
	BatchSize int          // records, 1 to record.MaxBatchSize; 0: DefaultBatchSize
	SigLen    int          // bytes of one signature of the pool's algorithm: bounds the result segment
	Rejects   io.Writer    // nil: the first bad line ends the import
	SpoolDir  string       // for the validated input; empty: the system's
	Now       func() time.Time
	Progress  func(done, total int) // records made ready so far; may be nil
}

// Summary says what an import did.
type Summary struct {
	Import  store.Import
	Already bool // it was DONE before and nothing was written
	Repeats int  // records that stood twice in the input
	Rejects int
}

// Validate reports everything that is wrong with o.
func (o *Options) Validate() error {
	var errs []error
	if o.ImportID != "" {
		errs = append(errs, record.CheckImportID(o.ImportID))
	}
	errs = append(errs, record.CheckPool(o.Pool))
	if _, err := record.ParseKind(string(o.Kind)); err != nil {
		errs = append(errs, err)
	}
	if o.BatchSize < 0 || o.BatchSize > record.MaxBatchSize {
		errs = append(errs, fmt.Errorf("batch size: want 1 to %d records", record.MaxBatchSize))
	}
	if o.SigLen <= 0 {
		errs = append(errs, errors.New("signature length: want that of the pool's algorithm"))
	}
	if o.Now == nil {
		errs = append(errs, errors.New("a clock is missing"))
	}
	return errors.Join(errs...)
}

// Run imports everything that src holds. A named key must be in the pool. The same input again continues an
// import that did not finish and does nothing where it did. Errors carry the
// codes import_line, record_conflict, import_conflict, import_pending and
// import_aborted; whatever fails before the first batch is ready leaves nothing
// that signs.
func Run(ctx context.Context, s Store, src io.Reader, o Options) (Summary, error) {
	if o.BatchSize == 0 {
		o.BatchSize = DefaultBatchSize
	}
	if err := o.Validate(); err != nil {
		return Summary{}, fmt.Errorf("import: %w: %w", refusal.UsageWrong, err)
	}
	if err := checkKey(ctx, s, o); err != nil {
		return Summary{}, err
	}
	sp, err := fill(src, o.SpoolDir, o.Kind, o.Rejects)
	if err != nil {
		return Summary{}, fmt.Errorf("import: %w", err)
	}
	sum, err := run(ctx, s, sp, o)
	return sum, errors.Join(err, sp.Close())
}

// checkKey refuses a named key that no parent could ever claim.
func checkKey(ctx context.Context, s Store, o Options) error {
	if o.KeyID.IsZero() {
		return nil
	}
	l, err := s.Lease(ctx, o.KeyID)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return fmt.Errorf("import for key %s: there is no such key: %w", o.KeyID, refusal.UsageWrong)
	case err != nil:
		return fmt.Errorf("look for key %s: %w", o.KeyID, err)
	case l.Pool != o.Pool:
		return fmt.Errorf("import for key %s: it is not in pool %s: %w", o.KeyID, o.Pool, refusal.UsageWrong)
	}
	return nil
}

func run(ctx context.Context, s Store, sp *spool, o Options) (Summary, error) {
	sum := Summary{Repeats: sp.Repeats, Rejects: sp.Rejects}
	hash := sp.Hash()
	if o.ImportID == "" {
		o.ImportID = record.ImportID("in-" + hex.EncodeToString(hash[:10]))
	}
	want := store.Import{
		ID: o.ImportID, State: store.ImportOpen, InputHash: hash, BatchSize: o.BatchSize, Pool: o.Pool,
		Kind: o.Kind, KeyID: o.KeyID, Records: sp.Records, CreatedAt: o.Now(),
	}
	im, err := s.OpenImport(ctx, want)
	switch {
	case errors.Is(err, store.ErrDiffers):
		return sum, fmt.Errorf("open import %s: %w", o.ImportID, refusal.ImportConflict)
	case errors.Is(err, store.ErrAborted):
		return sum, fmt.Errorf("open import %s: %w", o.ImportID, refusal.ImportAborted)
	case err != nil:
		return sum, fmt.Errorf("open import %s: %w", o.ImportID, err)
	}
	if sum.Import = im; im.State == store.ImportDone {
		sum.Already = true
		return sum, nil
	}
	batches, dup, err := compose(ctx, s, sp, o)
	if err != nil {
		return sum, err
	}
	if err := makeReady(ctx, s, batches, o); err != nil {
		return sum, err
	}
	im.Duplicates, im.Batches, im.DoneAt = dup+sp.Repeats, len(batches), o.Now()
	if err := s.FinishImport(ctx, im); err != nil {
		return sum, fmt.Errorf("finish import %s: %w", im.ID, err)
	}
	im.State = store.ImportDone
	sum.Import = im
	return sum, nil
}

// compose reserves every id and writes every payload segment. Nothing is ready
// yet, so a conflict that only shows here leaves nothing that signs.
func compose(ctx context.Context, s Store, sp *spool, o Options) (batches []store.Batch, dup int, err error) {
	in, err := sp.rewind()
	if err != nil {
		return nil, 0, err
	}
	c := &composer{s: s, in: in, o: o, total: sp.Records}
	for {
		b, err := c.next(ctx, record.MakeBatchID(o.ImportID, len(batches)))
		if errors.Is(err, io.EOF) {
			return batches, c.dup, nil
		}
		if err != nil {
			return nil, 0, err
		}
		batches = append(batches, b)
	}
}

// makeReady writes the control items; from here on records are signed.
func makeReady(ctx context.Context, s Store, batches []store.Batch, o Options) error {
	total, done := 0, 0
	for _, b := range batches {
		total += b.Count
	}
	results := make(chan int)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(results)
		w, ctx := errgroup.WithContext(ctx)
		w.SetLimit(store.ImportWindow)
		for _, b := range batches {
			w.Go(func() error {
				b.VisibleAt = o.Now()
				if err := s.PutBatch(ctx, b); err != nil {
					if errors.Is(err, store.ErrAborted) {
						err = refusal.ImportAborted
					}
					return fmt.Errorf("make batch %s ready: %w", b.ID, err)
				}
				select {
				case results <- b.Count:
					return nil
				case <-ctx.Done():
					return ctx.Err()
				}
			})
		}
		return w.Wait()
	})
	for n := range results {
		done += n
		if o.Progress != nil {
			o.Progress(done, total)
		}
	}
	return g.Wait()
}

// control returns the control item of a new batch.
func control(o Options, id record.BatchID, rs []record.Record) store.Batch {
	return store.Batch{
		ID: id, ImportID: o.ImportID, State: record.Ready, Pool: o.Pool, Kind: o.Kind, KeyID: o.KeyID,
		Pinned: !o.KeyID.IsZero(), Count: len(rs), PayloadRoot: receipt.PayloadRoot(o.Kind, rs),
	}
}
