package enclave

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/keyhold/keyhold/attestation/nsm"
)

const (
	rngCurrent = "/sys/class/misc/hw_random/rng_current"
	nsmRNG     = "nsm-hwrng" // name that the kernel's NSM driver registers
	kernelPool = "/dev/random"
	creditLen  = 64 // bytes from the NSM where the kernel does not ask it itself; twice what the pool holds
)

// checkEntropy makes sure that the kernel's generator is fed by the NSM, since
// Go's key generation takes bytes from nowhere else: by the kernel's own driver,
// or, on kernels without that file, by crediting bytes of the NSM here. Then the
// generator must say that it is ready.
func checkEntropy(session nsm.Session, current string, credit func([]byte) error) error {
	name, err := os.ReadFile(current)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		seed := make([]byte, creditLen)
		defer clear(seed)
		if err := session.Random(seed); err != nil {
			return fmt.Errorf("get random bytes from the NSM: %w", err)
		}
		if err := credit(seed); err != nil {
			return fmt.Errorf("credit random bytes of the NSM: %w", err)
		}
	case err != nil:
		return fmt.Errorf("read the kernel's random source: %w", err)
	case strings.TrimSpace(string(name)) != nsmRNG:
		return errors.New("the kernel's random source is not the NSM")
	}
	var b [32]byte
	defer clear(b[:])
	if n, err := unix.Getrandom(b[:], unix.GRND_NONBLOCK); err != nil || n != len(b) {
		return errors.Join(errors.New("the kernel's generator is not ready"), err)
	}
	return nil
}

// creditKernel mixes b into the kernel's pool and counts it as entropy
// (random(4), RNDADDENTROPY: bits, length, bytes).
func creditKernel(b []byte) error {
	f, err := os.OpenFile(kernelPool, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("open the kernel's pool: %w", err)
	}
	n := uint32(len(b)) //nolint:gosec // creditLen
	info := binary.NativeEndian.AppendUint32(nil, 8*n)
	info = binary.NativeEndian.AppendUint32(info, n)
	info = append(info, b...)
	defer clear(info)
	return errors.Join(addEntropy(f.Fd(), info), f.Close())
}
