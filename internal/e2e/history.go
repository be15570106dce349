// Package e2e judges a run by the history that it left behind: whether a key was ever in two hands, a
// batch under two keys, or an older key passed over. It shares no code with what made the history, and
// refuses a line with a field that it does not know.
package e2e

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"
)

// Batch is one line of `keyhold-local run --history`.
type Batch struct {
	BatchID     string    `json:"batch_id"`
	ImportID    string    `json:"import_id"`
	State       string    `json:"state"`
	KeyID       string    `json:"key_id"`
	Fence       uint64    `json:"fence"`
	KeyFence    uint64    `json:"key_fence"`
	Used        uint64    `json:"used"`        // stamp that the last claim gave the key
	UsedBefore  uint64    `json:"used_before"` // stamp that the key had before
	Attempts    []Attempt `json:"attempts"`
	RecordCount int       `json:"record_count"`
	Owner       string    `json:"owner"`
	BootID      string    `json:"boot_id"`
	ClaimedAt   time.Time `json:"claimed_at"`
	CommittedAt time.Time `json:"committed_at"` // taken right before the commit
	Receipt     *Receipt  `json:"receipt"`
}

// Attempt is one claim of a batch.
type Attempt struct {
	Owner    string `json:"owner"`
	KeyFence uint64 `json:"key_fence"`
	End      string `json:"end"`
}

// Receipt is where a batch's receipt stands.
type Receipt struct {
	BootID string `json:"boot_id"`
	Lane   uint32 `json:"lane"`
	Seq    uint64 `json:"seq"`
	Signed []byte `json:"signed"`
}

// keptAttempts is how many of the newest attempts a history names.
const keptAttempts = 5

// maxLine bounds one line of a history, in bytes.
const maxLine = 1 << 20

// ReadHistory reads JSON Lines.
func ReadHistory(r io.Reader) ([]Batch, error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxLine)
	var history []Batch
	for lines.Scan() {
		var b Batch
		if err := decodeLine(lines.Bytes(), &b); err != nil {
			return nil, fmt.Errorf("history line %d: %w", len(history)+1, err)
		}
		history = append(history, b)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read the history: %w", err)
	}
	return history, nil
}

// Check reports everything that contradicts G1 and G2 for a run in which every batch was signed: each
// batch under one key and one receipt, no two uses of one key at once, and none that the key's own
// numbers do not place between its neighbours.
func Check(history []Batch) error {
	var errs []error
	keys := map[string][]Batch{}
	batches, receipts := map[string]bool{}, map[[3]any]string{}
	for _, b := range history {
		if batches[b.BatchID] {
			errs = append(errs, fmt.Errorf("batch %s stands twice", b.BatchID))
		}
		batches[b.BatchID] = true
		if err := b.check(); err != nil {
			errs = append(errs, fmt.Errorf("batch %s: %w", b.BatchID, err))
			continue
		}
		at := [3]any{b.Receipt.BootID, b.Receipt.Lane, b.Receipt.Seq}
		if other, taken := receipts[at]; taken {
			errs = append(errs, fmt.Errorf("batches %s and %s have one receipt", other, b.BatchID))
		}
		receipts[at] = b.BatchID
		keys[b.KeyID] = append(keys[b.KeyID], b)
	}
	for id, uses := range keys {
		if err := checkKey(uses); err != nil {
			errs = append(errs, fmt.Errorf("key %s: %w", id, err))
		}
	}
	return errors.Join(errs...)
}

