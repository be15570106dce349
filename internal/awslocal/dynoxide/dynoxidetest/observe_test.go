package dynoxidetest_test

import (
	"fmt"
	"runtime"
	"testing"
)

// outcome is how a test ended.
type outcome struct {
	skipped, failed bool
	said            string
}

// observer is a test whose Skip and Fatal are looked at instead of counted.
type observer struct {
	testing.TB
	outcome
}

func (o *observer) Skip(args ...any) {
	o.skipped, o.said = true, fmt.Sprint(args...)
	runtime.Goexit()
}

func (o *observer) Fatal(args ...any) {
	o.failed, o.said = true, fmt.Sprint(args...)
	runtime.Goexit()
}

func observe(t *testing.T, test func(testing.TB)) outcome {
	t.Helper()
	o := &observer{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		test(o)
	}()
	<-done
	return o.outcome
}
