package fault

import (
	"hash/fnv"
	"math/rand/v2"
	"slices"
)

// Step is one line of a script: what happens to the nth call of an operation.
type Step struct {
	Operation string // empty: any, and Nth counts all calls
	Nth       int    // from 1
	Fault     Fault
}

// Script plays the steps; every other call goes through. The first step that fits a call is taken.
func Script(steps ...Step) Choose {
	steps = slices.Clone(steps)
	return func(c Call) Fault {
		for _, s := range steps {
			named := s.Operation == c.Operation && s.Nth == c.Nth
			unnamed := s.Operation == "" && s.Nth == c.Overall
			if named || unnamed {
				return s.Fault
			}
		}
		return Fault{}
	}
}

// Rate is how likely a fault is, from 0 to 1.
type Rate struct {
	Fault       Fault
	Probability float64
	Operations  []string // empty: all
}

// Random draws a fault for each call, at most one of the rates at a time; their probabilities add up.
// What happens to the nth call of an operation depends on the seed alone, whatever other goroutines do.
func Random(seed uint64, rates ...Rate) Choose {
	rates = slices.Clone(rates)
	return func(c Call) Fault {
		draw := source(seed, c).Float64()
		for _, r := range rates {
			if len(r.Operations) > 0 && !slices.Contains(r.Operations, c.Operation) {
				continue
			}
			if draw < r.Probability {
				return r.Fault
			}
			draw -= r.Probability
		}
		return Fault{}
	}
}

func source(seed uint64, c Call) *rand.Rand {
	h := fnv.New64a()
	_, _ = h.Write([]byte(c.Operation))                         // a hash.Hash never fails
	return rand.New(rand.NewPCG(seed, h.Sum64()+uint64(c.Nth))) //nolint:gosec // repeatable by intention, and no secret
}

// First asks each in turn and takes the first fault that one of them wants.
func First(choices ...Choose) Choose {
	return func(c Call) Fault {
		for _, choose := range choices {
			if f := choose(c); f != (Fault{}) {
				return f
			}
		}
		return Fault{}
	}
}
