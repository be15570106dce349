package image_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/eif/cpio"
	"github.com/keyhold/keyhold/internal/image"
	"github.com/keyhold/keyhold/internal/image/imagetest"
)

const release = "6.12.0-test"

func module(number, name string, needs ...string) image.Module {
	return image.Module{Name: number + "-" + name + ".ko", Data: imagetest.Module(eif.AMD64, name, release, needs...)}
}

func parts() image.Parts {
	return image.Parts{
		Arch: eif.AMD64, Kernel: image.Kernel{Image: imagetest.Kernel(eif.AMD64, release)}, Cmdline: image.DefaultCmdline,
		Modules: []image.Module{
			module("01", "vsock"), module("02", "vmw_vsock_virtio_transport_common", "vsock"),
			module("03", "vmw_vsock_virtio_transport", "vmw_vsock_virtio_transport_common", "vsock"), module("10", "nsm"),
		},
		Init: imagetest.Program(eif.AMD64), BuildTime: time.Unix(0, 0),
	}
}

func build(t testing.TB, p image.Parts) eif.Image {
	t.Helper()
	m, err := image.Build(p)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestTheSamePartsGiveTheSameFile(t *testing.T) {
	a, err := build(t, parts()).Encode()
	if err != nil {
		t.Fatal(err)
	}
	b, err := build(t, parts()).Encode()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) { //nolint:forbidigo // nothing here is secret
		t.Error("the files differ")
	}
}

