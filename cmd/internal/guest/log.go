package guest

import (
	"errors"
	"io"
	"log/slog"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyhold/keyhold/internal/refusal"
)

// code says on the console why a machine was switched off. What fails later than these has a refusal.Code.
type code string

const (
	codeRoots     code = "kms_roots"
	codeConsole   code = "console"
	codeMount     code = "mount"
	codeModule    code = "kernel_module"
	codeNoVsock   code = "no_vsock"
	codeNoNSM     code = "no_nsm"
	codeNetwork   code = "network_present"
	codeKernel    code = "kernel_open"
	codeVsock     code = "vsock"
	codeHeartbeat code = "heartbeat"
	codeCrashed   code = "crashed"
)

// failure is an error with its code.
type failure struct {
	code code
	err  error
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

func failed(c code, err error) error { return &failure{c, err} }

func codeOf(err error) code {
	var f *failure
	if errors.As(err, &f) {
		return f.code
	}
	return code(refusal.Of(err))
}

// newLog writes lines of JSON. In place of the time of day, which nobody vouches for in there, they carry the
// milliseconds since the machine started.
func newLog(w io.Writer) *slog.Logger {
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Int64("up_ms", sinceStart().Milliseconds())
			}
			return a
		},
	}))
}

// sinceStart reads CLOCK_BOOTTIME. Linux has had it since 2.6.39; without it a line says 0.
func sinceStart() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}
