package pipeline_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhold/keyhold/internal/record"
)

func TestEveryRecordIsSignedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, plan{keys: 20, batches: 200, records: 3})
		stop := w.start(w.config())
		w.await(time.Minute, record.Signed)
		stop()
		w.check()
		if n := w.attempts(); n != w.plan.batches {
			t.Errorf("%d attempts for %d batches", n, w.plan.batches)
		}
	})
}
