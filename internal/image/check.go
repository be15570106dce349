package image

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/keyhold/keyhold/internal/eif"
)

// Reasons to refuse parts. What is wrong with which one stands beside them.
var (
	ErrArch         = errors.New("the architecture is not amd64 or arm64")
	ErrKernel       = errors.New("the kernel is not a bzImage (amd64) or an Image (arm64)")
	ErrInit         = errors.New("the init is not a static ELF program for the architecture")
	ErrModuleName   = errors.New("a module is not named NN-name.ko, each number once")
	ErrModule       = errors.New("a module is not a decompressed kernel module for the architecture")
	ErrModuleKernel = errors.New("a module belongs to another kernel")
	ErrModuleNeeds  = errors.New("a module needs one that is missing or comes later")
	ErrNoNSM        = errors.New("there is no module nsm, without which an enclave proves nothing: add it, or say that the kernel has it built in")
)

// check returns the kernel's release.
func (p *Parts) check() (string, error) {
	if p.Arch != eif.AMD64 && p.Arch != eif.ARM64 {
		return "", ErrArch
	}
	release, err := checkKernel(p.Arch, p.Kernel.Image)
	if err != nil {
		return "", err
	}
	if err := CheckCmdline(p.Cmdline); err != nil {
		return "", err
	}
	if err := checkInit(p.Arch, p.Init); err != nil {
		return "", err
	}
	of, err := p.checkModules(release)
	if err != nil {
		return "", err
	}
	if release == "" {
		release = of
	}
	return release, nil
}

// Where a bzImage has what (Linux, Documentation/arch/x86/boot.rst), and an Image
// of arm64 its magic (Documentation/arch/arm64/booting.rst).
const (
	bootFlagAt = 0x1fe
	bootMagic  = 0x202
	versionAt  = 0x20e // little-endian; where the version string begins, less 0x200
	versionLen = 256
	armMagicAt = 56
)

// checkKernel returns the release where the kernel says it: an arm64 one does not.
func checkKernel(arch eif.Arch, b []byte) (string, error) {
	if arch == eif.ARM64 {
		if len(b) < armMagicAt+8 || string(b[armMagicAt:armMagicAt+4]) != "ARM\x64" {
			return "", ErrKernel
		}
		return "", nil
	}
	if len(b) < versionAt+2 || string(b[bootFlagAt:bootFlagAt+2]) != "\x55\xaa" || string(b[bootMagic:bootMagic+4]) != "HdrS" {
		return "", ErrKernel
	}
	at := 0x200 + int(b[versionAt]) + int(b[versionAt+1])<<8
	if at == 0x200 || at >= len(b) {
		return "", ErrKernel
	}
	text, _, _ := strings.Cut(string(b[at:min(at+versionLen, len(b))]), "\x00")
	release, _, _ := strings.Cut(text, " ")
	if !releaseForm.MatchString(release) {
		return "", ErrKernel
	}
	return release, nil
}

var releaseForm = regexp.MustCompile(`^[0-9]+\.[0-9]+[-+._~0-9A-Za-z]*$`)

func machine(arch eif.Arch) elf.Machine {
	if arch == eif.ARM64 {
		return elf.EM_AARCH64
	}
	return elf.EM_X86_64
}

// checkInit wants a program that needs nothing else: the image has nothing else.
func checkInit(arch eif.Arch, b []byte) error {
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return fmt.Errorf("%w: it is no ELF file", ErrInit)
	}
	if f.Class != elf.ELFCLASS64 || f.Machine != machine(arch) {
		return fmt.Errorf("%w: it is for %s", ErrInit, f.Machine)
	}
	if f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN {
		return fmt.Errorf("%w: it is no program", ErrInit)
	}
	if slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
		return fmt.Errorf("%w: it asks for a dynamic loader", ErrInit)
	}
	if libraries, err := f.ImportedLibraries(); err != nil || len(libraries) > 0 {
		return fmt.Errorf("%w: it needs shared libraries", ErrInit)
	}
	if !slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_LOAD && p.Flags&elf.PF_X != 0 }) {
		return fmt.Errorf("%w: there is nothing in it to run", ErrInit)
	}
	return nil
}

var moduleForm = regexp.MustCompile(`^([0-9]{2})-([0-9a-z][-0-9_a-z]*)\.ko$`)

// checkModules returns the release that the modules were built for.
func (p *Parts) checkModules(kernel string) (string, error) {
	have := map[string]bool{}
	release, last := kernel, ""
	for _, m := range p.Modules {
		form := moduleForm.FindStringSubmatch(m.Name)
		if form == nil || form[1] <= last { // the init loads them by name, so this is their order
			return "", fmt.Errorf("%w: %q", ErrModuleName, m.Name)
		}
		last = form[1]
		about, err := readModule(p.Arch, m.Data)
		if err != nil {
			return "", fmt.Errorf("%s: %w", m.Name, err)
		}
		name := canonical(form[2])
		if about.name != "" && about.name != name {
			return "", fmt.Errorf("%w: %s holds %q", ErrModuleName, m.Name, about.name)
		}
		if release == "" {
			release = about.release
		}
		if about.release != release {
			return "", fmt.Errorf("%w: %s is for %q, the kernel is %q", ErrModuleKernel, m.Name, about.release, release)
		}
		for _, need := range about.needs {
			if !have[need] {
				return "", fmt.Errorf("%w: %s needs %q", ErrModuleNeeds, m.Name, need)
			}
		}
		have[name] = true
	}
	if !have["nsm"] && !p.NSMBuiltIn {
		return "", ErrNoNSM
	}
	return release, nil
}

// canonical is a module's name as the kernel has it: - and _ are one letter.
func canonical(name string) string { return strings.ReplaceAll(name, "-", "_") }

// moduleInfo is what a module says of itself, in its section .modinfo.
type moduleInfo struct {
	name    string   // empty before Linux 4.13
	release string   // of the kernel that it was built for
	needs   []string // names of modules; what is built in is not among them
}

func readModule(arch eif.Arch, b []byte) (moduleInfo, error) {
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil || f.Type != elf.ET_REL || f.Machine != machine(arch) {
		return moduleInfo{}, ErrModule
	}
	section := f.Section(".modinfo")
	if section == nil {
		return moduleInfo{}, ErrModule
	}
	raw, err := section.Data()
	if err != nil {
		return moduleInfo{}, ErrModule
	}
	var info moduleInfo
	for line := range strings.SplitSeq(string(raw), "\x00") {
		key, value, _ := strings.Cut(line, "=")
		switch key {
		case "name":
			info.name = canonical(value)
		case "vermagic":
			info.release, _, _ = strings.Cut(value, " ")
		case "depends":
			for need := range strings.SplitSeq(value, ",") {
				if need != "" {
					info.needs = append(info.needs, canonical(need))
				}
			}
		}
	}
	if !releaseForm.MatchString(info.release) {
		return moduleInfo{}, ErrModule
	}
	return info, nil
}
