package eif

import (
	"encoding/binary"
	"fmt"
)

// header is what the file says of itself before its sections, the checks of
// single fields done.
type header struct {
	arch         Arch
	memory, cpus uint64
	count        int
	crc          uint32
}

// Parse reads a file. Whatever it takes, Encode writes back to the same bytes.
// The parts of the image are parts of b.
func Parse(b []byte) (Image, error) {
	h, err := parseHeader(b)
	if err != nil {
		return Image{}, fmt.Errorf("parse image: %w", err)
	}
	// First what the table says, since a file that was cut short has a wrong
	// checksum as well, and the better reason is that it was cut short.
	if err := checkTable(b, h.count); err != nil {
		return Image{}, fmt.Errorf("parse image: %w", err)
	}
	if checksum(b) != h.crc {
		return Image{}, fmt.Errorf("parse image: %w", BadCRC)
	}
	m := Image{Arch: h.arch, DefaultMemory: h.memory, DefaultCPUs: h.cpus}
	if err := m.readSections(b, h.count); err != nil {
		return Image{}, fmt.Errorf("parse image: %w", err)
	}
	if err := m.check(); err != nil {
		return Image{}, fmt.Errorf("parse image: %w", err)
	}
	return m, nil
}

func parseHeader(b []byte) (header, error) {
	be := binary.BigEndian
	if len(b) < len(magic) {
		return header{}, Short
	}
	if string(b[:len(magic)]) != magic {
		return header{}, BadMagic
	}
	if len(b) < HeaderLen {
		return header{}, Short
	}
	if be.Uint16(b[4:]) != Version {
		return header{}, BadVersion
	}
	h := header{arch: AMD64, memory: be.Uint64(b[8:]), cpus: be.Uint64(b[16:]), count: int(be.Uint16(b[26:])), crc: be.Uint32(b[crcAt:])}
	switch flags := be.Uint16(b[6:]); flags {
	case 0:
	case flagARM64:
		h.arch = ARM64
	default:
		return header{}, BadFlags
	}
	if be.Uint16(b[24:]) != 0 || be.Uint32(b[crcAt-4:]) != 0 {
		return header{}, BadReserved
	}
	if h.count < minSections || h.count > maxSections {
		return header{}, BadCount
	}
	return h, nil
}

// entry returns where the table says that section i begins, and its size.
func entry(b []byte, i int) (offset, size uint64) {
	return binary.BigEndian.Uint64(b[offsetsAt+8*i:]), binary.BigEndian.Uint64(b[sizesAt+8*i:])
}

// checkTable makes sure that the sections lie one behind the other, from the
// header to the end of the file.
func checkTable(b []byte, count int) error {
	at := uint64(HeaderLen)
	for i := range maxSections {
		offset, size := entry(b, i)
		if i >= count {
			if offset != 0 || size != 0 {
				return BadTable
			}
			continue
		}
		switch {
		case size == 0:
			return Empty
		case size > maxSize || offset > maxSize || offset+SectionHeaderLen+size > uint64(len(b)):
			return BeyondEnd
		case offset < at:
			return Overlap
		case offset > at:
			return Gap
		}
		at += SectionHeaderLen + size
	}
	if at != uint64(len(b)) {
		return Trailing
	}
	return nil
}

// readSections goes by a table that checkTable found good.
func (m *Image) readSections(b []byte, count int) error {
	var last kind
	for i := range count {
		offset, size := entry(b, i)
		head, data := b[offset:offset+SectionHeaderLen], b[offset+SectionHeaderLen:offset+SectionHeaderLen+size]
		k := kind(binary.BigEndian.Uint16(head))
		if k < kernel || k > metadata {
			return BadType
		}
		if binary.BigEndian.Uint16(head[2:]) != 0 {
			return BadSectionFlag
		}
		if binary.BigEndian.Uint64(head[4:]) != size {
			return SizeDiffers
		}
		if err := m.add(k, data[:size:size]); err != nil {
			return err
		}
		if !follows(last, k) {
			return Order
		}
		last = k
	}
	return nil
}

// add puts a section in its place, where there is but one of a kind.
func (m *Image) add(k kind, data []byte) error {
	switch k {
	case kernel:
		if m.Kernel != nil {
			return TwoKernels
		}
		m.Kernel = data
	case cmdline:
		if m.Cmdline != "" {
			return TwoCmdlines
		}
		m.Cmdline = string(data)
	case metadata:
		if m.Metadata != nil {
			return TwoMetadata
		}
		m.Metadata = data
	case ramdisk:
		m.Ramdisks = append(m.Ramdisks, data)
	case signature:
		if m.Signature != nil {
			return TwoSignatures
		}
		m.Signature = data
	}
	return nil
}

// follows tells whether a section of kind k may stand behind one of kind last.
// Which kinds must be there at all is said by check.
func follows(last, k kind) bool {
	rank := func(k kind) int {
		switch k {
		case kernel:
			return 1
		case cmdline:
			return 2
		case metadata:
			return 3
		case ramdisk:
			return 4
		case signature:
			return 5
		}
		return 0 // before the first
	}
	return rank(k) > rank(last) || k == ramdisk && last == ramdisk
}
