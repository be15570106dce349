package sim_test

import (
	"crypto/rand"
	"crypto/sha512"
	"fmt"
	"slices"
	"sync"

	"github.com/keyhold/keyhold/attestation/nsm"
)

// device is an NSM that shows the same real document to every boot. The
// simulator looks at no document, and a new one costs more than a schedule.
type device struct {
	document []byte

	mu     sync.Mutex
	values [nsm.PCRCount][nsm.PCRSize]byte
	locked int // registers below
}

func newDevice(document []byte) *device {
	d := &device{document: document, locked: nsm.BootPCRs}
	d.values[0][0] = 1 // no debug enclave
	return d
}

func (d *device) Attest(nsm.AttestRequest) ([]byte, error) { return slices.Clone(d.document), nil }

func (d *device) ExtendPCR(index uint16, data []byte) ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	v := &d.values[index]
	*v = sha512.Sum384(append(slices.Clone(v[:]), data...))
	return slices.Clone(v[:]), nil
}

func (d *device) LockPCRs(below uint16) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.locked = max(d.locked, int(below))
	return nil
}

func (d *device) DescribePCR(index uint16) (value []byte, locked bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.values[index][:]), int(index) < d.locked, nil
}

func (d *device) Random(p []byte) error {
	if _, err := rand.Read(p); err != nil {
		return fmt.Errorf("random bytes: %w", err)
	}
	return nil
}

func (d *device) Close() error { return nil }
