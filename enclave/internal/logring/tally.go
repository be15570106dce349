package logring

import (
	"cmp"
	"slices"
	"sync"

	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

// Tally counts refusals by code. The zero value has counted none. Codes that are
// not in the table count as internal, so it never holds more than the table.
type Tally struct {
	mu sync.Mutex
	n  map[refusal.Code]uint64
}

// Add counts one more refusal with that code.
func (t *Tally) Add(code refusal.Code) {
	if _, known := refusal.Lookup(code); !known {
		code = refusal.Internal
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.n == nil {
		t.n = make(map[refusal.Code]uint64)
	}
	t.n[code]++
}

// Counts returns all counts, sorted by code.
func (t *Tally) Counts() []wire.CodeCount {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := make([]wire.CodeCount, 0, len(t.n))
	for code, n := range t.n {
		list = append(list, wire.CodeCount{Code: string(code), Count: n})
	}
	slices.SortFunc(list, func(a, b wire.CodeCount) int { return cmp.Compare(a.Code, b.Code) })
	return list
}
