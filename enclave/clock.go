package enclave

import (
	"time"

	"golang.org/x/sys/unix"
)

// bootTime reads CLOCK_BOOTTIME: it goes on while the machine is suspended, so
// no lease outlives a pause of the whole enclave.
func bootTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		// Linux has had this clock since 2.6.39. Without a clock no deadline can
		// be kept, so nothing may be signed.
		panic("enclave: CLOCK_BOOTTIME: " + err.Error())
	}
	return time.Duration(ts.Nano())
}
