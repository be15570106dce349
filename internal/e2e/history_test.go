package e2e_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/keyhold/keyhold/internal/e2e"
)

// history is a faultless run of one claimer: the keys in turn.
func history(batches, keys int) []e2e.Batch {
	begin := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	out := make([]e2e.Batch, batches)
	for i := range out {
		fence := uint64(i/keys + 1)
		claimed := begin.Add(time.Duration(i) * time.Millisecond)
		out[i] = e2e.Batch{
			BatchID: fmt.Sprintf("run-b%07d", i), ImportID: "run", State: "SIGNED", KeyID: fmt.Sprintf("k%d", i%keys),
			Fence: 1, KeyFence: fence, Used: uint64(i + 1), Attempts: []e2e.Attempt{{Owner: "p", KeyFence: fence, End: "signed"}},
			RecordCount: 10, Owner: "p", BootID: "b", ClaimedAt: claimed, CommittedAt: claimed.Add(time.Microsecond),
			Receipt: &e2e.Receipt{BootID: "b", Seq: uint64(i + 1), Signed: []byte{1}},
		}
		if i >= keys {
			out[i].UsedBefore = uint64(i + 1 - keys)
		}
	}
	return out
}

func TestAFaultlessHistoryHoldsAndSurvivesItsFile(t *testing.T) {
	t.Parallel()
	var file bytes.Buffer
	for _, b := range history(20, 4) {
		if err := json.NewEncoder(&file).Encode(b); err != nil {
			t.Fatal(err)
		}
	}
	got, err := e2e.ReadHistory(&file)
	if err != nil {
		t.Fatal(err)
	}
	if err := e2e.Check(got); err != nil {
		t.Error(err)
	}
	if over := e2e.CountOvertaken(got, 4); over != (e2e.Overtaken{}) {
		t.Errorf("overtaken %+v, want none", over)
	}
}

func TestEveryContradictionIsSeen(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, want string
		spoil      func(h []e2e.Batch)
	}{
		{"a batch that is not signed", "not signed", func(h []e2e.Batch) { h[3].State = "CLAIMED" }},
		{"a batch without a key", "no key", func(h []e2e.Batch) { h[3].KeyID = "" }},
		{"a batch that stands twice", "stands twice", func(h []e2e.Batch) { h[3].BatchID = h[9].BatchID }},
		{"a batch without a receipt", "no receipt", func(h []e2e.Batch) { h[3].Receipt = nil }},
		{"a receipt of another boot", "no receipt of its boot", func(h []e2e.Batch) { h[3].Receipt.BootID = "other" }},
		{"one receipt for two batches", "one receipt", func(h []e2e.Batch) { h[3].Receipt.Seq = h[9].Receipt.Seq }},
		{"two keys of which the second took over", "not the one that committed", func(h []e2e.Batch) { h[3].KeyFence = 7 }},
		{"a fence given twice", "was given to", func(h []e2e.Batch) {
			h[7].Attempts = []e2e.Attempt{{Owner: "q", KeyFence: 1, End: "lost"}, h[7].Attempts[0]}
		}},
		{"two attempts that signed", "other than the last signed", func(h []e2e.Batch) {
			h[3].Attempts = []e2e.Attempt{{Owner: "q", End: "signed"}, h[3].Attempts[0]}
		}},
		{"a fence that went back", "did not grow", func(h []e2e.Batch) {
			h[3].Attempts = []e2e.Attempt{{Owner: "q", KeyFence: 9, End: "lost"}, h[3].Attempts[0]}
		}},
		{"a stamp that did not grow", "did not grow", func(h []e2e.Batch) { h[3].UsedBefore = h[3].Used }},
		{"stamps that do not join", "do not join", func(h []e2e.Batch) { h[7].UsedBefore++ }},
		{"a stamp that went back", "went back", func(h []e2e.Batch) {
			h[7].KeyFence, h[7].Attempts[0].KeyFence, h[7].UsedBefore = 3, 3, 1
			h[11].KeyFence, h[11].Attempts[0].KeyFence = 4, 4
		}},
		{"a first use of a used key", "first use", func(h []e2e.Batch) { h[3].UsedBefore = 1 }},
		{"two uses of one key at once", "before the other was committed", func(h []e2e.Batch) { h[3].CommittedAt = h[8].CommittedAt }},
		{"a commit before its claim", "before it was claimed", func(h []e2e.Batch) { h[3].CommittedAt = h[2].ClaimedAt }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			h := history(12, 4)
			tc.spoil(h)
			err := e2e.Check(h)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want an error with %q", err, tc.want)
			}
		})
	}
}

func TestOvertakenKeysAreCounted(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		keys  int
		spoil func(h []e2e.Batch)
		want  int
	}{
		{"two keys change places", 4, func(h []e2e.Batch) {
			h[8].KeyID, h[9].KeyID = h[9].KeyID, h[8].KeyID
			h[8].UsedBefore, h[9].UsedBefore = h[9].UsedBefore, h[8].UsedBefore
		}, 1},
		{"one that was held meanwhile", 4, func(h []e2e.Batch) {
			h[8].KeyID, h[9].KeyID = h[9].KeyID, h[8].KeyID
			h[8].UsedBefore, h[9].UsedBefore = h[9].UsedBefore, h[8].UsedBefore
			h[4].CommittedAt = h[8].ClaimedAt.Add(1)
		}, 0},
		{"keys that are never used", 6, func([]e2e.Batch) {}, 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			h := history(12, 4)
			tc.spoil(h)
			if got := e2e.CountOvertaken(h, tc.keys); got.Most != tc.want {
				t.Errorf("overtaken %+v, want %d", got, tc.want)
			}
		})
	}
}

func TestALineThatIsNoBatchIsRefused(t *testing.T) {
	t.Parallel()
	for _, line := range []string{`{"batch_id":"a","novelty":1}`, `{} {}`, `[]`, `{"used":-1}`, `{"claimed_at":"yesterday"}`} {
		if _, err := e2e.ReadHistory(strings.NewReader(line + "\n")); err == nil {
			t.Errorf("%s was read", line)
		}
	}
}
