// Package audit verifies what the tables say was signed: every signature, and
// every receipt up to the AWS root. It believes nothing that it has not verified
// and shares no code with the pipeline that wrote it.
package audit

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/internal/payload"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/export"
	"github.com/keyhold/keyhold/parent/store"
)

// kept bounds the problems that a report names; the rest is counted.
const kept = 100

// Store is what an audit reads.
type Store interface {
	export.Store
	Boots(ctx context.Context) ([]store.Boot, error)
	Receipts(ctx context.Context, boot record.BootID, lane uint32, from uint64, f func(store.Receipt) error) error
}

// Options of an audit.
type Options struct {
	Imports  []record.ImportID                // empty: all
	Receipts bool                             // verify boots, lanes and receipts too, not only signatures
	Root     attestation.Root                 // for the boot documents
	Images   []attestation.Image              // wanted pairs of PCR0 and PCR16
	Progress func(records int)                // records looked at so far; may be nil
	Each     func(it export.Item, sound bool) // every batch with what was found of it; may be nil
}

// Report says what was verified. Where Problems is 0 all of it was sound.
type Report struct {
	Boots    int `json:"boots"`
	Lanes    int `json:"lanes"`
	Receipts int `json:"receipts"`
	Batches  int `json:"batches"`
	Records  int `json:"records"`
	Signed   int `json:"signed"`
	Refused  int `json:"refused"`
	Open     int `json:"open"`     // records that are in no final state
	Verified int `json:"verified"` // signatures that verify
	Proved   int `json:"proved"`   // of them, those whose receipt verifies up to the root
	Problems int `json:"problems"`

	Findings []string `json:"findings"` // the first 100 problems
}

// auditor gathers a report from several goroutines.
type auditor struct {
	s     Store
	o     Options
	boots map[record.BootID]*boot

	mu   sync.Mutex
	r    Report
	seen map[record.BatchID]claimOf // what the lanes say of each batch
}

// claimOf is what a receipt says a batch was signed as.
type claimOf struct {
	key  record.KeyID
	root [32]byte
}

// Run verifies and reports. The error is refusal.ReceiptInvalid where there are
// problems; the report says which. Any other error means that the audit could
// not be carried out.
func Run(ctx context.Context, s Store, o Options) (Report, error) {
	a := &auditor{s: s, o: o, boots: map[record.BootID]*boot{}, seen: map[record.BatchID]claimOf{}}
	a.r.Findings = []string{}
	if o.Receipts {
		if err := a.walkBoots(ctx); err != nil {
			return a.r, err
		}
	}
	imports, err := export.Selected(ctx, s, o.Imports)
	if err != nil {
		return a.r, err
	}
	if err := a.walkBatches(ctx, imports); err != nil {
		return a.r, err
	}
	if a.r.Problems > 0 {
		return a.r, fmt.Errorf("%d problems found: %w", a.r.Problems, refusal.ReceiptInvalid)
	}
	return a.r, nil
}

func (a *auditor) problem(format string, args ...any) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.r.Problems++
	if len(a.r.Findings) < kept {
		a.r.Findings = append(a.r.Findings, fmt.Sprintf(format, args...))
	}
}

// walkBatches verifies on all cores; the walk reads ahead of them.
func (a *auditor) walkBatches(ctx context.Context, imports []store.Import) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0) + 1)
	var each sync.Mutex
	err := export.Walk(ctx, a.s, imports, func(it export.Item) error {
		g.Go(func() error {
			sound := a.batch(&it)
			if a.o.Each != nil {
				each.Lock()
				defer each.Unlock()
				a.o.Each(it, sound)
			}
			return ctx.Err()
		})
		return nil
	})
	return errors.Join(err, g.Wait())
}

// batch verifies one batch and reports whether it is sound.
func (a *auditor) batch(it *export.Item) bool {
	signed, refused, verified, err := signatures(it)
	if err == nil && a.o.Receipts && it.Batch.State == record.Signed {
		err = a.proof(it)
	}
	if err != nil {
		a.problem("batch %s: %v", it.Batch.ID, err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.r.Batches++
	a.r.Records += it.Batch.Count
	a.r.Signed += signed
	a.r.Refused += refused
	a.r.Open += it.Batch.Count - signed - refused
	a.r.Verified += verified
	if err == nil && a.o.Receipts {
		a.r.Proved += verified
	}
	if a.o.Progress != nil {
		a.o.Progress(a.r.Records)
	}
	return err == nil
}

// signatures verifies every signature of a SIGNED batch.
func signatures(it *export.Item) (signed, refused, verified int, err error) {
	if it.Problem != nil {
		return 0, 0, 0, it.Problem
	}
	b := &it.Batch
	if root := receipt.PayloadRoot(b.Kind, it.Records); root != b.PayloadRoot {
		return 0, 0, 0, errors.New("the payload is not the one that was imported")
	}
	if b.State != record.Signed {
		return 0, 0, 0, nil
	}
	for i, o := range it.Outcomes {
		if o.Refusal != "" {
			refused++
			continue
		}
		signed++
		if it.Key == nil {
			return signed, refused, verified, errors.New("signed, but its key is not there")
		}
		if e := payload.Verify(it.Key.Algorithm, it.Key.PublicKey, b.Kind, it.Records[i].Payload, o.Signature); e != nil {
			err = fmt.Errorf("record %d: %w", i, e)
			continue
		}
		verified++
	}
	if err == nil && refused != b.Refused {
		err = fmt.Errorf("says that %d records were refused, but %d are", b.Refused, refused)
	}
	return signed, refused, verified, err
}

// proof checks a signed batch against its receipt.
func (a *auditor) proof(it *export.Item) error {
	b := &it.Batch
	if b.Receipt.Seq == 0 {
		if b.Refused != b.Count {
			return errors.New("signed without a receipt")
		}
		return nil
	}
	boot, ok := a.boots[b.Receipt.BootID]
	if !ok || boot.public == nil {
		return fmt.Errorf("its boot %s is not there or does not verify", b.Receipt.BootID)
	}
	r, err := receipt.OpenReceipt(boot.public, it.Receipt)
	if err != nil {
		return fmt.Errorf("its receipt: %w", err)
	}
	if err := aboutBatch(r, it, boot.statement); err != nil {
		return err
	}
	switch {
	case int(r.Count) != b.Count || r.PayloadRoot != b.PayloadRoot:
		return errors.New("its receipt is for another payload")
	case r.ResultRoot != receipt.ResultRoot(it.Outcomes):
		return errors.New("its result is not the one that the enclave gave")
	}
	return nil
}

// aboutBatch checks that a verified receipt stands where the batch says, and
// names its batch, claim and key.
func aboutBatch(r *receipt.Receipt, it *export.Item, s *receipt.Statement) error {
	b := &it.Batch
	switch {
	case r.Lane != b.Receipt.Lane || r.Seq != b.Receipt.Seq:
		return errors.New("its receipt stands at another place of the lane")
	case r.Subject != receipt.SubjectBatch || r.BatchID != b.ID || r.ImportID != b.ImportID:
		return errors.New("its receipt is about something else")
	case r.KeyID != b.KeyID || r.BatchFence != b.Fence || r.KeyFence != b.KeyFence:
		return errors.New("its receipt names another key or fence")
	case it.Key == nil || r.Algorithm != it.Key.Algorithm || string(r.PublicKey) != string(it.Key.PublicKey):
		return errors.New("its receipt names another public key")
	case it.Key.Fingerprint != s.Fingerprint:
		return errors.New("its key is of another keyring than the boot")
	}
	return nil
}