func TestTheFirstRamdiskHasTheModulesAndTheSecondTheInitAlone(t *testing.T) {
	m := build(t, parts())
	var got [][]string
	for _, r := range m.Ramdisks {
		files, err := cpio.Read(r)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, f := range files {
			names = append(names, f.Name)
		}
		got = append(got, names)
	}
	want := [][]string{
		{
			"dev", "dev/console", "modules", "modules/01-vsock.ko", "modules/02-vmw_vsock_virtio_transport_common.ko",
			"modules/03-vmw_vsock_virtio_transport.ko", "modules/10-nsm.ko", "proc", "sys",
		},
		{"init"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestAnImageWithoutModulesHasNoFolderForThem(t *testing.T) {
	p := parts()
	p.Modules, p.NSMBuiltIn = nil, true
	files, err := cpio.Read(build(t, p).Ramdisks[image.BootRamdisk])
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if f.Name == "modules" {
			t.Error("there is a folder of modules")
		}
	}
}

func TestTimeAndNameAreNotMeasured(t *testing.T) {
	p := parts()
	before, err := build(t, p).Measure()
	if err != nil {
		t.Fatal(err)
	}
	p.Name, p.BuildTime, p.Kernel.Source = "another", time.Unix(1, 0), image.Source{Package: "linux"}
	after, err := build(t, p).Measure()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("-before +after:\n%s", diff)
	}
}

func TestTheMetadataSayWhatTheImageIsMadeOf(t *testing.T) {
	p := parts()
	p.Kernel.Source = image.Source{Package: "linux-image", Version: "6.12-1", PackageSHA256: "aa"}
	d, err := build(t, p).Describe()
	if err != nil {
		t.Fatal(err)
	}
	if d.Metadata.KernelVersion != release || d.ImageName != "keyhold" || d.Metadata.BuildTime != "1970-01-01T00:00:00Z" {
		t.Errorf("described as %+v", d)
	}
	var got struct {
		Keyhold struct {
			KernelSource map[string]string `json:"kernel_source"`
			Modules      []string          `json:"modules"`
		}
	}
	if err := json.Unmarshal(d.Metadata.CustomMetadata, &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"package": "linux-image", "version": "6.12-1", "package_sha256": "aa"}
	if diff := cmp.Diff(want, got.Keyhold.KernelSource); diff != "" || len(got.Keyhold.Modules) != 4 {
		t.Errorf("%v\n%s", got.Keyhold.Modules, diff)
	}
}

func TestAnImageForARM64IsLaidOutTheSame(t *testing.T) {
	p := parts()
	p.Arch, p.Kernel.Image, p.Init = eif.ARM64, imagetest.Kernel(eif.ARM64, release), imagetest.Program(eif.ARM64)
	p.Modules = []image.Module{{Name: "01-nsm.ko", Data: imagetest.Module(eif.ARM64, "nsm", release)}}
	m := build(t, p)
	d, err := m.Describe()
	if err != nil {
		t.Fatal(err)
	}
	if m.Arch != eif.ARM64 || d.Metadata.KernelVersion != release { // an arm64 kernel does not say it, its modules do
		t.Errorf("%s, kernel %q", m.Arch, d.Metadata.KernelVersion)
	}
}

func TestPartsThatWouldNotBootTogetherAreRefused(t *testing.T) {
	edit := func(b []byte, at int, v byte) []byte {
		b = bytes.Clone(b)
		b[at] = v
		return b
	}
	for _, tc := range []struct {
		name string
		edit func(*image.Parts)
		want error
	}{
		{"no architecture", func(p *image.Parts) { p.Arch = "riscv64" }, image.ErrArch},
		{"no kernel", func(p *image.Parts) { p.Kernel.Image = nil }, image.ErrKernel},
		{"a kernel without its magic", func(p *image.Parts) { p.Kernel.Image = edit(p.Kernel.Image, 0x202, 'x') }, image.ErrKernel},
		{"a kernel without its boot flag", func(p *image.Parts) { p.Kernel.Image = edit(p.Kernel.Image, 0x1fe, 0) }, image.ErrKernel},
		{"a kernel whose version lies outside", func(p *image.Parts) { p.Kernel.Image = edit(p.Kernel.Image, 0x20f, 0xff) }, image.ErrKernel},
		{"a kernel without a version", func(p *image.Parts) { p.Kernel.Image = imagetest.Kernel(eif.AMD64, "") }, image.ErrKernel},
		{"a kernel of arm64", func(p *image.Parts) { p.Kernel.Image = imagetest.Kernel(eif.ARM64, release) }, image.ErrKernel},
		{"an init that is a script", func(p *image.Parts) { p.Init = []byte("#!/bin/sh\n") }, image.ErrInit},
		{"no init", func(p *image.Parts) { p.Init = nil }, image.ErrInit},
		{"an init of arm64", func(p *image.Parts) { p.Init = imagetest.Program(eif.ARM64) }, image.ErrInit},
		{"an init that is a module", func(p *image.Parts) { p.Init = p.Modules[0].Data }, image.ErrInit},
		{"an init with a loader", func(p *image.Parts) { p.Init = imagetest.Dynamic(eif.AMD64) }, image.ErrInit},
		{"no nsm", func(p *image.Parts) { p.Modules = p.Modules[:3] }, image.ErrNoNSM},
		{"a module without a number", func(p *image.Parts) { p.Modules[0].Name = "vsock.ko" }, image.ErrModuleName},
		{"a module in another folder", func(p *image.Parts) { p.Modules[0].Name = "../01-vsock.ko" }, image.ErrModuleName},
		{"a module compressed", func(p *image.Parts) { p.Modules[0].Name = "01-vsock.ko.xz" }, image.ErrModuleName},
		{"one number twice", func(p *image.Parts) { p.Modules[1].Name = "01-vmw_vsock_virtio_transport_common.ko" }, image.ErrModuleName},
		{"modules out of order", func(p *image.Parts) { p.Modules[0].Name = "09-vsock.ko" }, image.ErrModuleName},
		{"a module under another's name", func(p *image.Parts) { p.Modules[3].Data = module("10", "loop").Data }, image.ErrModuleName},
		{"a module that is none", func(p *image.Parts) { p.Modules[3].Data = []byte("\xfd7zXZ") }, image.ErrModule},
		{"a module that is a program", func(p *image.Parts) { p.Modules[3].Data = p.Init }, image.ErrModule},
		{"a module of arm64", func(p *image.Parts) { p.Modules[3].Data = imagetest.Module(eif.ARM64, "nsm", release) }, image.ErrModule},
		{"a module of another kernel", func(p *image.Parts) { p.Modules[3].Data = imagetest.Module(eif.AMD64, "nsm", "6.12.1-test") }, image.ErrModuleKernel},
		{"a missing module", func(p *image.Parts) { p.Modules = p.Modules[1:] }, image.ErrModuleNeeds},
		{"a module before what it needs", func(p *image.Parts) {
			p.Modules[3].Data = imagetest.Module(eif.AMD64, "nsm", release, "zzz")
			p.Modules = append(p.Modules, module("11", "zzz"))
		}, image.ErrModuleNeeds},
		{"a shell", func(p *image.Parts) { p.Cmdline = "console=ttyS0 init=/bin/sh" }, image.ErrCmdlineDanger},
		{"a file beside the init in no folder", func(p *image.Parts) {
			p.Beside = []cpio.File{{Name: "etc/roots.pem", Mode: cpio.Regular | 0o644}}
		}, cpio.ErrParent},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := parts()
			tc.edit(&p)
			if _, err := image.Build(p); !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
		})
	}
}

