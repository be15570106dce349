package main

import (
	"encoding/hex"
	"fmt"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/watch"
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

// readMeasurements reads what nitro-cli and keyhold image build print: PCR0 to 2,
// and PCR8 where the image is signed, are wanted as they stand there.
func readMeasurements(path string) (attestation.Image, error) {
	m, err := watch.ReadMeasurements(path)
	if err != nil {
		return attestation.Image{}, fmt.Errorf("%w: %w", err, refusal.UsageWrong)
	}
	img := attestation.Image{PCRs: map[int][]byte{}}
	for i, text := range map[int]string{0: m.PCR0, 1: m.PCR1, 2: m.PCR2, 8: m.PCR8} {
		if text == "" { // PCR8 of an image that is not signed
			continue
		}
		if img.PCRs[i], err = parsePCR(text); err != nil {
			return attestation.Image{}, err
		}
	}
	return img, nil
}
