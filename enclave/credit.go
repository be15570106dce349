package enclave

import (
	"fmt"
	"runtime"
	"unsafe" //nolint:depguard // RNDADDENTROPY takes a pointer, and x/sys has no call for it

	"golang.org/x/sys/unix"
)

// addEntropy hands a struct rand_pool_info to the kernel.
func addEntropy(fd uintptr, info []byte) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info[0]))) //nolint:gosec // see the import
	runtime.KeepAlive(info)
	if errno != 0 {
		return fmt.Errorf("RNDADDENTROPY: %w", errno)
	}
	return nil
}
