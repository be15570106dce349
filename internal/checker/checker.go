// Package checker reads what a run left in the tables and in its exports, and judges it by what the
// documents promise: G1, G2, G4, G5 and H3. It shares no code with parent and enclave, writes nothing, and
// takes no word of theirs for anything: it has its own reading of items, CBOR, segments and documents, its own
// roots, and other cryptographic code.
package checker

import (
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/keyhold/keyhold/internal/e2e"
)

// maxFindings that are told; all are counted.
const maxFindings = 20

// Options say where the tables are and what they must show.
type Options struct {
	Endpoint string // of a DynamoDB on this machine
	Prefix   string // of the tables
	Root     *x509.Certificate
	PCR0     []byte
	Config   []byte    // as it was measured
	InFlight int       // claims that may be in flight at once: the bound of G4; 0 leaves G4 out
	Export   io.Reader // of `keyhold-local run --export`, nil: none
	History  io.Reader // of `keyhold-local run --history`, nil: none
}

// Report is what was found.
type Report struct {
	Imports, Batches, Records    int
	Signed, Refused, Quarantined int // records
	Boots, Receipts              int // that were proven
	Keys                         int
	Attempts                     int // claims of signed batches that the control items still name
	Judged                       int // claims whose choice of key was compared with G4
	Overtaken                    int // older idle keys that one of them passed over at most
	Wrong                        int // findings, told or not
	Findings                     []string
}

// attempt is one claim in a control item.
type attempt struct {
	owner    string
	keyFence uint64
	end      string
}

// control is a batch's item.
type control struct {
	id, imported, state, pool, kind string
	key, boot                       string
	owner                           string
	fence, keyFence                 uint64
	used, usedBefore                uint64
	lease                           time.Duration
	count, refused                  uint64
	root                            []byte
	attempts                        []attempt
	claimed, committed              time.Time
	receipt                         place
}

// lease is a key's item.
type lease struct {
	fence, used uint64
	owner       string
}

// run is one check.
type run struct {
	o        Options
	db       database
	batches  map[string]*control
	imports  map[string][2]uint64 // batches and records of each
	leases   map[string]lease
	keys     map[string]bool
	boots    map[string]*boot
	receipts map[place]*receipt
	signed   map[place][]byte
	segments map[string]segments // by batch
	refs     map[string]ref      // records that came with an id

	mu      sync.Mutex // guards what follows while batches are checked
	report  Report
	records map[string]fingerprint // by record id
}

type ref struct {
	batch string
	index uint64
}

// Run reads everything and judges it. An error says that it could not be read; what is wrong with it is in
// the report.
func Run(ctx context.Context, o Options) (Report, error) {
	r := &run{
		o: o, db: database{endpoint: o.Endpoint, prefix: o.Prefix},
		batches: map[string]*control{}, imports: map[string][2]uint64{}, leases: map[string]lease{}, keys: map[string]bool{},
		boots: map[string]*boot{}, receipts: map[place]*receipt{}, signed: map[place][]byte{},
		segments: map[string]segments{}, refs: map[string]ref{}, records: map[string]fingerprint{},
	}
	if err := r.read(ctx); err != nil {
		return Report{}, err
	}
	r.proveBoots()
	r.openReceipts()
	if err := r.checkSegments(ctx); err != nil {
		return Report{}, err
	}
	r.checkTotals()
	history := r.history()
	if err := e2e.Check(history); err != nil {
		r.found("G2: %v", err)
	}
	r.checkLeases(history)
	if o.InFlight > 0 {
		r.checkOrder(history)
	}
	if err := r.checkFiles(history); err != nil {
		return Report{}, err
	}
	r.report.Batches, r.report.Imports, r.report.Keys = len(r.batches), len(r.imports), len(r.keys)
	return r.report, nil
}

func (r *run) found(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.report.Wrong++; len(r.report.Findings) < maxFindings {
		r.report.Findings = append(r.report.Findings, fmt.Sprintf(format, args...))
	}
}

func (r *run) proveBoots() {
	w := wanted{root: r.o.Root, pcr0: r.o.PCR0, config: r.o.Config}
	for id, b := range r.boots {
		if err := b.prove(w); err != nil {
			r.found("H3: boot %x: %v", id[:4], err)
			continue
		}
		r.report.Boots++
	}
}

func (r *run) openReceipts() {
	for at, signed := range r.signed {
		b, known := r.boots[at.boot]
		if !known {
			r.found("H3: receipt %s: its boot is not there", at)
			continue
		}
		if b.key == nil {
			continue // the boot was found wrong
		}
		opened, err := openReceipt(at, signed, b.key)
		if err != nil {
			r.found("H3: receipt %s: %v", at, err)
			continue
		}
		r.receipts[at] = opened
		r.report.Receipts++
		if opened.subject == "batch" && !r.keys[opened.key] {
			r.found("H3: receipt %s: its key is not in the keyring", at)
		}
	}
	checkLanes(r.receipts, r.found)
}
