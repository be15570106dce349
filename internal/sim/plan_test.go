package sim_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"time"
)

// Bounds that design.md states: leases, the margin inside the enclave, how far
// clock rates may be apart.
const (
	longLease  = 10 * time.Second
	shortLease = 4 * time.Second
	rateSpread = 0.005 // of each clock
	wallSkew   = 30 * time.Second
	maxKeys    = 12
)

// plan is everything that a seed decides before the first call.
type plan struct {
	seed               uint64
	parents, enclaves  int
	keys               int
	batches, batchSize int
	pinned             int // batches of a second import that names the first key
	poison             int // records that take the enclave down
	lag                int // writes that indexes are behind
	cold               bool
	calm               bool    // answers are lost and calls fail; nothing crashes, stops or slows down
	duel               bool    // two parents, two enclaves, and mostly what makes claims overlap
	rate               float64 // of faults, by call
	slow               float64 // share of records that take long to sign
	faults             time.Duration
	leases             []time.Duration // by parent
}

func newPlan(seed uint64) plan {
	r := rand.New(rand.NewPCG(seed, 0x706c616e))
	p := plan{
		seed: seed, parents: 1 + (1+r.IntN(4))/2, enclaves: 1 + min(r.IntN(4), 1), keys: 2 + r.IntN(3),
		batches: 3 + r.IntN(4), batchSize: 1 + r.IntN(3), pinned: r.IntN(2),
		rate:   []float64{0.01, 0.03, 0.06, 0.12}[r.IntN(4)],
		slow:   []float64{0.02, 0.1, 0.3}[r.IntN(3)],
		faults: time.Duration(20+r.IntN(40)) * time.Second,
		cold:   r.IntN(4) == 0,
	}
	if r.IntN(6) == 0 {
		p.keys, p.batches, p.batchSize = maxKeys, 10, 1
	}
	if r.IntN(3) == 0 {
		p.lag = 1 + r.IntN(6)
	}
	if p.calm = r.IntN(8) == 0; !p.calm && r.IntN(3) == 0 {
		p.poison = 1 + r.IntN(2)
	}
	if p.calm {
		p.slow = 0
	}
	if p.duel = seed%4 == 0; p.duel {
		p.parents, p.enclaves, p.keys, p.batches, p.batchSize, p.pinned, p.poison = 2, 2, 2, 8, 1, 0, 0
		p.rate, p.slow, p.calm, p.cold, p.lag = 0.01, 0.05, false, false, 0
	}
	for range p.parents {
		p.leases = append(p.leases, []time.Duration{longLease, shortLease}[r.IntN(2)])
	}
	if p.duel {
		p.leases = []time.Duration{longLease, shortLease}
	}
	return p
}

func (p *plan) String() string {
	return fmt.Sprintf("seed %d: %d parents (leases %v), %d enclaves, %d keys, %d+%d batches of %d, %d poison, lag %d, cold %t, calm %t, duel %t, fault rate %g, slow %g, faults for %s",
		p.seed, p.parents, p.leases, p.enclaves, p.keys, p.batches, p.pinned, p.batchSize, p.poison, p.lag, p.cold, p.calm, p.duel, p.rate, p.slow, p.faults)
}

// payload of record i of an import; the poisoned ones say so.
func (p *plan) payload(imp string, i int) string {
	if imp == freeImport && i%5 == 1 && i/5 < p.poison {
		return fmt.Sprintf("poison %s %d", imp, i)
	}
	return fmt.Sprintf("good %s %d", imp, i)
}

func isPoison(payload string) bool { return strings.HasPrefix(payload, "poison") }
