package image

import (
	"fmt"
	"slices"

	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/eif/cpio"
)

// Difference is one thing in which two images differ.
type Difference struct {
	Section  string `json:"section"`  // kernel, command line, metadata, ramdisk N, signature, header
	Detail   string `json:"detail"`   // what, and in a ramdisk in which file
	Measured bool   `json:"measured"` // in PCR0
}

// Compare tells in what an image differs from the one that was wanted. Nothing at
// all differs where it returns nothing; one of the two may be signed only if the
// other is.
func Compare(want, got eif.Image) []Difference {
	var d []Difference
	add := func(measured bool, section, format string, args ...any) {
		d = append(d, Difference{section, fmt.Sprintf(format, args...), measured})
	}
	if want.Arch != got.Arch {
		add(false, "header", "the architecture is %s, not %s", got.Arch, want.Arch)
	}
	if want.DefaultMemory != got.DefaultMemory || want.DefaultCPUs != got.DefaultCPUs {
		add(false, "header", "the default memory or number of CPUs differs")
	}
	if string(want.Kernel) != string(got.Kernel) {
		add(true, "kernel", "SHA-256 %s, not %s", sum(got.Kernel), sum(want.Kernel))
	}
	if want.Cmdline != got.Cmdline {
		add(true, "command line", "%q, not %q", got.Cmdline, want.Cmdline)
	}
	if string(want.Metadata) != string(got.Metadata) {
		add(false, "metadata", "they differ (build time, names), but are not measured")
	}
	for i := range max(len(want.Ramdisks), len(got.Ramdisks)) {
		section := fmt.Sprintf("ramdisk %d", i)
		switch {
		case i >= len(got.Ramdisks):
			add(true, section, "it is missing")
		case i >= len(want.Ramdisks):
			add(true, section, "there should be none")
		case string(want.Ramdisks[i]) != string(got.Ramdisks[i]):
			for _, detail := range compareRamdisks(want.Ramdisks[i], got.Ramdisks[i]) {
				add(true, section, "%s", detail)
			}
		}
	}
	if string(want.Signature) != string(got.Signature) {
		add(false, "signature", "signed: %v, wanted: %v; the section differs", got.Signature != nil, want.Signature != nil)
	}
	return d
}

// compareRamdisks names the files that differ, of two ramdisks that do.
func compareRamdisks(want, got []byte) []string {
	wanted, err := cpio.Read(want)
	if err != nil {
		return []string{"the wanted one is no archive as Keyhold writes it: " + err.Error()}
	}
	files, err := cpio.Read(got)
	if err != nil {
		return []string{"it is no archive as Keyhold writes it: " + err.Error()}
	}
	find := func(in []cpio.File, name string) *cpio.File {
		if i := slices.IndexFunc(in, func(f cpio.File) bool { return f.Name == name }); i >= 0 {
			return &in[i]
		}
		return nil
	}
	var out []string
	for i := range wanted {
		w := &wanted[i]
		g := find(files, w.Name)
		switch {
		case g == nil:
			out = append(out, w.Name+" is missing")
		case string(w.Data) != string(g.Data):
			out = append(out, fmt.Sprintf("%s has SHA-256 %s, not %s", w.Name, sum(g.Data), sum(w.Data)))
		case w.Mode != g.Mode || w.Major != g.Major || w.Minor != g.Minor:
			out = append(out, fmt.Sprintf("%s has mode %o, not %o, or another device number", w.Name, g.Mode, w.Mode))
		}
	}
	for i := range files {
		if find(wanted, files[i].Name) == nil {
			out = append(out, files[i].Name+" should not be there")
		}
	}
	return out
}

// CompareMeasurements names the registers in which an image differs from measured
// ones, and what is measured in them.
func CompareMeasurements(want, got eif.Measurements) []Difference {
	var d []Difference
	for _, r := range []struct{ name, holds, want, got string }{
		{"PCR0", "kernel, command line and ramdisks", want.PCR0, got.PCR0},
		{"PCR1", "kernel, command line and modules", want.PCR1, got.PCR1},
		{"PCR2", "init", want.PCR2, got.PCR2},
		{"PCR8", "signing certificate", want.PCR8, got.PCR8},
	} {
		if r.want != r.got {
			d = append(d, Difference{r.name, fmt.Sprintf("(%s) %s, not %s", r.holds, orNone(r.got), orNone(r.want)), true})
		}
	}
	return d
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}
