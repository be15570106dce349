package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/parent/store"
)

// How often the queue is looked at while parents sign: the end by one query of a
// shard that was not empty, progress by a count of all shards.
const (
	lookEvery     = 50 * time.Millisecond
	progressEvery = time.Second
)

// sign lets parents sign until nothing is ready or claimed, and returns how long
// that took and at which rate.
func sign(ctx context.Context, s *stack, v values, stderr io.Writer) (seconds, rate float64, err error) {
	im, err := s.store.Import(ctx, importID)
	if err != nil {
		return 0, 0, fmt.Errorf("read the import: %w", err)
	}
	open, err := countOpen(ctx, s)
	if err != nil || open == 0 {
		return 0, 0, err
	}
	records := func(batches int) int { return max(0, v.Records-batches*v.BatchSize) }
	bar := cli.NewProgress(stderr, "sign", v.Records)
	defer bar.Finish()
	bar.From(records(open))
	before := im.Batches - open
	began := time.Now()
	s.startParents() //nolint:contextcheck // processes end with the stack
	shard, counted := 0, began
	for {
		if err := pause(ctx, lookEvery); err != nil {
			return 0, 0, err
		}
		if shard, err = firstOpen(ctx, s, shard); err != nil {
			return 0, 0, err
		}
		if shard < 0 {
			break
		}
		if err := checkSpace(s.log); err != nil {
			return 0, 0, err
		}
		if time.Since(counted) < progressEvery {
			continue
		}
		if open, err = countOpen(ctx, s); err != nil {
			return 0, 0, err
		}
		counted = time.Now()
		bar.Set(records(open))
	}
	seconds = time.Since(began).Seconds()
	bar.Set(v.Records)
	done := v.Records - before*v.BatchSize
	return seconds, float64(max(done, 0)) / seconds, s.stopParents()
}

// countOpen counts the batches that are ready or claimed.
func countOpen(ctx context.Context, s *stack) (n int, err error) {
	for shard := range store.ReadyShards {
		k, err := s.retryCount(ctx, shard)
		if err != nil {
			return 0, err
		}
		n += k
	}
	return n, nil
}

// firstOpen returns a shard that is not empty, from the given one on, or -1.
func firstOpen(ctx context.Context, s *stack, from int) (int, error) {
	for i := range store.ReadyShards {
		shard := (from + i) % store.ReadyShards
		n, err := s.retryCount(ctx, shard)
		if err != nil {
			return 0, err
		}
		if n > 0 {
			return shard, nil
		}
	}
	return -1, nil
}

// retryCount outlasts a database that was killed and is being started again.
func (s *stack) retryCount(ctx context.Context, shard int) (int, error) {
	wait := restartFirst
	for {
		n, err := s.store.CountReady(ctx, shard)
		if err == nil {
			return n, nil
		}
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
		if spaceErr := checkSpace(s.log); spaceErr != nil {
			return 0, spaceErr
		}
		if wait > 10*restartLongest {
			return 0, fmt.Errorf("count the open batches: %w", err)
		}
		if err := pause(ctx, min(wait, restartLongest)); err != nil {
			return 0, err
		}
		wait *= 2
	}
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
