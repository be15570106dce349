package checker

import (
	"bufio"
	"cmp"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/keyhold/keyhold/internal/e2e"
)

// checkTotals wants all that was imported, and nothing else.
func (r *run) checkTotals() {
	batches, records := map[string]uint64{}, map[string]uint64{}
	for _, c := range r.batches {
		batches[c.imported]++
		records[c.imported] += c.count
		if _, known := r.imports[c.imported]; !known {
			r.found("G5: batch %s: its import is not there", c.id)
		}
	}
	for id, want := range r.imports {
		if got := [2]uint64{batches[id], records[id]}; got != want {
			r.found("G5: import %s: %d batches and %d records are there, want %d and %d", id, got[0], got[1], want[0], want[1])
		}
	}
	for id := range r.segments {
		if _, known := r.batches[id]; !known {
			r.found("G1: a segment of batch %s, which is not there", id)
		}
	}
}

// history returns the signed batches in the form that is exported, by batch id.
func (r *run) history() []e2e.Batch {
	var out []e2e.Batch
	for _, c := range r.batches {
		if c.state != "SIGNED" || c.receipt.seq == 0 {
			continue
		}
		b := e2e.Batch{
			BatchID: c.id, ImportID: c.imported, State: c.state, KeyID: hex.EncodeToString([]byte(c.key)),
			Fence: c.fence, KeyFence: c.keyFence, Used: c.used, UsedBefore: c.usedBefore, RecordCount: int(c.count), //nolint:gosec // 5000 at most
			Owner: c.owner, BootID: hex.EncodeToString([]byte(c.boot)), ClaimedAt: c.claimed, CommittedAt: c.committed,
			Receipt: &e2e.Receipt{
				BootID: hex.EncodeToString([]byte(c.receipt.boot)), Lane: c.receipt.lane, Seq: c.receipt.seq, Signed: r.signed[c.receipt],
			},
		}
		for _, a := range c.attempts {
			b.Attempts = append(b.Attempts, e2e.Attempt{Owner: a.owner, KeyFence: a.keyFence, End: a.end})
		}
		r.report.Attempts += len(b.Attempts)
		out = append(out, b)
	}
	slices.SortFunc(out, func(a, b e2e.Batch) int { return cmp.Compare(a.BatchID, b.BatchID) })
	return out
}

// checkLeases wants every key free in the end, and no lease behind the last use of its key.
func (r *run) checkLeases(history []e2e.Batch) {
	if len(r.leases) != len(r.keys) {
		r.found("G2: %d keys have %d leases", len(r.keys), len(r.leases))
	}
	for id, l := range r.leases {
		if l.owner != "" {
			r.found("G5: key %x is still held", id[:min(4, len(id))])
		}
	}
	for _, b := range history {
		raw, err := hex.DecodeString(b.KeyID)
		l, there := r.leases[string(raw)]
		if err != nil || !there || l.fence < b.KeyFence || l.used < b.Used {
			r.found("G2: batch %s: the lease of its key is older than it", b.BatchID)
		}
	}
}

// idle is a time in which a key is known to have been free: nobody claimed it in between, or its fence
// would have grown by more than one.
type idle struct {
	from, to time.Time
	stamp    uint64
}

// checkOrder judges first claims of batches, which are free to choose a key: how many keys were idle
// then, and older than the one chosen.
func (r *run) checkOrder(history []e2e.Batch) {
	gaps := r.idleTimes(history)
	for _, b := range history {
		if b.Fence != 1 {
			continue // a batch that was sent before stays with its key
		}
		r.report.Judged++
		n := 0
		for _, g := range gaps {
			if g.stamp < b.UsedBefore && g.from.Before(b.ClaimedAt) && g.to.After(b.ClaimedAt) {
				n++
			}
		}
		r.report.Overtaken = max(r.report.Overtaken, n)
		if n > r.o.InFlight {
			r.found("G4: batch %s: its claim overtook %d older idle keys, and %d claims can be in flight", b.BatchID, n, r.o.InFlight)
		}
	}
}

func (r *run) idleTimes(history []e2e.Batch) []idle {
	uses := map[string][]e2e.Batch{}
	for _, b := range history {
		uses[b.KeyID] = append(uses[b.KeyID], b)
	}
	end := time.Now().Add(time.Hour)
	var out []idle
	for id, l := range r.leases {
		list := uses[hex.EncodeToString([]byte(id))]
		slices.SortFunc(list, func(a, b e2e.Batch) int { return cmp.Compare(a.KeyFence, b.KeyFence) })
		last := idle{} // before its first use
		fence := uint64(0)
		for _, b := range list {
			if b.KeyFence == fence+1 {
				last.to = b.ClaimedAt
				out = append(out, last)
			}
			last, fence = idle{from: b.CommittedAt, stamp: b.Used}, b.KeyFence
		}
		if l.fence == fence {
			last.to = end
			out = append(out, last)
		}
	}
	return out
}

const maxExportLine = 1 << 20 // bytes: a payload has 64 KiB

// checkFiles wants exports to say what the tables say.
func (r *run) checkFiles(history []e2e.Batch) error {
	if r.o.History != nil {
		exported, err := e2e.ReadHistory(r.o.History)
		if err != nil {
			return fmt.Errorf("read the history: %w", err)
		}
		if !sameHistory(history, exported) {
			r.found("H3: the exported history is not that of the tables")
		}
	}
	if r.o.Export == nil {
		return nil
	}
	lines := bufio.NewScanner(r.o.Export)
	lines.Buffer(nil, maxExportLine)
	n := 0
	for ; lines.Scan(); n++ {
		var l line
		if err := json.Unmarshal(lines.Bytes(), &l); err != nil {
			return fmt.Errorf("export line %d: %w", n+1, err)
		}
		if want, there := r.records[l.RecordID]; !there || l.fingerprint() != want {
			r.found("H3: export line %d: it does not say what the tables say", n+1)
		}
		delete(r.records, l.RecordID)
	}
	if len(r.records) != 0 {
		r.found("G5: %d records are missing in the export", len(r.records))
	}
	return errors.Join(lines.Err())
}

func sameHistory(tables, exported []e2e.Batch) bool {
	signed := slices.DeleteFunc(slices.Clone(exported), func(b e2e.Batch) bool { return b.State != "SIGNED" || b.Receipt == nil })
	slices.SortFunc(signed, func(a, b e2e.Batch) int { return cmp.Compare(a.BatchID, b.BatchID) })
	x, errX := json.Marshal(tables)
	y, errY := json.Marshal(signed)
	return errX == nil && errY == nil && string(x) == string(y)
}