func TestACommandLineHasOnlyParametersThatAreKnown(t *testing.T) {
	for _, tc := range []struct {
		line string
		want error
	}{
		{image.DefaultCmdline, nil},
		// AWS's blobs for x86_64 and aarch64
		{"reboot=k panic=30 pci=off nomodules console=ttyS0 i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd random.trust_cpu=on", nil},
		{"reboot=k panic=30 pci=off nomodules console=ttyS0 random.trust_cpu=on root=/dev/ram0", nil},
		{"", image.ErrCmdlineForm},
		{"   ", image.ErrCmdlineForm},
		{"console=ttyS0\n", image.ErrCmdlineForm},
		{"console=ttyS0\x00init=/bin/sh", image.ErrCmdlineForm},
		{"quiet \x1b[2J", image.ErrCmdlineForm},
		{"quiet caf\u00e9", image.ErrCmdlineForm},
		{`"init=/bin/sh"`, image.ErrCmdlineForm},
		{strings.Repeat("quiet ", 400), image.ErrCmdlineForm},
		{"init=/bin/sh", image.ErrCmdlineDanger},
		{"rdinit=/bin/sh", image.ErrCmdlineDanger},
		{"quiet single", image.ErrCmdlineDanger},
		{"1", image.ErrCmdlineDanger},
		{"emergency", image.ErrCmdlineDanger},
		{"debug", image.ErrCmdlineDanger},
		{"kgdboc=ttyS0", image.ErrCmdlineDanger},
		{"quiet -- --shell", image.ErrCmdlineDanger},
		{"mitigations=off", image.ErrCmdlineDanger},
		{"panic=0", image.ErrCmdlineDanger},
		{"ip=dhcp", image.ErrCmdlineDanger},
		{"sysrq_always_enabled", image.ErrCmdlineDanger},
		{"root=/dev/vda", image.ErrCmdlineUnknown},
		{"console=tty0", image.ErrCmdlineUnknown},
		{"quietly", image.ErrCmdlineUnknown},
		{"i8042xnoaux", image.ErrCmdlineUnknown},
		{"something=else", image.ErrCmdlineUnknown},
		{"lockdown=none", image.ErrCmdlineUnknown},
	} {
		if err := image.CheckCmdline(tc.line); !errors.Is(err, tc.want) {
			t.Errorf("%q: %v, want %v", tc.line, err, tc.want)
		}
	}
}

