package dynamo

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

const parallel = 16 // transactions of one bulk call

// inParallel calls f for 0 to n-1 until one fails. Calls under way are let
// finish: of a write that is cancelled nobody knows whether it was applied.
func inParallel(n int, f func(int) error) error {
	var group errgroup.Group
	var failed atomic.Bool
	group.SetLimit(parallel)
	for i := range n {
		group.Go(func() error {
			if failed.Load() {
				return nil
			}
			err := f(i)
			if err != nil {
				failed.Store(true)
			}
			return err
		})
	}
	return group.Wait()
}

// partly hides the sentinels in the error of a method of many writes once one of
// them was made, or may have been.
func partly(ctx context.Context, what string, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%s: not all of it was written: %w", what, context.Cause(ctx))
	}
	return fmt.Errorf("%s: not all of it was written: %w", what, errors.New(err.Error()))
}
