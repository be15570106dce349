package enclave

import (
	"context"
	"fmt"
	"log/slog"

	"golang.org/x/sys/unix"
)

// harden keeps this process's memory to itself: no core file, no debugger, no
// swap. Without the first two there is no enclave; locking is best effort, since
// it needs a right that an enclave's first process has and a laptop's not.
//
// Tracebacks of a crash are not its business: they go to standard error, behind
// which the image's program puts nothing (cmd/internal/guest).
func harden(ctx context.Context, log *slog.Logger) error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("switch core files off: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("switch ptrace and core dumps off: %w", err)
	}
	if !mayLock() {
		log.InfoContext(ctx, "memory not locked", slog.String("reason", "the limit on locked memory is too low"))
		return nil
	}
	// MCL_ONFAULT: Go reserves far more address space than it uses.
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		log.InfoContext(ctx, "memory not locked", slog.Any("error", err))
	}
	return nil
}

// mayLock is false where memory could be locked up to a limit only: reaching it
// later would end the process. A privileged process lifts the limit first.
func mayLock() bool {
	unlimited := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unlimited); err == nil {
		return true
	}
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &l); err != nil {
		return false
	}
	return l.Cur == unix.RLIM_INFINITY
}
