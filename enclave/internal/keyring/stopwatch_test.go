package keyring_test

import (
	"slices"
	"time"
)

// stopwatch gathers the times of many short runs. Their median does not see
// that other programs took the processor now and then.
type stopwatch struct{ samples []time.Duration }

func (w *stopwatch) run(f func()) {
	start := time.Now()
	f()
	w.samples = append(w.samples, time.Since(start))
}

// median is in nanoseconds.
func (w *stopwatch) median() float64 {
	slices.Sort(w.samples)
	return float64(w.samples[len(w.samples)/2])
}
