package guestmem_test

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"testing"

	"github.com/keyhold/keyhold/internal/vmtest/guestmem"
)

const page = 4096

func file(t *testing.T, size int64) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "memory"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f
}

// twoRegions has a hole between guest addresses 2 and 4 pages.
func twoRegions(t *testing.T) *guestmem.Memory {
	t.Helper()
	f := file(t, 4*page)
	m, err := guestmem.Map([]guestmem.Region{
		{Guest: 0, Size: 2 * page, User: 1 << 40},
		{Guest: 4 * page, Size: 2 * page, User: 1<<40 + 2*page, Offset: 2 * page},
	}, []*os.File{f, f})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func TestBothAddressesLeadToTheSameBytes(t *testing.T) {
	m := twoRegions(t)
	a, err := m.Guest(4*page+5, 10)
	if err != nil {
		t.Fatal(err)
	}
	b, err := m.User(1<<40+2*page+5, 10)
	if err != nil {
		t.Fatal(err)
	}
	a[9] = 42
	if b[9] != 42 || len(a) != 10 || cap(a) != 10 {
		t.Errorf("read %d, length %d, capacity %d", b[9], len(a), cap(a))
	}
}

func TestRangesOutsideARegionAreRefused(t *testing.T) {
	m := twoRegions(t)
	for _, tc := range []struct {
		name    string
		addr, n uint64
		ok      bool
	}{
		{"a whole region", 0, 2 * page, true},
		{"its last byte", 2*page - 1, 1, true},
		{"nothing at its end", 2 * page, 0, true},
		{"one byte too many", 2*page - 1, 2, false},
		{"in the hole", 3 * page, 1, false},
		{"from one into the other", page, 4 * page, false},
		{"behind the last", 6 * page, 1, false},
		{"an end that overflows", math.MaxUint64 - 1, 4, false},
		{"a length that overflows", 1, math.MaxUint64, false},
	} {
		b, err := m.Guest(tc.addr, tc.n)
		if (err == nil) != tc.ok || err != nil && !errors.Is(err, guestmem.ErrOutside) {
			t.Errorf("%s: %v", tc.name, err)
		}
		if err == nil && uint64(len(b)) != tc.n {
			t.Errorf("%s: %d bytes", tc.name, len(b))
		}
	}
}

func TestRegionsThatCannotBeAreRefused(t *testing.T) {
	f := file(t, 2*page)
	for name, regions := range map[string][]guestmem.Region{
		"empty":                  {{Guest: 0, Size: 0}},
		"longer than its file":   {{Guest: 0, Size: 3 * page}},
		"behind its file's end":  {{Guest: 0, Size: page, Offset: 2 * page}},
		"an end that overflows":  {{Guest: math.MaxUint64 - 10, Size: page}},
		"user end overflows":     {{User: math.MaxUint64 - 10, Size: page}},
		"an offset without end":  {{Size: page, Offset: math.MaxUint64}},
		"one over another":       {{Guest: 0, Size: page}, {Guest: page - 1, Size: page}},
		"one with another in it": {{Guest: 8, Size: 8}, {Guest: 0, Size: page}},
	} {
		files := make([]*os.File, len(regions))
		for i := range files {
			files[i] = f
		}
		if m, err := guestmem.Map(regions, files); err == nil {
			t.Errorf("%s: accepted", name)
			_ = m.Close()
		}
	}
	if _, err := guestmem.Map([]guestmem.Region{{Size: page}}, nil); err == nil {
		t.Error("a region without a file: accepted")
	}
}

func TestWordsAreLittleEndianAndAligned(t *testing.T) {
	b := make([]byte, 16)
	guestmem.Store(b[4:8], 0x01020304)
	if b[4] != 4 || b[7] != 1 || guestmem.Load(b[4:8]) != 0x01020304 {
		t.Errorf("stored % x", b)
	}
	for name, w := range map[string][]byte{"askew": b[1:5], "short": b[0:2], "long": b[0:8]} {
		if guestmem.Aligned(w) {
			t.Errorf("%s: accepted", name)
		}
	}
}
