// Package imagetest makes kernels, modules and programs that an image can be
// built of and that no machine can run.
package imagetest

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"strings"

	"github.com/keyhold/keyhold/internal/eif"
)

// Kernel is a file that begins like a kernel of that release.
func Kernel(arch eif.Arch, release string) []byte {
	b := make([]byte, 0x1000)
	if arch == eif.ARM64 {
		copy(b[56:], "ARM\x64")
		return b
	}
	copy(b[0x1fe:], "\x55\xaa")
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x20e:], 0x600) // of the version, less 0x200
	copy(b[0x800:], release+" (nobody@example) #1 SMP")
	return b
}

// Program is a static program.
func Program(arch eif.Arch) []byte {
	return file(arch, elf.ET_EXEC, []elf.Prog64{{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X)}}, nil)
}

// Dynamic is a program that asks for a loader.
func Dynamic(arch eif.Arch) []byte {
	return file(arch, elf.ET_DYN, []elf.Prog64{{Type: uint32(elf.PT_INTERP)}, {Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_X)}}, nil)
}

// Module is a module of that kernel, which needs others.
func Module(arch eif.Arch, name, release string, needs ...string) []byte {
	info := "license=GPL\x00name=" + name + "\x00depends=" + strings.Join(needs, ",") + "\x00vermagic=" + release + " SMP mod_unload \x00"
	return file(arch, elf.ET_REL, nil, []byte(info))
}

// names are those of the sections: the empty one, .modinfo and .shstrtab.
const names = "\x00.modinfo\x00.shstrtab\x00"

// file writes an ELF file of two parts: its headers, and where info is not nil
// the sections .modinfo and .shstrtab.
func file(arch eif.Arch, kind elf.Type, progs []elf.Prog64, info []byte) []byte {
	h := elf.Header64{
		Ident: [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(kind), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
		Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: uint16(len(progs)), Shentsize: 64, //nolint:gosec // at most two
	}
	if arch == eif.ARM64 {
		h.Machine = uint16(elf.EM_AARCH64)
	}
	at := h.Phoff + 56*uint64(len(progs))
	var sections []elf.Section64
	if info != nil {
		sections = []elf.Section64{
			{},
			{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: at, Size: uint64(len(info))},
			{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: at + uint64(len(info)), Size: uint64(len(names))},
		}
		h.Shoff, h.Shnum, h.Shstrndx = at+uint64(len(info)+len(names)), 3, 2
		info = append(info, names...)
	}
	var b bytes.Buffer
	for _, part := range []any{h, progs, info, sections} {
		if err := binary.Write(&b, binary.LittleEndian, part); err != nil {
			panic("imagetest: " + err.Error()) // a buffer takes everything of a fixed size
		}
	}
	return b.Bytes()
}
