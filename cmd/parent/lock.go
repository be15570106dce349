package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const lockPoll = 200 * time.Millisecond

// lockFile takes an exclusive lock of the file at path, which it creates, and
// waits while another process has it. The lock ends with the process.
func lockFile(path string) func(context.Context) (func(), error) {
	return func(ctx context.Context) (func(), error) {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o660) //nolint:gosec // G302: members of group ne take turns
		if err != nil {
			return nil, fmt.Errorf("lock file: %w", err)
		}
		for {
			err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
			if err == nil {
				return func() { _ = f.Close() }, nil // closing it gives the lock back
			}
			if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
				return nil, errors.Join(fmt.Errorf("lock file: %w", err), f.Close())
			}
			t := time.NewTimer(lockPoll)
			select {
			case <-t.C:
			case <-ctx.Done():
				t.Stop()
				return nil, errors.Join(fmt.Errorf("lock file: %w", ctx.Err()), f.Close())
			}
		}
	}
}
