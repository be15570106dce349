package eif_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/eif"
)

func sample() eif.Image {
	return eif.Image{
		Arch: eif.AMD64, DefaultMemory: eif.DefaultMemory, DefaultCPUs: eif.DefaultCPUs,
		Kernel: []byte("the kernel"), Cmdline: "console=ttyS0 panic=-1", Metadata: []byte(`{"ImageName":"sample"}`),
		Ramdisks: [][]byte{[]byte("first ramdisk"), []byte("second ramdisk")},
	}
}

func encode(t testing.TB, m eif.Image) []byte {
	t.Helper()
	b, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// seal puts the right checksum into a file that was changed.
func seal(b []byte) []byte {
	at := eif.HeaderLen - 4
	if len(b) >= eif.HeaderLen {
		sum := crc32.Update(crc32.ChecksumIEEE(b[:at]), crc32.IEEETable, b[eif.HeaderLen:])
		binary.BigEndian.PutUint32(b[at:], sum)
	}
	return b
}

func TestAnImageComesBackAsItWasWritten(t *testing.T) {
	signed := sample()
	signed.Signature = []byte{0x80}
	arm := sample()
	arm.Arch, arm.Ramdisks = eif.ARM64, arm.Ramdisks[:1]
	for name, want := range map[string]eif.Image{"plain": sample(), "signed": signed, "arm64": arm} {
		t.Run(name, func(t *testing.T) {
			got, err := eif.Parse(encode(t, want))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// The offsets are those that the format's definition gives: 548 bytes of header,
// all numbers big-endian.
func TestTheFileIsLaidOutAsTheFormatSays(t *testing.T) {
	m := sample()
	b := encode(t, m)
	be := binary.BigEndian
	kernelAt, cmdlineAt := uint64(548), uint64(548+12+len(m.Kernel))
	for _, tc := range []struct {
		name      string
		got, want uint64
	}{
		{"magic", uint64(be.Uint32(b)), 0x2e656966},
		{"version", uint64(be.Uint16(b[4:])), 4},
		{"flags", uint64(be.Uint16(b[6:])), 0},
		{"memory", be.Uint64(b[8:]), 1 << 30},
		{"cpus", be.Uint64(b[16:]), 2},
		{"reserved", uint64(be.Uint16(b[24:])), 0},
		{"sections", uint64(be.Uint16(b[26:])), 5},
		{"offset of the kernel", be.Uint64(b[28:]), kernelAt},
		{"offset of the command line", be.Uint64(b[36:]), cmdlineAt},
		{"size of the kernel", be.Uint64(b[284:]), uint64(len(m.Kernel))},
		{"unused", uint64(be.Uint32(b[540:])), 0},
		{"type of the kernel", uint64(be.Uint16(b[kernelAt:])), 1},
		{"flags of the kernel", uint64(be.Uint16(b[kernelAt+2:])), 0},
		{"size in the kernel's header", be.Uint64(b[kernelAt+4:]), uint64(len(m.Kernel))},
		{"type of the command line", uint64(be.Uint16(b[cmdlineAt:])), 2},
	} {
		if tc.got != tc.want {
			t.Errorf("%s: %#x, want %#x", tc.name, tc.got, tc.want)
		}
	}
}

func TestTheArchitectureIsOneBitOfTheHeader(t *testing.T) {
	m := sample()
	m.Arch = eif.ARM64
	if b := encode(t, m); binary.BigEndian.Uint16(b[6:]) != 1 {
		t.Errorf("flags %#x, want 1", b[6:8])
	}
}

func TestAFlippedBitIsFoundWhereverItIs(t *testing.T) {
	b := encode(t, sample())
	for i := range b {
		for bit := range 8 {
			b[i] ^= 1 << bit
			if _, err := eif.Parse(b); err == nil {
				t.Errorf("byte %d, bit %d: not found", i, bit)
			} else if !hasCode(err) {
				t.Errorf("byte %d, bit %d: %v has no code", i, bit, err)
			}
			b[i] ^= 1 << bit
		}
	}
}

func TestACutFileIsFoundWhereverItIsCut(t *testing.T) {
	b := encode(t, sample())
	for n := range b {
		want := eif.BeyondEnd
		if n < eif.HeaderLen {
			want = eif.Short
		}
		if _, err := eif.Parse(b[:n:n]); !errors.Is(err, want) {
			t.Errorf("%d bytes: %v, want %v", n, err, want)
		}
	}
}

func hasCode(err error) bool {
	_, ok := errors.AsType[eif.Code](err)
	return ok
}

// shape is a file whose parts a test sets as it likes.
type shape struct {
	kinds []uint16
	edit  func(b []byte)
}

// build lays out sections of four bytes each.
func (s shape) build() []byte {
	be := binary.BigEndian
	b := append([]byte(".eif"), make([]byte, eif.HeaderLen-4)...)
	be.PutUint16(b[4:], 4)
	be.PutUint64(b[8:], 1)
	be.PutUint64(b[16:], 1)
	be.PutUint16(b[26:], uint16(len(s.kinds)))
	for i, k := range s.kinds {
		be.PutUint64(b[28+8*i:], uint64(len(b)))
		be.PutUint64(b[284+8*i:], 4)
		b = be.AppendUint16(b, k)
		b = be.AppendUint16(b, 0)
		b = be.AppendUint64(b, 4)
		b = append(b, "data"...)
	}
	if s.edit != nil {
		s.edit(b)
	}
	return seal(b)
}

func TestEachFaultHasItsOwnError(t *testing.T) {
	const first, second = 548, 548 + 16 // where the first two sections of a shape begin
	good := []uint16{1, 2, 5, 3}
	put := func(at int, v uint64) func([]byte) {
		return func(b []byte) { binary.BigEndian.PutUint64(b[at:], v) }
	}
	put16 := func(at int, v uint16) func([]byte) {
		return func(b []byte) { binary.BigEndian.PutUint16(b[at:], v) }
	}
	if _, err := eif.Parse(shape{kinds: good}.build()); err != nil {
		t.Fatalf("the shape without a fault: %v", err)
	}
	for _, tc := range []struct {
		name  string
		shape shape
		want  eif.Code
	}{
		{"magic", shape{good, func(b []byte) { b[0] = 'x' }}, eif.BadMagic},
		{"version 3", shape{good, put16(4, 3)}, eif.BadVersion},
		{"version 5", shape{good, put16(4, 5)}, eif.BadVersion},
		{"unknown flags", shape{good, put16(6, 2)}, eif.BadFlags},
		{"no memory", shape{good, put(8, 0)}, eif.BadMemory},
		{"no CPUs", shape{good, put(16, 0)}, eif.BadCPUs},
		{"reserved", shape{good, put16(24, 1)}, eif.BadReserved},
		{"unused", shape{good, put16(540, 1)}, eif.BadReserved},
		{"no sections", shape{good, put16(26, 0)}, eif.BadCount},
		{"33 sections", shape{good, put16(26, 33)}, eif.BadCount},
		{"an offset behind the last", shape{good, put(28+8*4, 1)}, eif.BadTable},
		{"a size behind the last", shape{good, put(284+8*31, 1)}, eif.BadTable},
		{"an empty section", shape{good, put(284, 0)}, eif.Empty},
		{"a section beyond the end", shape{good, put(284+8*3, 5)}, eif.BeyondEnd},
		{"a size that overflows", shape{good, put(284, 1<<64-1)}, eif.BeyondEnd},
		{"an offset that overflows", shape{good, put(28, 1<<64-1)}, eif.BeyondEnd},
		{"a section in the header", shape{good, put(28, 540)}, eif.Overlap},
		{"sections that overlap", shape{good, put(28+8, first)}, eif.Overlap},
		{"bytes between sections", shape{good, put(28+8, second+1)}, eif.Gap},
		{"a section left out of the table", shape{good, func(b []byte) { clear(b[28+8*3 : 28+8*4]); clear(b[284+8*3 : 284+8*4]) }}, eif.Empty},
		{"a section's size in its header", shape{good, put(first+4, 5)}, eif.SizeDiffers},
		{"a section's flags", shape{good, put16(first+2, 1)}, eif.BadSectionFlag},
		{"type 0", shape{kinds: []uint16{0, 2, 5, 3}}, eif.BadType},
		{"type 6", shape{kinds: []uint16{1, 2, 5, 3, 6}}, eif.BadType},
		{"two kernels", shape{kinds: []uint16{1, 1, 2, 5, 3}}, eif.TwoKernels},
		{"a second kernel at the end", shape{kinds: []uint16{1, 2, 5, 3, 1}}, eif.TwoKernels},
		{"two command lines", shape{kinds: []uint16{1, 2, 2, 5, 3}}, eif.TwoCmdlines},
		{"two metadata sections", shape{kinds: []uint16{1, 2, 5, 5, 3}}, eif.TwoMetadata},
		{"two signatures", shape{kinds: []uint16{1, 2, 5, 3, 4, 4}}, eif.TwoSignatures},
		{"the command line first", shape{kinds: []uint16{2, 1, 5, 3}}, eif.Order},
		{"metadata behind the ramdisk", shape{kinds: []uint16{1, 2, 3, 5}}, eif.Order},
		{"the signature before the ramdisk", shape{kinds: []uint16{1, 2, 5, 4, 3}}, eif.Order},
		{"a ramdisk behind the signature", shape{kinds: []uint16{1, 2, 5, 3, 4, 3}}, eif.Order},
		{"no kernel", shape{kinds: []uint16{2, 5, 3, 3}}, eif.NoKernel},
		{"no command line", shape{kinds: []uint16{1, 5, 3, 3}}, eif.NoCmdline},
		{"no metadata", shape{kinds: []uint16{1, 2, 3, 3}}, eif.NoMetadata},
		{"no ramdisk", shape{kinds: []uint16{1, 2, 5, 4}}, eif.NoRamdisk},
		{"a NUL in the command line", shape{good, func(b []byte) { b[second+12] = 0 }}, eif.BadCmdline},
		{"an escape in the command line", shape{good, func(b []byte) { b[second+13] = 0x1b }}, eif.BadCmdline},
		{"a newline within the command line", shape{good, func(b []byte) { b[second+13] = '\n' }}, eif.BadCmdline},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := eif.Parse(tc.shape.build()); !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
		})
	}
	t.Run("bytes behind the end", func(t *testing.T) {
		if _, err := eif.Parse(seal(append(shape{kinds: good}.build(), 0))); !errors.Is(err, eif.Trailing) {
			t.Errorf("%v, want %v", err, eif.Trailing)
		}
	})
	t.Run("a changed byte", func(t *testing.T) {
		b := shape{kinds: good}.build()
		b[first+12]++
		if _, err := eif.Parse(b); !errors.Is(err, eif.BadCRC) {
			t.Errorf("%v, want %v", err, eif.BadCRC)
		}
	})
}

func TestEncodeWritesNothingThatParseWouldRefuse(t *testing.T) {
	for _, tc := range []struct {
		name string
		edit func(*eif.Image)
		want eif.Code
	}{
		{"no architecture", func(m *eif.Image) { m.Arch = "" }, eif.BadFlags},
		{"no memory", func(m *eif.Image) { m.DefaultMemory = 0 }, eif.BadMemory},
		{"no CPUs", func(m *eif.Image) { m.DefaultCPUs = 0 }, eif.BadCPUs},
		{"no kernel", func(m *eif.Image) { m.Kernel = nil }, eif.NoKernel},
		{"no command line", func(m *eif.Image) { m.Cmdline = "" }, eif.NoCmdline},
		{"a NUL", func(m *eif.Image) { m.Cmdline = "a\x00b" }, eif.BadCmdline},
		{"no metadata", func(m *eif.Image) { m.Metadata = nil }, eif.NoMetadata},
		{"no ramdisk", func(m *eif.Image) { m.Ramdisks = nil }, eif.NoRamdisk},
		{"an empty ramdisk", func(m *eif.Image) { m.Ramdisks[1] = nil }, eif.Empty},
		{"29 ramdisks", func(m *eif.Image) { m.Ramdisks = make([][]byte, 29) }, eif.BadCount},
		{"an empty signature", func(m *eif.Image) { m.Signature = []byte{} }, eif.Empty},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := sample()
			tc.edit(&m)
			if _, err := m.Encode(); !errors.Is(err, tc.want) {
				t.Errorf("encode: %v, want %v", err, tc.want)
			}
			if _, err := m.Measure(); !errors.Is(err, tc.want) {
				t.Errorf("measure: %v, want %v", err, tc.want)
			}
		})
	}
	full := sample()
	full.Ramdisks, full.Signature = make([][]byte, 28), []byte{1}
	for i := range full.Ramdisks {
		full.Ramdisks[i] = []byte{byte(i)}
	}
	if _, err := eif.Parse(encode(t, full)); err != nil {
		t.Errorf("28 ramdisks and a signature fill the table: %v", err)
	}
}

func TestEveryCodeHasATextOfItsOwn(t *testing.T) {
	seen := map[string]eif.Code{}
	for _, c := range eif.TestingOnlyCodes() {
		text := strings.TrimPrefix(c.Error(), string(c)+": ")
		if text == "" || text == c.Error() {
			t.Errorf("%s has no text", c)
		}
		if other, ok := seen[text]; ok {
			t.Errorf("%s and %s have one text", c, other)
		}
		seen[text] = c
	}
	if len(seen) < 30 {
		t.Errorf("%d codes", len(seen))
	}
}

// Computed with Python's hashlib from the definition of the registers: a zero
// register, extended once with the SHA-384 of the sections one behind the other.
func TestTheRegistersAreThoseOfTheDefinition(t *testing.T) {
	want := eif.Measurements{
		HashAlgorithm: "Sha384 { ... }",
		PCR0:          "7a54b0ceece784654d8445e9f543b38d0a2f6f1e9f89fc6a750d2b8a5b038de8380df9688575f024e4442df9f20441e8",
		PCR1:          "c25d4b2cfd9203264027ddb9b7d33aab2683a661739101453f4b7cf7aa67f1669c77308e03ed2e741c57dc127436017a",
		PCR2:          "ce19d22a3254eb42d44040f172c0a45fac31aa7c61e10702f95a23228e9c285951752cf9a43889687fc1e7335d3ee594",
	}
	got, err := sample().Measure()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestEachSectionMovesItsRegisters(t *testing.T) {
	before, err := sample().Measure()
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name  string
		edit  func(*eif.Image)
		moves [3]bool // PCR0, 1, 2
	}{
		{"kernel", func(m *eif.Image) { m.Kernel = []byte("another kernel") }, [3]bool{true, true, false}},
		{"command line", func(m *eif.Image) { m.Cmdline += " quiet" }, [3]bool{true, true, false}},
		{"first ramdisk", func(m *eif.Image) { m.Ramdisks[0] = []byte("x") }, [3]bool{true, true, false}},
		{"second ramdisk", func(m *eif.Image) { m.Ramdisks[1] = []byte("x") }, [3]bool{true, false, true}},
		{"third ramdisk", func(m *eif.Image) { m.Ramdisks = append(m.Ramdisks, []byte("x")) }, [3]bool{true, false, true}},
		{"metadata", func(m *eif.Image) { m.Metadata = []byte("{}") }, [3]bool{}},
		{"memory and CPUs", func(m *eif.Image) { m.DefaultMemory, m.DefaultCPUs = 5, 6 }, [3]bool{}},
		{"architecture", func(m *eif.Image) { m.Arch = eif.ARM64 }, [3]bool{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := sample()
			tc.edit(&m)
			after, err := m.Measure()
			if err != nil {
				t.Fatal(err)
			}
			if got := [3]bool{after.PCR0 != before.PCR0, after.PCR1 != before.PCR1, after.PCR2 != before.PCR2}; got != tc.moves {
				t.Errorf("moved %v, want %v", got, tc.moves)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	signed := sample()
	signed.Signature = []byte("signature")
	f.Add(encode(f, sample()))
	f.Add(encode(f, signed))
	f.Add(shape{kinds: []uint16{1, 2, 5, 3, 3, 4}}.build())
	f.Fuzz(func(t *testing.T, b []byte) {
		b = seal(bytes.Clone(b)) // or the checksum would keep all others from being reached
		m, err := eif.Parse(b)
		if err != nil {
			if !hasCode(err) {
				t.Fatalf("%v has no code", err)
			}
			return
		}
		again, err := m.Encode()
		if err != nil {
			t.Fatalf("what was parsed cannot be encoded: %v", err)
		}
		if diff := cmp.Diff(b, again); diff != "" {
			t.Errorf("-parsed +encoded:\n%s", diff)
		}
	})
}
