package sim_test

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/keyhold/keyhold/internal/record"
)

// event is one effect on tables or enclaves.
type event struct {
	at                   time.Duration
	who, op, what, ended string
}

func (e event) String() string {
	return fmt.Sprintf("%14.6fs %-12s %-12s %s %s", e.at.Seconds(), e.who, e.op, e.what, e.ended)
}

// trace is what happened, in order. Boots have random names; here they are
// counted.
type trace struct {
	mu     sync.Mutex
	events []event
	over   bool     // what comes now belongs to cleaning up
	names  []string // pairs, for replacing
	boots  map[record.BootID]string
}

func (t *trace) add(start time.Time, who, op, what, ended string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over {
		return
	}
	t.events = append(t.events, event{time.Since(start), who, op, what, ended})
}

func (t *trace) stop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.over = true
}

// name replaces what in everything that is printed.
func (t *trace) name(what, by string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.names = append(t.names, what, by)
}

// boot names a boot by when it was first seen.
func (t *trace) boot(id record.BootID) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.boots == nil {
		t.boots = map[record.BootID]string{}
	}
	if t.boots[id] == "" {
		t.boots[id] = fmt.Sprintf("boot-%d", len(t.boots)+1)
	}
	return t.boots[id]
}

// lines are the events in order of time. Those of one moment, of which there are
// few, are in order of who did them.
func (t *trace) lines() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	events := slices.Clone(t.events)
	slices.SortStableFunc(events, func(a, b event) int {
		return cmp.Or(cmp.Compare(a.at, b.at), strings.Compare(a.who, b.who), strings.Compare(a.op, b.op))
	})
	names := strings.NewReplacer(t.names...)
	lines := make([]string, len(events))
	for i, e := range events {
		lines[i] = names.Replace(e.String())
	}
	return lines
}
