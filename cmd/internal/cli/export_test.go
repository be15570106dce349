package cli

import (
	"io"
	"time"
)

// TestingOnlyProgress is NewProgress under a clock of the test.
func testingOnlyProgress(w io.Writer, label string, total int, now func() time.Time) *Progress {
	return newProgress(w, label, total, now)
}

// The hooks, exported for this folder's tests alone.
var TestingOnlyProgress = testingOnlyProgress
