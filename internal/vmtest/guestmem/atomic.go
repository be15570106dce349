package guestmem

import (
	"encoding/binary"
	"sync/atomic"
	"unsafe" //nolint:depguard // what another process writes meanwhile is read with atomic instructions, and those take pointers
)

// Load reads a little-endian word that the other side may write meanwhile, and
// everything that the other side wrote before it. b holds exactly four bytes and
// begins at a multiple of four.
func Load(b []byte) uint32 {
	var native [4]byte
	binary.NativeEndian.PutUint32(native[:], atomic.LoadUint32(word(b)))
	return binary.LittleEndian.Uint32(native[:])
}

// Store writes a little-endian word after everything that was written before it,
// and before everything that is read after it.
func Store(b []byte, v uint32) {
	var native [4]byte
	binary.LittleEndian.PutUint32(native[:], v)
	atomic.StoreUint32(word(b), binary.NativeEndian.Uint32(native[:]))
}

// Aligned reports whether Load and Store take b: a word that lies across two
// cache lines is not written at once.
func Aligned(b []byte) bool {
	return len(b) == 4 && uintptr(unsafe.Pointer(&b[0]))%4 == 0 //nolint:gosec // the address is looked at only
}

func word(b []byte) *uint32 {
	if !Aligned(b) {
		panic("guestmem: not an aligned word")
	}
	return (*uint32)(unsafe.Pointer(&b[0])) //nolint:gosec // four bytes, aligned, checked above
}
