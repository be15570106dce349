package main

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/internal/refusal"
)

const pcrLen = 48 // bytes: SHA-384

// images are those of --pcr0 and --measurements.
func (o *options) images() ([]attestation.Image, error) {
	var list []attestation.Image
	for _, text := range o.pcr0 {
		pcr, err := parsePCR(text)
		if err != nil {
			return nil, fmt.Errorf("--pcr0: %w", err)
		}
		list = append(list, attestation.Image{PCRs: map[int][]byte{0: pcr}})
	}
	for _, path := range o.measurements {
		img, err := readMeasurements(path)
		if err != nil {
			return nil, fmt.Errorf("--measurements %s: %w", path, err)
		}
		list = append(list, img)
	}
	return list, nil
}

var errPCR = fmt.Errorf("a register is %d hex digits and not all zero, which a debug enclave has: %w", 2*pcrLen, refusal.UsageWrong)

func parsePCR(text string) ([]byte, error) {
	b, err := hex.DecodeString(text)
	if err != nil || len(b) != pcrLen || [pcrLen]byte(b) == [pcrLen]byte{} {
		return nil, errPCR
	}
	return b, nil
}

// readMeasurements reads what nitro-cli build-enclave prints. PCR0 to 2 are
// wanted as they stand there; others do not describe the image.
func readMeasurements(path string) (attestation.Image, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return attestation.Image{}, fmt.Errorf("%w: %w", err, refusal.UsageWrong)
	}
	var file struct {
		Measurements map[string]string
	}
	if err := json.Unmarshal(raw, &file); err != nil {
		return attestation.Image{}, fmt.Errorf("not the JSON of nitro-cli build-enclave: %w", refusal.UsageWrong)
	}
	img := attestation.Image{PCRs: map[int][]byte{}}
	var errs []error
	for i := range 3 {
		name := fmt.Sprintf("PCR%d", i)
		text, ok := file.Measurements[name]
		if !ok && i > 0 {
			continue
		}
		pcr, err := parsePCR(text)
		if err != nil {
			errs = append(errs, fmt.Errorf("measurement %s: %w", name, err))
			continue
		}
		img.PCRs[i] = pcr
	}
	return img, errors.Join(errs...)
}