func TestACompareNamesTheFileThatDiffers(t *testing.T) {
	for _, tc := range []struct {
		name string
		edit func(*image.Parts)
		want []string
	}{
		{"nothing", func(*image.Parts) {}, nil},
		{"the kernel", func(p *image.Parts) { p.Kernel.Image = append(bytes.Clone(p.Kernel.Image), 0) }, []string{"metadata", "kernel*"}},
		{"the command line", func(p *image.Parts) { p.Cmdline = "quiet" }, []string{"command line*"}},
		{"the name", func(p *image.Parts) { p.Name = "x" }, []string{"metadata"}},
		{"a module", func(p *image.Parts) {
			p.Modules[3].Data = append(bytes.Clone(p.Modules[3].Data), 0)
		}, []string{"ramdisk 0* modules/10-nsm.ko has SHA-256"}},
		{"a module more", func(p *image.Parts) { p.Modules = append(p.Modules, module("11", "loop")) }, []string{"metadata", "ramdisk 0* modules/11-loop.ko should not be there"}},
		{"a module less", func(p *image.Parts) { p.Modules, p.NSMBuiltIn = p.Modules[:3], true }, []string{"metadata", "ramdisk 0* modules/10-nsm.ko is missing"}},
		{"the init", func(p *image.Parts) { p.Init = append(bytes.Clone(p.Init), 0) }, []string{"metadata", "ramdisk 1* init has SHA-256"}},
		{"a file beside the init", func(p *image.Parts) {
			p.Beside = []cpio.File{{Name: "kms-root.pem", Mode: cpio.Regular | 0o644}}
		}, []string{"ramdisk 1* kms-root.pem should not be there"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := parts()
			tc.edit(&p)
			found := image.Compare(build(t, parts()), build(t, p))
			var got []string
			for _, d := range found {
				text := d.Section
				if d.Measured {
					text += "*"
				}
				got = append(got, text+" "+d.Detail)
			}
			if len(got) != len(tc.want) {
				t.Fatalf("%q, want %q", got, tc.want)
			}
			for _, w := range tc.want {
				if !contains(got, w) {
					t.Errorf("%q lacks %q", got, w)
				}
			}
		})
	}
}

func contains(lines []string, prefix string) bool {
	for _, l := range lines {
		if strings.HasPrefix(l, prefix) {
			return true
		}
	}
	return false
}

func TestACompareSeesWhatBuildDoesNotWrite(t *testing.T) {
	want := build(t, parts())
	for _, tc := range []struct {
		name string
		edit func(*eif.Image)
		want string
	}{
		{"the architecture", func(m *eif.Image) { m.Arch = eif.ARM64 }, "header"},
		{"the memory", func(m *eif.Image) { m.DefaultMemory++ }, "header"},
		{"a third ramdisk", func(m *eif.Image) { m.Ramdisks = append(m.Ramdisks, []byte("x")) }, "ramdisk 2"},
		{"a ramdisk less", func(m *eif.Image) { m.Ramdisks = m.Ramdisks[:1] }, "ramdisk 1"},
		{"a ramdisk that is no archive", func(m *eif.Image) { m.Ramdisks = [][]byte{m.Ramdisks[0], []byte("\x1f\x8b")} }, "ramdisk 1"},
		{"a signature", func(m *eif.Image) { m.Signature = []byte("x") }, "signature"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := build(t, parts())
			tc.edit(&got)
			d := image.Compare(want, got)
			if len(d) != 1 || d[0].Section != tc.want {
				t.Errorf("%+v, want one difference in %s", d, tc.want)
			}
		})
	}
}

