package sim_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
)

// fault is what may happen at a call.
type fault string

const (
	fine          fault = ""
	throttled     fault = "throttled"      // refused, nothing done
	conflict      fault = "conflict"       // TransactionConflict: nothing done, but the caller cannot know
	failed        fault = "failed"         // the request was lost, but the caller cannot know
	answerLost    fault = "answer lost"    // done, but the caller cannot know
	diesBefore    fault = "parent dies 1"  // before the call has any effect
	diesAfter     fault = "parent dies 2"  // after it had, before the answer
	stopsBefore   fault = "parent stops 1" // for up to three leases, before
	stopsAfter    fault = "parent stops 2" // and after
	enclaveBefore fault = "enclave dies 1" // with the request on its way
	enclaveAfter  fault = "enclave dies 2" // with the answer on its way
	cutMidway     fault = "cut midway"     // the connection ends while the enclave works
	staleIndex    fault = "stale index"    // answered from the past
	slowSign      fault = "slow"           // signing takes up to more than a lease
	poisoned      fault = "poison"
)

// Steps at which faults happen.
var (
	storeReads  = []string{"ready", "idle", "batch", "lease", "payload", "key", "keyring"}
	transaction = []string{"claim", "commit", "release", "put_batch"}
	storeWrites = []string{"note_crash", "put_receipt", "put_boot", "open_import", "put_payload", "reserve", "finish_import"}
	wireSteps   = []string{"hello", "ticket", "sign", "probe", "cancel", "fence", "receipts", "load"}
)

var (
	storeFaults = []fault{throttled, failed, answerLost, diesBefore, diesAfter, stopsBefore, stopsAfter}
	wireFaults  = []fault{failed, answerLost, cutMidway, diesBefore, diesAfter, stopsBefore, stopsAfter, enclaveBefore, enclaveAfter}
)

// coverage counts faults by step, over many schedules.
type coverage struct {
	mu sync.Mutex
	n  map[fault]map[string]int
}

func (c *coverage) add(f fault, step string, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n == nil {
		c.n = map[fault]map[string]int{}
	}
	if c.n[f] == nil {
		c.n[f] = map[string]int{}
	}
	c.n[f][step] += n
}

func (c *coverage) merge(o *coverage) {
	for f, steps := range o.n {
		for step, n := range steps {
			c.add(f, step, n)
		}
	}
}

// meaningful lists the cells that a run has to reach. The others mean nothing: a
// read cannot conflict, an import talks to no enclave, what is no query has no index.
func meaningful() map[fault][]string {
	m := map[fault][]string{
		conflict: transaction, staleIndex: {"ready", "idle"},
		slowSign: {"sign", "probe"}, poisoned: {"sign", "probe"},
	}
	for _, f := range storeFaults {
		m[f] = slices.Concat(storeReads, transaction, storeWrites)
	}
	for _, f := range wireFaults {
		m[f] = append(m[f], wireSteps...)
	}
	return m
}

// table prints the counts and returns the meaningful cells without any.
func (c *coverage) table() (text string, missing []string) {
	want := meaningful()
	var b strings.Builder
	for _, steps := range [][]string{storeReads, slices.Concat(transaction, storeWrites), wireSteps} {
		fmt.Fprintf(&b, "%-15s", "")
		for _, s := range steps {
			fmt.Fprintf(&b, " %13s", s)
		}
		b.WriteByte('\n')
		for _, f := range slices.Sorted(maps.Keys(want)) {
			if !slices.ContainsFunc(steps, func(s string) bool { return slices.Contains(want[f], s) }) {
				continue
			}
			fmt.Fprintf(&b, "%-15s", f)
			for _, s := range steps {
				cell := "-"
				if slices.Contains(want[f], s) {
					if cell = fmt.Sprint(c.n[f][s]); cell == "0" {
						missing = append(missing, string(f)+" at "+s)
					}
				}
				fmt.Fprintf(&b, " %13s", cell)
			}
			b.WriteByte('\n')
		}
		b.WriteByte('\n')
	}
	return b.String(), missing
}
