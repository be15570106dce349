package kmod_test

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/vmtest/kmod"
)

// object is a relocatable ELF file of a few sections.
type object struct {
	alias  []string
	rodata []byte
	tables []elf.Sym64 // of the section rodata
	names  []string    // of tables
}

// nsm is how the NSM's driver looks.
func nsm() *object {
	return &object{
		alias: []string{"virtio:d00000021v*"}, rodata: append([]byte("something before"), deviceTable(33)...),
		tables: []elf.Sym64{{Value: 16, Size: 16, Shndx: 1}}, names: []string{"__mod_virtio__id_table_device_table"},
	}
}

func deviceTable(device uint32) []byte {
	b := binary.LittleEndian.AppendUint32(nil, device)
	b = binary.LittleEndian.AppendUint32(b, 0xffffffff)
	return append(b, make([]byte, 8)...)
}

func (o *object) encode(t *testing.T) []byte {
	t.Helper()
	modinfo := []byte("license=GPL\x00")
	for _, a := range o.alias {
		modinfo = append(modinfo, "alias="+a+"\x00"...)
	}
	strtab, symtab := []byte{0}, raw(t, elf.Sym64{})
	for i, s := range o.tables {
		s.Name = uint32(len(strtab))
		strtab = append(append(strtab, o.names[i]...), 0)
		symtab = append(symtab, raw(t, s)...)
	}
	const shstrtab = "\x00.rodata\x00.modinfo\x00.symtab\x00.strtab\x00.shstrtab\x00"
	name := func(s string) uint32 { return uint32(bytes.Index([]byte(shstrtab), []byte(s+"\x00"))) }
	sections := []struct {
		header elf.Section64
		data   []byte
	}{
		{},
		{elf.Section64{Name: name(".rodata"), Type: uint32(elf.SHT_PROGBITS), Flags: uint64(elf.SHF_ALLOC)}, o.rodata},
		{elf.Section64{Name: name(".modinfo"), Type: uint32(elf.SHT_PROGBITS)}, modinfo},
		{elf.Section64{Name: name(".symtab"), Type: uint32(elf.SHT_SYMTAB), Link: 4, Entsize: 24}, symtab},
		{elf.Section64{Name: name(".strtab"), Type: uint32(elf.SHT_STRTAB)}, strtab},
		{elf.Section64{Name: name(".shstrtab"), Type: uint32(elf.SHT_STRTAB)}, []byte(shstrtab)},
	}
	var body, headers []byte
	for _, s := range sections {
		s.header.Off, s.header.Size = uint64(64+len(body)), uint64(len(s.data))
		headers = append(headers, raw(t, s.header)...)
		body = append(body, s.data...)
	}
	h := elf.Header64{
		Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1, Shoff: uint64(64 + len(body)),
		Ehsize: 64, Shentsize: 64, Shnum: uint16(len(sections)), Shstrndx: 5,
	}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	return slices.Concat(raw(t, h), body, headers)
}

func raw(t *testing.T, v any) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// sign appends a signature of n bytes as the kernel's build does.
func sign(module []byte, n int) []byte {
	info := append(make([]byte, 8), binary.BigEndian.AppendUint32(nil, uint32(n))...)
	return slices.Concat(module, make([]byte, n), info, []byte("~Module signature appended~\n"))
}

func TestOneByteChangesAndTheSignatureGoes(t *testing.T) {
	plain := nsm().encode(t)
	want := bytes.Clone(plain)
	want[64+16] = 4
	for name, module := range map[string][]byte{"unsigned": plain, "signed": sign(plain, 123)} {
		before := bytes.Clone(module)
		got, err := kmod.Retarget(module, kmod.VirtioNSM, kmod.VirtioRNG)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if !cmp.Equal(got, want) {
			t.Errorf("%s: other bytes changed as well", name)
		}
		if !cmp.Equal(module, before) {
			t.Errorf("%s: the module that was given changed", name)
		}
	}
}

func TestAModuleInDoubtIsRefused(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(o *object)
	}{
		{"another device", func(o *object) { o.alias[0] = "virtio:d00000004v*" }},
		{"two devices", func(o *object) { o.alias = append(o.alias, "virtio:d00000013v*") }},
		{"no device", func(o *object) { o.alias = nil }},
		{"a table of another device", func(o *object) { copy(o.rodata[16:], deviceTable(4)) }},
		{"a vendor", func(o *object) { o.rodata[20] = 1 }},
		{"a table of two", func(o *object) { o.rodata[24] = 4 }},
		{"a second place that looks the same", func(o *object) { o.rodata = append(o.rodata, deviceTable(33)...) }},
		{"no symbol of the table", func(o *object) { o.names[0] = "id_table" }},
		{"two tables", func(o *object) { o.tables, o.names = append(o.tables, o.tables[0]), append(o.names, o.names[0]) }},
		{"a table that is longer", func(o *object) { o.tables[0].Size = 24 }},
		{"a table beyond its section", func(o *object) { o.tables[0].Value = 17 }},
		{"a table far beyond it", func(o *object) { o.tables[0].Value = ^uint64(0) }},
		{"a table in no section", func(o *object) { o.tables[0].Shndx = uint16(elf.SHN_ABS) }},
		{"a table in another section", func(o *object) { o.tables[0].Shndx = 3 }},
	} {
		o := nsm()
		tc.change(o)
		if _, err := kmod.Retarget(o.encode(t), kmod.VirtioNSM, kmod.VirtioRNG); !errors.Is(err, kmod.ErrModule) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	program := nsm().encode(t)
	program[16] = byte(elf.ET_EXEC)
	for name, module := range map[string][]byte{
		"nothing": nil, "no ELF file": []byte("MZ"), "a program": program,
		"a signature longer than the file": append(nsm().encode(t), "\xff\xff\xff\xff~Module signature appended~\n"...),
	} {
		if _, err := kmod.Retarget(module, kmod.VirtioNSM, kmod.VirtioRNG); !errors.Is(err, kmod.ErrModule) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestANameIsReplacedWhereItStandsOnce(t *testing.T) {
	got, err := kmod.Rename([]byte("a\x00nsm-hwrng\x00b"), "nsm-hwrng", "bad-hwrng")
	if err != nil || string(got) != "a\x00bad-hwrng\x00b" {
		t.Errorf("%q, %v", got, err)
	}
	for name, module := range map[string]string{"none": "a\x00b", "two": "nsm\x00nsm\x00"} {
		if _, err := kmod.Rename([]byte(module), "nsm", "bad"); !errors.Is(err, kmod.ErrModule) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := kmod.Rename([]byte("nsm\x00"), "nsm", "longer"); !errors.Is(err, kmod.ErrModule) {
		t.Errorf("another length: %v", err)
	}
}

func TestDebiansDriverIsOneThatCanBeChanged(t *testing.T) {
	files, err := filepath.Glob(filepath.Join("..", "..", "..", "dist", "kernel", "amd64", "modules", "*-nsm.ko"))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 1 {
		t.Skip("no kernel here: scripts/kernel fetches it")
	}
	module, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	got, err := kmod.Retarget(module, kmod.VirtioNSM, kmod.VirtioRNG)
	if err != nil {
		t.Fatal(err)
	}
	changed := 0
	for i := range got {
		if got[i] != module[i] {
			changed++
		}
	}
	if changed != 1 {
		t.Errorf("%d bytes changed", changed)
	}
	if _, err := kmod.Rename(got, "nsm-hwrng", "bad-hwrng"); err != nil {
		t.Error(err)
	}
}