func TestMeasurementsOfAnotherImageAreNamedByRegister(t *testing.T) {
	want := eif.Measurements{PCR0: "a", PCR1: "b", PCR2: "c"}
	for _, tc := range []struct {
		name string
		got  eif.Measurements
		want []string
	}{
		{"the same", want, nil},
		{"another init", eif.Measurements{PCR0: "x", PCR1: "b", PCR2: "x"}, []string{"PCR0", "PCR2"}},
		{"another kernel", eif.Measurements{PCR0: "x", PCR1: "x", PCR2: "c"}, []string{"PCR0", "PCR1"}},
		{"signed", eif.Measurements{PCR0: "a", PCR1: "b", PCR2: "c", PCR8: "d"}, []string{"PCR8"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got []string
			for _, d := range image.CompareMeasurements(want, tc.got) {
				got = append(got, d.Section)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestAFolderOfScriptsKernelIsRead(t *testing.T) {
	folder := t.TempDir()
	write(t, folder, "bzImage", imagetest.Kernel(eif.AMD64, release))
	write(t, folder, "version", []byte(release+"\nlinux-image-x\n6.12-1\nabcd\n"))
	write(t, folder, "modules/01-vsock.ko", module("01", "vsock").Data)
	write(t, folder, "modules/02-nsm.ko", module("02", "nsm").Data)
	kernel, modules, err := image.ReadKernel(folder, eif.AMD64)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(image.Source{Package: "linux-image-x", Version: "6.12-1", PackageSHA256: "abcd"}, kernel.Source); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	p := parts()
	p.Kernel, p.Modules = kernel, modules
	build(t, p)
	if _, _, err := image.ReadKernel(t.TempDir(), eif.AMD64); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an empty folder: %v", err)
	}
}

func TestAWSsBlobsGoThroughTheSameLayout(t *testing.T) {
	folder := t.TempDir()
	write(t, folder, "bzImage", imagetest.Kernel(eif.AMD64, "4.14.256"))
	write(t, folder, "cmdline", []byte("reboot=k panic=30 pci=off nomodules console=ttyS0 random.trust_cpu=on\n"))
	write(t, folder, "nsm.ko", imagetest.Module(eif.AMD64, "nsm", "4.14.256"))
	kernel, modules, line, err := image.ReadBlobs(folder, eif.AMD64)
	if err != nil {
		t.Fatal(err)
	}
	m := build(t, image.Parts{Arch: eif.AMD64, Kernel: kernel, Cmdline: line, Modules: modules, Init: imagetest.Program(eif.AMD64)})
	files, err := cpio.Read(m.Ramdisks[image.BootRamdisk])
	if err != nil {
		t.Fatal(err)
	}
	if last := files[len(files)-3].Name; last != "modules/01-nsm.ko" {
		t.Errorf("%q", last)
	}
	repository := t.TempDir()
	if err := os.CopyFS(filepath.Join(repository, "x86_64"), os.DirFS(folder)); err != nil {
		t.Fatal(err)
	}
	if _, again, _, err := image.ReadBlobs(repository, eif.AMD64); err != nil || len(again) != 1 {
		t.Errorf("laid out as in AWS's repository: %d modules, %v", len(again), err)
	}
	if err := os.Remove(filepath.Join(folder, "nsm.ko")); err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := image.ReadBlobs(folder, eif.AMD64); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without nsm.ko: %v", err)
	}
}

func write(t testing.TB, folder, name string, b []byte) {
	t.Helper()
	file := filepath.Join(folder, name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func FuzzBuild(f *testing.F) {
	p := parts()
	f.Add(p.Kernel.Image, p.Init, p.Modules[3].Data, p.Cmdline)
	f.Fuzz(func(t *testing.T, kernel, init, nsm []byte, cmdline string) {
		p := parts()
		p.Kernel.Image, p.Init, p.Modules, p.Cmdline = kernel, init, []image.Module{{Name: "01-nsm.ko", Data: nsm}}, cmdline
		m, err := image.Build(p)
		if err != nil {
			return
		}
		b, err := m.Encode()
		if err != nil {
			t.Fatalf("built, but not encoded: %v", err)
		}
		if binary.BigEndian.Uint32(b) != 0x2e656966 {
			t.Error("no EIF")
		}
	})
}
