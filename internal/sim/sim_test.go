package sim_test

import (
	"flag"
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

var seedFlag = flag.Uint64("seed", 0, "schedule that TestReplay runs")

// maxFailed schedules are reported, then no more are run.
const maxFailed = 5

// schedules is how many TestSchedules runs.
func schedules(t *testing.T) int {
	t.Helper()
	if s := os.Getenv("KEYHOLD_SIM_SCHEDULES"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatalf("KEYHOLD_SIM_SCHEDULES: %v", err)
		}
		return n
	}
	if testing.Short() {
		return 20
	}
	return 200
}

// schedule runs one seed in a bubble of its own.
func schedule(t *testing.T, seed uint64, k *keys) *world {
	t.Helper()
	var w *world
	synctest.Test(t, func(t *testing.T) {
		w = newWorld(t, newPlan(seed), k)
		w.run()
	})
	return w
}

func TestEverySeededScheduleKeepsThePromises(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(800))
	k := makeKeys(t)
	n := schedules(t)
	onlyFirst := os.Getenv("KEYHOLD_SIM_STOP") != ""
	var next, failed atomic.Int64
	var mu sync.Mutex
	var all coverage
	var virtual time.Duration
	var calls, overtook int
	t.Run("schedules", func(t *testing.T) {
		for i := range 2 {
			t.Run(fmt.Sprint(i), func(t *testing.T) {
				t.Parallel()
				for seed := next.Add(1); seed <= int64(n) && failed.Load() < maxFailed; seed = next.Add(1) {
					w := schedule(t, uint64(seed), k)
					if len(w.judge.verdicts) > 0 {
						failed.Add(1)
						report(t, w)
						if onlyFirst {
							failed.Add(maxFailed)
						}
					}
					mu.Lock()
					all.merge(&w.cover)
					virtual += w.lasted
					calls += len(w.trace.events)
					overtook = max(overtook, w.judge.overtook)
					mu.Unlock()
				}
			})
		}
	})
	table, missing := all.table()
	t.Logf("%d schedules, %d effects on tables and enclaves, %s of simulated time, at most %d older idle keys overtaken\n%s",
		n, calls, virtual.Round(time.Minute), overtook, table)
	if n >= 5000 && len(missing) > 0 {
		t.Errorf("never reached: %s", strings.Join(missing, ", "))
	}
}

// report says what was broken and how to see it again.
func report(t *testing.T, w *world) {
	t.Helper()
	t.Errorf("%s\n  %s\nreplay: go test ./internal/sim -run TestReplay -seed=%d -v", &w.plan, strings.Join(w.judge.verdicts, "\n  "), w.plan.seed)
}

// TestReplay prints everything that happens in the schedule of -seed.
func TestReplay(t *testing.T) {
	if *seedFlag == 0 {
		t.Skip("give -seed=N")
	}
	w := schedule(t, *seedFlag, makeKeys(t))
	t.Log(&w.plan)
	for _, line := range w.trace.lines() {
		t.Log(line)
	}
	if len(w.judge.verdicts) > 0 {
		report(t, w)
	}
}

func TestOneSeedGivesOneSequenceOfCalls(t *testing.T) {
	k := makeKeys(t)
	seeds := uint64(min(200, schedules(t)/4))
	for seed := uint64(1); seed <= seeds; seed++ {
		one, two := schedule(t, seed, k).trace.lines(), schedule(t, seed, k).trace.lines()
		if slices.Equal(one, two) {
			continue
		}
		i := 0
		for i < min(len(one), len(two)) && one[i] == two[i] {
			i++
		}
		t.Errorf("seed %d: %d and %d effects, the first that differs is %d\n%s\n--\n%s", seed, len(one), len(two), i,
			strings.Join(one[max(0, i-4):min(i+3, len(one))], "\n"), strings.Join(two[max(0, i-4):min(i+3, len(two))], "\n"))
	}
}
