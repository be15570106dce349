package hostile_test

import (
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/keyhold/keyhold/internal/refusal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// outcome is what one try of an attack came to: the code of a refusal, or one of
// the following.
type outcome = string

const (
	// answered: the enclave did as it was asked, and the judge found nothing wrong
	// with what came out.
	answered outcome = "answered"
	// closed: the connection ended without an answer.
	closed outcome = "closed"
	// refusedAlone: the answer names the sealed key as refused; others are not hurt.
	refusedAlone outcome = "refused alone"
	// found: the verifier refuses what it is shown (keyhold receipt verify).
	found outcome = "found by verify"
	// notSeen: the verifier cannot tell. Only what the threat model lists may end so.
	notSeen outcome = "not seen"
)

func code(c refusal.Code) outcome { return string(c) }

// attack is one row of the table in docs/threat-model.md.
type attack struct {
	name    string    // what the attacker does
	promise string    // of docs/design.md, that it goes against
	gets    []outcome // what the tries must come to: all of these and no others
	run     func(t *testing.T, got *tally)
}

// attacks is the one table. Its parts stand beside what runs them.
func attacks() []attack {
	return slices.Concat(wireAttacks(), loadAttacks(), signAttacks(), bootAttacks(), kmsAttacks(), tableAttacks(), floodAttacks())
}

// tally counts the tries of one attack by what they came to.
type tally struct {
	mu sync.Mutex
	n  map[outcome]int
}

func (c *tally) got(o outcome) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n[o]++
}

// gotErr counts a try by its error, nil being answered.
func (c *tally) gotErr(err error) {
	if err == nil {
		c.got(answered)
		return
	}
	c.got(code(refusal.Of(err)))
}

func (c *tally) total() (n int) {
	for _, k := range c.n {
		n += k
	}
	return n
}

func TestEveryAttackGetsWhatItMustGet(t *testing.T) {
	total := &tally{n: map[outcome]int{}}
	all := attacks()
	t.Run("attack", func(t *testing.T) {
		for _, a := range all {
			t.Run(a.name, func(t *testing.T) {
				t.Parallel()
				c := &tally{n: map[outcome]int{}}
				a.run(t, c)
				for o, n := range c.n {
					if !slices.Contains(a.gets, o) {
						t.Errorf("%d tries came to %q", n, o)
					}
				}
				for _, o := range a.gets {
					if c.n[o] == 0 && !testing.Short() { // short runs try less
						t.Errorf("no try came to %q", o)
					}
				}
				t.Logf("%d tries: %v", c.total(), c.n)
				total.mu.Lock()
				defer total.mu.Unlock()
				for o, n := range c.n {
					total.n[o] += n
				}
			})
		}
	})
	by := slices.Sorted(maps.Keys(total.n))
	t.Logf("%d attacks, %d tries, which came to %d outcomes (%s): %v", len(all), total.total(), len(by), strings.Join(by, ", "), total.n)
}

func TestTheTableOfAttacksIsWhole(t *testing.T) {
	seen := map[string]bool{}
	for _, a := range attacks() {
		if seen[a.name] || a.name == "" || len(a.gets) == 0 || a.run == nil {
			t.Errorf("%q stands twice or lacks a part", a.name)
		}
		seen[a.name] = true
		if !slices.Contains([]string{"H1", "H2", "H3", "H4", "H5", "G3"}, a.promise) {
			t.Errorf("%q goes against no promise", a.name)
		}
		for _, o := range a.gets {
			_, isCode := refusal.Lookup(refusal.Code(o))
			if !isCode && !slices.Contains([]outcome{answered, closed, refusedAlone, found, notSeen}, o) {
				t.Errorf("%q: there is no outcome %q", a.name, o)
			}
			if o == notSeen && a.promise != "H5" {
				t.Errorf("%q may go unseen, but is not listed under H5", a.name)
			}
		}
	}
}
