// Package guestmem maps a virtual machine's memory and finds places in it. It
// refuses every range that does not lie wholly within one region.
package guestmem

import (
	"errors"
	"fmt"
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// ErrOutside is returned for a range that the guest has no memory for.
var ErrOutside = errors.New("outside of the guest's memory")

// maxBytes bounds one region together with its offset in the file: 1 TiB, far
// more than a test machine has and far from an overflow.
const maxBytes = 1 << 40

// Region is how the front end describes a part of the guest's memory.
type Region struct {
	Guest  uint64 // first address as the guest sees it
	Size   uint64 // bytes
	User   uint64 // first address as the front end's own process sees it
	Offset uint64 // of the first byte in the file
}

// Memory is a guest's memory. Its methods may not run beside Close.
type Memory struct {
	regions []mapped
}

type mapped struct {
	Region
	bytes []byte // of the file, from its beginning to the region's end
}

// Map maps regions, each from the file at the same index. The files stay the
// caller's. Regions that overlap are refused.
func Map(regions []Region, files []*os.File) (*Memory, error) {
	if len(regions) != len(files) {
		return nil, fmt.Errorf("map guest memory: %d regions and %d files", len(regions), len(files))
	}
	m := &Memory{}
	for i, r := range regions {
		if err := m.add(r, files[i]); err != nil {
			return nil, errors.Join(fmt.Errorf("map guest memory: region %d: %w", i, err), m.Close())
		}
	}
	return m, nil
}

func (m *Memory) add(r Region, f *os.File) error {
	if r.Size == 0 || r.Size > maxBytes || r.Offset > maxBytes ||
		r.Guest > math.MaxUint64-r.Size || r.User > math.MaxUint64-r.Size {
		return errors.New("size or address is impossible")
	}
	for _, other := range m.regions {
		if r.Guest < other.Guest+other.Size && other.Guest < r.Guest+r.Size {
			return errors.New("overlaps another")
		}
	}
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("look at its file: %w", err)
	}
	end := r.Offset + r.Size
	if uint64(max(info.Size(), 0)) < end { // reading beyond it would be SIGBUS
		return errors.New("its file is too short")
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(end), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	m.regions = append(m.regions, mapped{Region: r, bytes: b})
	return nil
}

// Close unmaps everything. Slices that were handed out must not be used again.
func (m *Memory) Close() error {
	var errs []error
	for _, r := range m.regions {
		errs = append(errs, unix.Munmap(r.bytes))
	}
	m.regions = nil
	return errors.Join(errs...)
}

// Guest returns n bytes at an address of the guest. The guest may change them at
// any time, so what is to be checked is copied first.
func (m *Memory) Guest(addr, n uint64) ([]byte, error) {
	for _, r := range m.regions {
		if b, ok := r.at(addr, n, r.Guest); ok {
			return b, nil
		}
	}
	return nil, ErrOutside
}

// User returns n bytes at an address of the front end's process.
func (m *Memory) User(addr, n uint64) ([]byte, error) {
	for _, r := range m.regions {
		if b, ok := r.at(addr, n, r.User); ok {
			return b, nil
		}
	}
	return nil, ErrOutside
}

func (r *mapped) at(addr, n, first uint64) ([]byte, bool) {
	if addr < first || n > r.Size || addr-first > r.Size-n {
		return nil, false
	}
	from := r.Offset + addr - first
	return r.bytes[from : from+n : from+n], true
}
