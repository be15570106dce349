package dynamo_test

import (
	"slices"
	"testing"

	"github.com/keyhold/keyhold/internal/awslocal/fault"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/dynamo"
	"github.com/keyhold/keyhold/parent/store/storetest"
)

// The SDK tries again below the store, so a write whose answer was lost meets
// what other clients made of its item meanwhile.
func TestConcurrentHistoriesOfDynamoDBHaveAnOrder(t *testing.T) {
	rounds := 12
	if testing.Short() {
		rounds = 2
	}
	v := storetest.Linear{
		Rounds: rounds, Clients: 5, Steps: 40,
		Open: func(t *testing.T, seed uint64) (clean, clients store.Store) {
			t.Helper()
			name := prefix()
			return newStore(t, dynamo.Options{Prefix: name}), faulty(t, name, unluckyWrites(seed))
		},
	}.Run(t)
	t.Log(v)
	if v.Rejected > 0 || v.Undecided > 0 || v.Calls < 100*rounds || v.Unknown == 0 {
		t.Errorf("%v", v)
	}
}

// unluckyWrites makes four in ten writes fail in some way. Some of them fail so
// often in a row that their outcome stays unknown.
func unluckyWrites(seed uint64) fault.Choose {
	rate := func(k fault.Kind, p float64) fault.Rate {
		return fault.Rate{Fault: fault.Fault{Kind: k}, Probability: p, Operations: slices.Clone(writes)}
	}
	return fault.Random(seed,
		rate(fault.DropAnswer, 0.15), rate(fault.CutAnswer, 0.05), rate(fault.DropRequest, 0.1),
		rate(fault.ServerError, 0.05), rate(fault.TransactionConflict, 0.05),
	)
}
