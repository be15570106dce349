// Package audit verifies what the tables say was signed: every signature, and
// every receipt up to the AWS root. It believes nothing that it has not verified
// and shares no code with the pipeline that wrote it.
package audit

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/internal/config"
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
	Keys(ctx context.Context, keyring string, f func([]store.Key) error) error
	Receipts(ctx context.Context, boot record.BootID, lane uint32, from uint64, f func(store.Receipt) error) error
}

// Options of an audit.
type Options struct {
	Imports  []record.ImportID                // empty: all
	Receipts bool                             // verify boots, lanes and receipts too, not only signatures
	Root     attestation.Root                 // for the boot documents
	Images   []attestation.Image              // wanted pairs of PCR0 and PCR16; both are needed
	Configs  []*config.Config                 // those of Images: policies are checked against them; empty: they are not
	Progress func(records int)                // records looked at so far; may be nil
	Each     func(it export.Item, sound bool) // every batch with what was found of it; may be nil
}

// Report says what was verified. Where Problems is 0 all of it was sound.
type Report struct {
	Boots    int `json:"boots"`
	Lanes    int `json:"lanes"`
	Receipts int `json:"receipts"`
	Keys     int `json:"keys"` // sealed keys of the boots' keyrings
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

// configRegister is the PCR that measures the config. An image without it would
// admit every config, and so every policy, that an attacker likes.
const configRegister = 16

// auditor gathers a report from several goroutines.
type auditor struct {
	s       Store
	o       Options
	configs map[[32]byte]*config.Config // by config.Hash
	boots   map[record.BootID]*boot

	each sync.Mutex // Options.Each is never called twice at once

	mu   sync.Mutex
	r    Report
	seen map[record.BatchID]*claimOf // what the lanes say of each batch
	made map[kindOfKey]int           // and of new keys
}

// laneOf names a lane.
type laneOf struct {
	boot record.BootID
	lane uint32
}

// claimOf is what a receipt says a batch was signed as.
type claimOf struct {
	key   record.KeyID
	root  [32]byte
	shown bool // the batch is in the tables
}

// Run verifies and reports. The error is refusal.ReceiptInvalid where there are
// problems; the report says which. Any other error means that the audit could
// not be carried out. Memory grows by some 200 bytes per receipt.
//
// What is read after what vouches for it is written, so that an audit beside
// running parents finds nothing that is not there: keys before receipts,
// receipts before batches.
func Run(ctx context.Context, s Store, o Options) (Report, error) {
	a := &auditor{
		s: s, o: o, configs: map[[32]byte]*config.Config{}, boots: map[record.BootID]*boot{},
		made: map[kindOfKey]int{}, seen: map[record.BatchID]*claimOf{},
	}
	a.r.Findings = []string{}
	if o.Receipts {
		if err := a.prepare(); err != nil {
			return a.r, err
		}
		if err := a.walkProofs(ctx); err != nil {
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
	if err := a.walkRest(ctx, imports); err != nil {
		return a.r, err
	}
	if a.r.Problems > 0 {
		return a.r, fmt.Errorf("%d problems found: %w", a.r.Problems, refusal.ReceiptInvalid)
	}
	return a.r, nil
}

// prepare refuses options that would prove less than they seem to.
func (a *auditor) prepare() error {
	for _, img := range a.o.Images {
		if _, ok := img.PCRs[configRegister]; !ok {
			return fmt.Errorf("audit: a wanted image names no PCR%d: %w", configRegister, refusal.UsageWrong)
		}
	}
	for _, c := range a.o.Configs {
		raw, err := config.Encode(c)
		if err != nil {
			return fmt.Errorf("audit: %w: %w", refusal.UsageWrong, err)
		}
		a.configs[config.Hash(raw)] = c
	}
	return nil
}

// walkProofs verifies boots, keys and lanes. Boots are listed again after the
// keys, for one that came and made keys in between.
func (a *auditor) walkProofs(ctx context.Context) error {
	if err := a.walkBoots(ctx); err != nil {
		return err
	}
	keys, err := a.walkKeys(ctx)
	if err != nil {
		return err
	}
	if err := a.walkBoots(ctx); err != nil {
		return err
	}
	for _, id := range slices.SortedFunc(maps.Keys(a.boots), func(x, y record.BootID) int { return slices.Compare(x[:], y[:]) }) {
		if a.boots[id].public == nil {
			continue
		}
		if err := a.walkLanes(ctx, id); err != nil {
			return err
		}
	}
	a.covered(keys)
	return nil
}

func (a *auditor) problem(format string, args ...any) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.r.Problems++
	if len(a.r.Findings) < kept {
		text := fmt.Sprintf(format, args...)
		a.r.Findings = append(a.r.Findings, strings.ReplaceAll(text, "\n", "; ")) // joined errors are one finding
	}
}

// walkBatches verifies on all cores; the walk reads ahead of them.
func (a *auditor) walkBatches(ctx context.Context, imports []store.Import) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0) + 1)
	missing := func(id record.BatchID) error {
		a.problem("batch %s: it is missing, although its import is done", id)
		return nil
	}
	err := export.WalkOver(ctx, a.s, imports, missing, func(it export.Item) error {
		g.Go(func() error {
			a.look(it)
			return ctx.Err()
		})
		return nil
	})
	return errors.Join(err, g.Wait())
}

// walkRest looks at the batches that receipts led to and the walk did not: those
// that an aborted import kept far from the others, those that a changed import
// item hides, and those that were signed and then taken out of the tables.
func (a *auditor) walkRest(ctx context.Context, imports []store.Import) error {
	known := map[record.ImportID]store.Import{}
	for _, im := range imports {
		known[im.ID] = im
	}
	for _, id := range slices.Sorted(maps.Keys(a.seen)) {
		of, _, err := id.Split()
		im, selected := known[of]
		if a.seen[id].shown || !selected && len(a.o.Imports) > 0 {
			continue
		}
		var it export.Item
		if err == nil && selected {
			it, err = export.Batch(ctx, a.s, im, id)
		} else {
			err = store.ErrNotFound
		}
		switch {
		case errors.Is(err, store.ErrNotFound):
			a.problem("batch %s: an enclave signed it, but it is not in the tables", id)
		case err != nil:
			return err
		default:
			a.look(it)
		}
	}
	return nil
}

// look verifies one batch and tells who wants to know of each.
func (a *auditor) look(it export.Item) {
	sound := a.batch(&it)
	if a.o.Each != nil {
		a.each.Lock()
		defer a.each.Unlock()
		a.o.Each(it, sound)
	}
}
