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
	creditLen  = 64 // bytes from the NSM; the generator is ready after 32
)

// checkEntropy makes sure that the kernel's generator is fed by the NSM, since
// Go's key generation takes bytes from nowhere else. The kernel's own driver
// must be its source, where the kernel has such sources (AWS's older one has
// not). That a source is in use does not say that it has given anything yet, so
// bytes of the NSM are credited here in any case. Then the generator must say
// that it is ready.
func checkEntropy(session nsm.Session, current string, credit func([]byte) error) error {
	name, err := os.ReadFile(current)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read the kernel's random source: %w", err)
	}
	if err == nil && strings.TrimSpace(string(name)) != nsmRNG {
		return errors.New("the kernel's random source is not the NSM")
	}
	seed := make([]byte, creditLen)
	defer clear(seed)
	if err := session.Random(seed); err != nil {
		return fmt.Errorf("get random bytes from the NSM: %w", err)
	}
	if [creditLen]byte(seed) == [creditLen]byte{} {
		return errors.New("the NSM gave zeros for random bytes")
	}
	if err := credit(seed); err != nil {
		return fmt.Errorf("credit random bytes of the NSM: %w", err)
	}
	var b [32]byte
	defer clear(b[:])
	if n, err := unix.Getrandom(b[:], unix.GRND_NONBLOCK); err != nil || n != len(b) {
		return errors.Join(errors.New("the kernel's generator is not ready"), err)
	}
	return nil
}

// creditKernel mixes b into the kernel's pool and counts it as entropy
// (random(4), RNDADDENTROPY: bits, length, bytes). Then it makes the generator
// draw from the pool, which otherwise happens within a minute or, before Linux
// 5.18, five.
func creditKernel(b []byte) (err error) {
	f, err := os.OpenFile(kernelPool, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("open the kernel's pool: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	n := uint32(len(b)) //nolint:gosec // creditLen
	info := binary.NativeEndian.AppendUint32(make([]byte, 0, 8+len(b)), 8*n)
	info = binary.NativeEndian.AppendUint32(info, n)
	info = append(info, b...)
	defer clear(info)
	if err := addEntropy(f.Fd(), info); err != nil {
		return err
	}
	// Linux before 4.17 does not know this request (EINVAL): there a generator
	// that is not ready draws as soon as it is credited, and another one later.
	err = unix.IoctlSetInt(int(f.Fd()), unix.RNDRESEEDCRNG, 0)
	if err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("RNDRESEEDCRNG: %w", err)
	}
	return nil
}
