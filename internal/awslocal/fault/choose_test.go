package fault_test

import (
	"math"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/awslocal/fault"
)

func TestAScriptPlaysTheFirstStepThatFits(t *testing.T) {
	drop, slow := fault.Fault{Kind: fault.DropAnswer}, fault.Fault{Before: time.Second}
	choose := fault.Script(
		fault.Step{Operation: "PutItem", Nth: 2, Fault: drop},
		fault.Step{Nth: 5, Fault: slow},
		fault.Step{Operation: "Query", Nth: 1, Fault: fault.Fault{}}, // goes through, in spite of the next
		fault.Step{Nth: 7, Fault: drop},
	)
	for _, tc := range []struct {
		call fault.Call
		want fault.Fault
	}{
		{fault.Call{Operation: "PutItem", Nth: 1, Overall: 1}, fault.Fault{}},
		{fault.Call{Operation: "PutItem", Nth: 2, Overall: 5}, drop},
		{fault.Call{Operation: "GetItem", Nth: 2, Overall: 4}, fault.Fault{}},
		{fault.Call{Operation: "GetItem", Nth: 3, Overall: 5}, slow},
		{fault.Call{Operation: "Query", Nth: 1, Overall: 7}, fault.Fault{}},
		{fault.Call{Operation: "Query", Nth: 2, Overall: 7}, drop},
	} {
		if got := choose(tc.call); got != tc.want {
			t.Errorf("%+v: %+v, want %+v", tc.call, got, tc.want)
		}
	}
}

func TestRandomFaultsFollowTheirRates(t *testing.T) {
	const calls = 20_000
	choose := fault.Random(7,
		fault.Rate{Fault: fault.Fault{Kind: fault.Throttle}, Probability: 0.2},
		fault.Rate{Fault: fault.Fault{Kind: fault.DropAnswer}, Probability: 0.1, Operations: []string{"TransactWriteItems"}},
		fault.Rate{Fault: fault.Fault{Kind: fault.ServerError}, Probability: 0.3},
	)
	for _, tc := range []struct {
		operation string
		want      map[fault.Kind]float64
	}{
		{"TransactWriteItems", map[fault.Kind]float64{fault.None: 0.4, fault.Throttle: 0.2, fault.DropAnswer: 0.1, fault.ServerError: 0.3}},
		{"Query", map[fault.Kind]float64{fault.None: 0.5, fault.Throttle: 0.2, fault.ServerError: 0.3}},
	} {
		counts := map[fault.Kind]int{}
		for n := range calls {
			counts[choose(fault.Call{Operation: tc.operation, Nth: n + 1}).Kind]++
		}
		for kind := fault.None; kind <= fault.CutAnswer; kind++ {
			want := tc.want[kind]
			// Five standard deviations of a binomial distribution: the seed is fixed, so it holds always or never.
			tolerance := 5 * math.Sqrt(want*(1-want)/calls)
			if got := float64(counts[kind]) / calls; math.Abs(got-want) > tolerance {
				t.Errorf("%s: %v at a rate of %.4f, want %.2f", tc.operation, kind, got, want)
			}
		}
	}
}

func TestRandomFaultsDependOnTheSeedAlone(t *testing.T) {
	rate := fault.Rate{Fault: fault.Fault{Kind: fault.Throttle}, Probability: 0.5}
	faults := func(seed uint64, order []int) map[int]fault.Kind {
		choose := fault.Random(seed, rate)
		got := map[int]fault.Kind{}
		for _, n := range order {
			got[n] = choose(fault.Call{Operation: "PutItem", Nth: n}).Kind
		}
		return got
	}
	forward, backward := make([]int, 200), make([]int, 200)
	for i := range forward {
		forward[i], backward[i] = i+1, 200-i
	}
	if diff := cmp.Diff(faults(1, forward), faults(1, backward)); diff != "" {
		t.Errorf("one seed, two orders (-forward +backward):\n%s", diff)
	}
	if cmp.Equal(faults(1, forward), faults(2, forward)) {
		t.Error("two seeds give the same 200 faults")
	}
}

func TestFirstTakesTheFirstFaultThatIsWanted(t *testing.T) {
	choose := fault.First(
		fault.Script(fault.Step{Nth: 1, Fault: fault.Fault{Kind: fault.Throttle}}),
		fault.Script(
			fault.Step{Nth: 1, Fault: fault.Fault{Kind: fault.DropAnswer}},
			fault.Step{Nth: 2, Fault: fault.Fault{Kind: fault.DropRequest}}),
	)
	for n, want := range []fault.Kind{fault.Throttle, fault.DropRequest, fault.None} {
		if got := choose(fault.Call{Operation: "Query", Nth: 1, Overall: n + 1}).Kind; got != want {
			t.Errorf("call %d: %v, want %v", n+1, got, want)
		}
	}
}
