package pipeline_test

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store/storetest"
)

// Two parents share keys while calls fail, connections break and parents stop for
// longer than a lease. What they did to each key has an order.
func TestEachKeyIsHeldForOneBatchAtATime(t *testing.T) {
	seeds := uint64(6)
	if testing.Short() {
		seeds = 1
	}
	var all storetest.Verdict
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { all.Add(recorded(t, seed)) })
		})
	}
	t.Log(all)
}

func recorded(t *testing.T, seed uint64) storetest.Verdict {
	t.Helper()
	w := newWorld(t, plan{keys: 3, batches: 60, records: 1, seed: seed})
	h, r := &storetest.History{}, rand.New(rand.NewPCG(seed, 77))
	var tables []*faulty
	var links []*link
	var stops []func()
	for n := range 2 {
		cfg := w.config()
		tables = append(tables, (&faulty{Store: w.store, t: t}).atRandom(seed<<8+uint64(n), 0.04))
		links = append(links, newLink(w.enclaves[0], seed<<8+uint64(n), 100*time.Millisecond))
		cfg.Store, cfg.Enclaves[0].Connect = h.Client(n, tables[n]), links[n].connect
		stops = append(stops, w.start(cfg))
	}
	for range 8 {
		pass(time.Duration(100+r.IntN(400)) * time.Millisecond)
		if n := r.IntN(2); r.IntN(3) == 0 {
			tables[n].pause(lease + lease/2)
			links[n].cut()
		} else {
			links[n].cut()
		}
	}
	w.await(10*time.Minute, record.Signed)
	for _, stop := range stops {
		stop()
	}
	w.check()
	v := h.CheckLeases(t)
	if v.Rejected > 0 || v.Undecided > 0 || v.Histories < 3 {
		t.Errorf("%v", v)
	}
	return v
}
