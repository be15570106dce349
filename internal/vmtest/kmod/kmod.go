// Package kmod changes a kernel module so that it drives a device under another
// number: QEMU cannot make a virtio-nsm device on its usual machines, so a test
// shows the NSM's driver another device. It refuses a module in which not exactly
// one place says which device it drives. It is for tests: a module that was
// changed is not the one that anybody signed.
package kmod

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Numbers of virtio devices (virtio 1.2, section 5).
const (
	VirtioRNG = 4
	VirtioNSM = 33
)

// ErrModule refuses a module.
var ErrModule = errors.New("kernel module")

const (
	anyVendor = 0xffffffff
	tableLen  = 16 // a virtio_device_id of device and vendor, and one of zeros that ends the table

	aliasPrefix = "alias=virtio:"

	// signatureMagic ends a signed module; before it stands a module_signature,
	// whose last field is the length of the signature before that.
	signatureMagic = "~Module signature appended~\n"
	signatureInfo  = 12
)

// Retarget returns the module with its one device number changed, and without
// its signature.
func Retarget(module []byte, from, to uint32) ([]byte, error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil || f.Type != elf.ET_REL {
		return nil, errors.Join(fmt.Errorf("%w: not a relocatable ELF file", ErrModule), err)
	}
	if err := checkAlias(f, from); err != nil {
		return nil, err
	}
	at, err := tableOffset(f)
	if err != nil {
		return nil, err
	}
	old := table(from)
	if at > uint64(len(module))-tableLen || [tableLen]byte(module[at:at+tableLen]) != old {
		return nil, fmt.Errorf("%w: its table does not name device %d alone", ErrModule, from)
	}
	if n := bytes.Count(module, old[:]); n != 1 {
		return nil, fmt.Errorf("%w: %d places name device %d, want 1", ErrModule, n, from)
	}
	out := slices.Clone(module)
	binary.LittleEndian.PutUint32(out[at:], to)
	return unsigned(out)
}

func table(device uint32) (t [tableLen]byte) {
	binary.LittleEndian.PutUint32(t[:], device)
	binary.LittleEndian.PutUint32(t[4:], anyVendor)
	return t
}

// checkAlias looks at what depmod reads: the module must be for that device only.
func checkAlias(f *elf.File, device uint32) error {
	s := f.Section(".modinfo")
	if s == nil {
		return fmt.Errorf("%w: no .modinfo", ErrModule)
	}
	info, err := s.Data()
	if err != nil {
		return fmt.Errorf("%w: read .modinfo: %w", ErrModule, err)
	}
	var aliases []string
	for entry := range strings.SplitSeq(string(info), "\x00") {
		if strings.HasPrefix(entry, aliasPrefix) {
			aliases = append(aliases, entry)
		}
	}
	want := fmt.Sprintf("%sd%08Xv*", aliasPrefix, device)
	if len(aliases) != 1 || aliases[0] != want {
		return fmt.Errorf("%w: it has %d virtio aliases, want only that of device %d", ErrModule, len(aliases), device)
	}
	return nil
}

// tableOffset finds the table of devices in the file, by the symbol that
// MODULE_DEVICE_TABLE makes.
func tableOffset(f *elf.File) (uint64, error) {
	symbols, err := f.Symbols()
	if err != nil {
		return 0, fmt.Errorf("%w: read symbols: %w", ErrModule, err)
	}
	var found []elf.Symbol
	for _, s := range symbols {
		if strings.HasPrefix(s.Name, "__mod_virtio__") && strings.HasSuffix(s.Name, "_device_table") {
			found = append(found, s)
		}
	}
	if len(found) != 1 || int(found[0].Section) >= len(f.Sections) {
		return 0, fmt.Errorf("%w: %d tables of virtio devices, want 1", ErrModule, len(found))
	}
	s, section := found[0], f.Sections[found[0].Section]
	if section.Type != elf.SHT_PROGBITS || s.Size != tableLen || s.Value > section.Size || section.Size-s.Value < tableLen {
		return 0, fmt.Errorf("%w: its table of devices is not one device", ErrModule)
	}
	return section.Offset + s.Value, nil
}

// unsigned cuts the signature off, which no longer fits.
func unsigned(module []byte) ([]byte, error) {
	body, signed := bytes.CutSuffix(module, []byte(signatureMagic))
	if !signed {
		return module, nil
	}
	if len(body) < signatureInfo {
		return nil, fmt.Errorf("%w: its signature is malformed", ErrModule)
	}
	n := binary.BigEndian.Uint32(body[len(body)-4:])
	body = body[:len(body)-signatureInfo]
	if uint64(n) > uint64(len(body)) {
		return nil, fmt.Errorf("%w: its signature is malformed", ErrModule)
	}
	return body[:len(body)-int(n)], nil
}

// Rename replaces a string of the module by one of the same length. It must be
// there exactly once.
func Rename(module []byte, from, to string) ([]byte, error) {
	if len(from) != len(to) {
		return nil, fmt.Errorf("%w: the new name has another length", ErrModule)
	}
	old := append([]byte(from), 0)
	if n := bytes.Count(module, old); n != 1 {
		return nil, fmt.Errorf("%w: %d places hold the name, want 1", ErrModule, n)
	}
	return unsigned(bytes.Replace(module, old, append([]byte(to), 0), 1))
}
