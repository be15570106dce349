// Package eif reads, writes and measures enclave image files, version 4, the
// form in which AWS takes an enclave. It refuses every file that another reader
// could take for something else than what it measures.
//
// The format is that of github.com/aws/aws-nitro-enclaves-image-format, whose
// src/defs/mod.rs defines it. That project's reader walks the sections one after
// the other, others go by the table in the header; here both must say the same,
// and leave no byte out.
package eif

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math"
)

// Version is the only version of the format that is read and written.
const Version = 4

// Lengths of the format, in bytes.
const (
	HeaderLen        = 548
	SectionHeaderLen = 12
)

const (
	magic       = ".eif"
	maxSections = 32
	minSections = 4                                            // kernel, command line, metadata, one ramdisk
	maxRamdisks = maxSections - minSections                    // leaves room for a signature
	offsetsAt   = 28                                           // in the header: where sections begin
	sizesAt     = offsetsAt + 8*maxSections                    // and how long they are
	crcAt       = HeaderLen - 4                                // the last field
	flagARM64   = 1                                            // the only flag of the header
	maxSize     = math.MaxInt64/maxSections - SectionHeaderLen // of a section: no sum of them overflows
)

// What nitro-cli writes into every image. Neither is measured, and run-enclave
// takes its own.
const (
	DefaultMemory = 1 << 30 // bytes
	DefaultCPUs   = 2
)

// Arch is what a machine must be to run the image, in Go's names.
type Arch string

// The architectures.
const (
	AMD64 Arch = "amd64"
	ARM64 Arch = "arm64"
)

// Image is what a file holds. The order of its sections is fixed: kernel,
// command line, metadata, ramdisks, signature.
type Image struct {
	Arch          Arch
	DefaultMemory uint64 // bytes; not measured
	DefaultCPUs   uint64 // not measured
	Kernel        []byte
	Cmdline       string
	Metadata      []byte   // JSON, see Info; not measured
	Ramdisks      [][]byte // the first is measured in PCR1, the others in PCR2
	Signature     []byte   // CBOR, see Sign; nil where the image is not signed
}

type kind uint16

const (
	kernel    kind = 1
	cmdline   kind = 2
	ramdisk   kind = 3
	signature kind = 4
	metadata  kind = 5
)

type section struct {
	kind kind
	data []byte
}

func (m *Image) sections() []section {
	all := []section{{kernel, m.Kernel}, {cmdline, []byte(m.Cmdline)}, {metadata, m.Metadata}}
	for _, r := range m.Ramdisks {
		all = append(all, section{ramdisk, r})
	}
	if m.Signature != nil {
		all = append(all, section{signature, m.Signature})
	}
	return all
}

// Encode returns the bytes of the file. It refuses what Parse would.
func (m Image) Encode() ([]byte, error) {
	if err := m.check(); err != nil {
		return nil, fmt.Errorf("encode image: %w", err)
	}
	sections := m.sections()
	size := HeaderLen
	for _, s := range sections {
		size += SectionHeaderLen + len(s.data)
	}
	b := make([]byte, 0, size)
	b = m.appendHeader(b, sections)
	for _, s := range sections {
		b = binary.BigEndian.AppendUint16(b, uint16(s.kind))
		b = binary.BigEndian.AppendUint16(b, 0) // flags
		b = binary.BigEndian.AppendUint64(b, uint64(len(s.data)))
		b = append(b, s.data...)
	}
	binary.BigEndian.PutUint32(b[crcAt:], checksum(b))
	return b, nil
}

// appendHeader leaves the checksum, its last field, zero.
func (m *Image) appendHeader(b []byte, sections []section) []byte {
	be := binary.BigEndian
	var flags uint16
	if m.Arch == ARM64 {
		flags = flagARM64
	}
	var offsets, sizes [maxSections]uint64
	at := uint64(HeaderLen)
	for i, s := range sections {
		offsets[i], sizes[i] = at, uint64(len(s.data))
		at += SectionHeaderLen + sizes[i]
	}
	b = append(b, magic...)
	b = be.AppendUint16(b, Version)
	b = be.AppendUint16(b, flags)
	b = be.AppendUint64(b, m.DefaultMemory)
	b = be.AppendUint64(b, m.DefaultCPUs)
	b = be.AppendUint16(b, 0)                     // reserved
	b = be.AppendUint16(b, uint16(len(sections))) //nolint:gosec // check allows no more than 32
	for _, table := range [][maxSections]uint64{offsets, sizes} {
		for _, v := range table {
			b = be.AppendUint64(b, v)
		}
	}
	return append(b, make([]byte, HeaderLen-len(b))...)
}

// checksum is the CRC-32 (IEEE) of everything but itself.
func checksum(b []byte) uint32 {
	sum := crc32.ChecksumIEEE(b[:crcAt])
	return crc32.Update(sum, crc32.IEEETable, b[HeaderLen:])
}

// check holds the rules that do not depend on where a section stands.
func (m *Image) check() error {
	switch {
	case m.Arch != AMD64 && m.Arch != ARM64:
		return BadFlags
	case m.DefaultMemory == 0:
		return BadMemory
	case m.DefaultCPUs == 0:
		return BadCPUs
	case len(m.Kernel) == 0:
		return NoKernel
	case m.Cmdline == "":
		return NoCmdline
	case len(m.Metadata) == 0:
		return NoMetadata
	case len(m.Ramdisks) == 0:
		return NoRamdisk
	case len(m.Ramdisks) > maxRamdisks:
		return BadCount
	case m.Signature != nil && len(m.Signature) == 0:
		return Empty
	case !printable(m.Cmdline):
		return BadCmdline
	}
	for _, r := range m.Ramdisks {
		if len(r) == 0 {
			return Empty
		}
	}
	return nil
}

// printable allows a newline at the end, which the kernel drops: an image whose
// command line was read from a file may have it.
func printable(s string) bool {
	for i, c := range []byte(s) {
		if (c < ' ' || c > '~') && (c != '\n' || i != len(s)-1) {
			return false
		}
	}
	return true
}
