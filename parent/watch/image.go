package watch

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/keyhold/keyhold/internal/refusal"
)

// Measurements are those of an image, in the form that nitro-cli prints.
type Measurements struct {
	HashAlgorithm string `json:",omitempty"`
	PCR0          string
	PCR1          string
	PCR2          string
	PCR8          string `json:",omitempty"` // of the certificate that signed the image
}

// Size limits of an image file and of a measurements file, in bytes.
const (
	maxEIF          = 4 << 30
	maxMeasurements = 64 << 10
)

// memoryFactor is how many times its image an enclave's memory must hold:
// nitro-cli refuses less (E26).
const memoryFactor = 4

var errMeasurements = errors.New("measurements: there is no PCR0 of 96 hex digits that are not all zero")

// ParseMeasurements reads what nitro-cli build-enclave, describe-eif and keyhold
// image build print. The registers of a debug enclave, all zero, are refused.
func ParseMeasurements(raw []byte) (Measurements, error) {
	var file struct{ Measurements Measurements }
	if err := json.Unmarshal(raw, &file); err != nil {
		return Measurements{}, errors.New("measurements: they are not the JSON that nitro-cli prints")
	}
	if pcr, err := hex.DecodeString(file.Measurements.PCR0); err != nil || len(pcr) != 48 || strings.Trim(file.Measurements.PCR0, "0") == "" {
		return Measurements{}, errMeasurements
	}
	return file.Measurements, nil
}

// ReadMeasurements reads a file for ParseMeasurements.
func ReadMeasurements(path string) (Measurements, error) {
	info, err := os.Stat(path)
	if err != nil {
		return Measurements{}, fmt.Errorf("measurements: %w", err)
	}
	if info.Size() > maxMeasurements {
		return Measurements{}, errMeasurements
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return Measurements{}, fmt.Errorf("measurements: %w", err)
	}
	return ParseMeasurements(raw)
}

// Same says whether m describes the image that want asks for: PCR0 always, and
// the others where want names them.
func (m Measurements) Same(want Measurements) bool {
	if want.PCR0 == "" || !strings.EqualFold(m.PCR0, want.PCR0) {
		return false
	}
	for _, pair := range [][2]string{{m.PCR1, want.PCR1}, {m.PCR2, want.PCR2}, {m.PCR8, want.PCR8}} {
		if pair[1] != "" && !strings.EqualFold(pair[0], pair[1]) {
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