// check looks at one batch alone.
func (b *Batch) check() error {
	var errs []error
	want := func(ok bool, text string) {
		if !ok {
			errs = append(errs, errors.New(text))
		}
	}
	want(b.State == "SIGNED", "it is not signed")
	want(b.KeyID != "" && b.Owner != "" && b.BootID != "", "it names no key, owner or boot")
	want(b.Fence > 0 && b.KeyFence > 0, "a fence is missing")
	want(b.UsedBefore < b.Used, "its key's stamp did not grow")
	want(!b.ClaimedAt.IsZero() && !b.CommittedAt.Before(b.ClaimedAt), "it was committed before it was claimed")
	want(b.Receipt != nil && b.Receipt.BootID == b.BootID && b.Receipt.Seq > 0 && len(b.Receipt.Signed) > 0, "it has no receipt of its boot")
	want(len(b.Attempts) > 0 && len(b.Attempts) <= keptAttempts, "its attempts are missing, or too many")
	for i, a := range b.Attempts {
		last := i == len(b.Attempts)-1
		want((a.End == "signed") == last, "an attempt other than the last signed, or the last did not")
		want(i == 0 || b.Attempts[i-1].KeyFence < a.KeyFence, "the key's fence did not grow between two attempts")
		want(!last || a.Owner == b.Owner && a.KeyFence == b.KeyFence, "the last attempt is not the one that committed")
	}
	return errors.Join(errs...)
}

// checkKey looks at all uses of one key.
func checkKey(uses []Batch) error {
	var errs []error
	slices.SortFunc(uses, func(a, b Batch) int { return cmp.Compare(a.KeyFence, b.KeyFence) })
	fences := map[uint64]string{}
	for i, b := range uses {
		for _, a := range b.Attempts {
			if other, taken := fences[a.KeyFence]; taken {
				errs = append(errs, fmt.Errorf("fence %d was given to %s and to %s", a.KeyFence, other, b.BatchID))
			}
			fences[a.KeyFence] = b.BatchID
		}
		if i == 0 {
			if b.KeyFence == 1 && b.UsedBefore != 0 {
				errs = append(errs, fmt.Errorf("%s was the first use, of a key that had a stamp", b.BatchID))
			}
			continue
		}
		if err := follows(uses[i-1], b); err != nil {
			errs = append(errs, fmt.Errorf("%s after %s: %w", b.BatchID, uses[i-1].BatchID, err))
		}
	}
	return errors.Join(errs...)
}

// follows: b is the next batch that was committed with a's key. Between the two there may have been
// claims that came to nothing.
func follows(a, b Batch) error {
	switch {
	case b.KeyFence == a.KeyFence+1 && b.UsedBefore != a.Used:
		return errors.New("the stamps do not join, although the fences do")
	case b.UsedBefore < a.Used:
		return errors.New("the stamp went back")
	case b.ClaimedAt.Before(a.CommittedAt):
		return errors.New("it was claimed before the other was committed")
	}
	return nil
}

// Overtaken is what a history says about G4.
type Overtaken struct {
	Most  int    // older idle keys that one claim passed over
	Batch string // that claim
	Total int    // over all claims
}

// CountOvertaken counts the idle keys that were older than the one that a claim took. The pool has this
// many keys; those that the history does not name were never used. It is meant for a run without
// faults, in which every claim came to a commit.
func CountOvertaken(history []Batch, keys int) Overtaken {
	type use struct {
		used uint64
		free time.Time
	}
	claims := slices.Clone(history)
	slices.SortFunc(claims, func(a, b Batch) int {
		return cmp.Or(a.ClaimedAt.Compare(b.ClaimedAt), cmp.Compare(a.Used, b.Used))
	})
	var worst Overtaken
	last := map[string]use{}
	for _, b := range claims {
		n := 0
		if b.UsedBefore > 0 {
			n = keys - len(last)
		}
		for id, u := range last {
			if id != b.KeyID && u.used < b.UsedBefore && u.free.Before(b.ClaimedAt) {
				n++
			}
		}
		if worst.Total += n; n > worst.Most {
			worst.Most, worst.Batch = n, b.BatchID
		}
		last[b.KeyID] = use{b.Used, b.CommittedAt}
	}
	return worst
}

// decodeLine reads one JSON object and nothing after it.
func decodeLine(line []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return fmt.Errorf("decode: %w", err)
	}
	if dec.More() {
		return errors.New("something follows the object")
	}
	return nil
}
