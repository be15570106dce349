package watch

import (
	"fmt"
	"os"

	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/refusal"
)

// maxEIF bounds an image file, in bytes.
const maxEIF = 4 << 30

// memoryFactor is how many times its image an enclave's memory must hold:
// nitro-cli refuses less (E26).
const memoryFactor = 4

// ReadMeasurements reads a measurements file, as strictly as eif does.
func ReadMeasurements(path string) (eif.Measurements, error) {
	info, err := os.Stat(path)
	if err != nil {
		return eif.Measurements{}, fmt.Errorf("measurements: %w", err)
	}
	if info.Size() > eif.MaxMeasurements {
		return eif.Measurements{}, eif.BadMeasurements
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return eif.Measurements{}, fmt.Errorf("measurements: %w", err)
	}
	return eif.ParseMeasurements(raw)
}

// Same says whether got is the image that want asks for: PCR0 always, and the
// others where want names them.
func Same(got, want eif.Measurements) bool {
	if want.PCR0 == "" || got.PCR0 != want.PCR0 {
		return false
	}
	for _, pair := range [][2]string{{got.PCR1, want.PCR1}, {got.PCR2, want.PCR2}, {got.PCR8, want.PCR8}} {
		if pair[1] != "" && pair[0] != pair[1] {
			return false
		}
	}
	return true
}

// NeedsMiB returns the memory that nitro-cli asks for with an image of size bytes.
func NeedsMiB(size int64) int { return int((memoryFactor*size + 1<<20 - 1) >> 20) }

// checkMemory compares the memory of an enclave with the size of its image.
func checkMemory(path string, memoryMiB int) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("image file: %w: %w", refusal.ImageMismatch, err)
	}
	if !info.Mode().IsRegular() || info.Size() == 0 || info.Size() > maxEIF {
		return fmt.Errorf("image file: %w: it is no file between 1 byte and 4 GiB", refusal.ImageMismatch)
	}
	if need := NeedsMiB(info.Size()); memoryMiB < need {
		return fmt.Errorf("%w: %d MiB are set, %d MiB are needed", refusal.EnclaveMemory, memoryMiB, need)
	}
	return nil
}
