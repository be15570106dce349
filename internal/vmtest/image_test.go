package vmtest_test

import (
	"bytes"
	"encoding/hex"
	"os"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/eif/cpio"
	"github.com/keyhold/keyhold/internal/image"
	"github.com/keyhold/keyhold/internal/vmtest/kmod"
)

const (
	requireEnv = "KEYHOLD_VM" // make vm-test sets it, after making what is needed
	root       = "../.."

	kernelFolder     = root + "/dist/kernel/amd64"
	shippedImage     = root + "/dist/amd64/keyhold.eif"
	testProgram      = root + "/bin/vm/testimage"
	bootstrapProgram = root + "/bin/vm/bootstrap"

	modules   = "modules"
	nsmModule = "nsm.ko"
	nsmRNG    = "nsm-hwrng" // what the kernel calls the NSM among its random sources
)

// needVM skips a test that is not to run now.
func needVM(t *testing.T) {
	t.Helper()
	if os.Getenv(requireEnv) == "" {
		t.Skip("this test boots virtual machines: make vm-test runs it")
	}
}

// shipped is the image that make eif made.
func shipped(t *testing.T) built {
	t.Helper()
	file, err := image.ReadFile(shippedImage)
	if err != nil {
		t.Fatalf("make vm-test builds it: %v", err)
	}
	return read(t, file)
}

// underTest is the image that takes the emulated KMS for the real one. Nothing
// else tells it from the shipped one.
func (s *site) underTest() built {
	s.t.Helper()
	return build(s.t, testProgram, s.roots("kms-root.pem"))
}

// roots is the file by which the program under test knows the emulated KMS.
func (s *site) roots(name string) cpio.File {
	return cpio.File{Name: name, Mode: cpio.Regular | 0o644, Data: s.kms.CACertificate()}
}

// underBootstrap is the image under test as nitro-cli would make it: another
// program is the init, which starts ours in a root of its own.
func (s *site) underBootstrap() built {
	s.t.Helper()
	program, err := os.ReadFile(testProgram)
	if err != nil {
		s.t.Fatalf("make vm-test builds it: %v", err)
	}
	files := []cpio.File{s.roots("rootfs/kms-root.pem"), {Name: "rootfs/keyhold-enclave", Mode: cpio.Regular | 0o755, Data: program}}
	for _, name := range []string{"rootfs", "rootfs/dev", "rootfs/proc", "rootfs/sys"} {
		files = append(files, cpio.File{Name: name, Mode: cpio.Directory | 0o755})
	}
	return build(s.t, bootstrapProgram, files...)
}

// built is an image with what it measures.
type built struct {
	eif.Image
	pcrs map[int][]byte // 0, 1 and 2
	size float64        // of the file, in MB
}

// build makes an image file of a program and reads it again, so that what is
// booted and measured is what the file says.
func build(t *testing.T, program string, beside ...cpio.File) built {
	t.Helper()
	init, err := os.ReadFile(program)
	if err != nil {
		t.Fatalf("make vm-test builds it: %v", err)
	}
	kernel, mods, err := image.ReadKernel(kernelFolder, eif.AMD64)
	if err != nil {
		t.Fatal(err)
	}
	img, err := image.Build(image.Parts{
		Arch: eif.AMD64, Kernel: kernel, Cmdline: image.DefaultCmdline, Modules: mods, Init: init, Beside: beside, BuildTime: time.Unix(0, 0),
	})
	if err != nil {
		t.Fatal(err)
	}
	return reread(t, img)
}

// reread encodes an image and takes it out of the file again.
func reread(t *testing.T, img eif.Image) built {
	t.Helper()
	file, err := img.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return read(t, file)
}

func read(t *testing.T, file []byte) built {
	t.Helper()
	img, err := eif.Parse(file)
	if err != nil {
		t.Fatal(err)
	}
	m, err := img.Measure()
	if err != nil {
		t.Fatal(err)
	}
	out := built{img, map[int][]byte{}, float64(len(file)) / 1e6}
	for i, text := range []string{m.PCR0, m.PCR1, m.PCR2} {
		if out.pcrs[i], err = hex.DecodeString(text); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

// without returns the image without a file of its first ramdisk: an image that
// lost something, which image.Build would not have made.
func (b built) without(t *testing.T, name string) built {
	t.Helper()
	files, err := cpio.Read(b.Ramdisks[image.BootRamdisk])
	if err != nil {
		t.Fatal(err)
	}
	var left []cpio.File
	for _, f := range files {
		if !strings.HasSuffix(f.Name, name) {
			left = append(left, f)
		}
	}
	if len(left) != len(files)-1 {
		t.Fatalf("%d files of the image are called %s", len(files)-len(left), name)
	}
	var out bytes.Buffer
	if err := cpio.Write(&out, left); err != nil {
		t.Fatal(err)
	}
	img := b.Image
	img.Ramdisks = append([][]byte{out.Bytes()}, img.Ramdisks[1:]...)
	return reread(t, img)
}

// initrd returns the ramdisks of the image, and behind them one that puts the
// changed driver of the NSM in the place of the measured one.
func (b built) initrd(t *testing.T, change func([]byte) []byte) []byte {
	t.Helper()
	files, err := cpio.Read(b.Ramdisks[image.BootRamdisk])
	if err != nil {
		t.Fatal(err)
	}
	overlay := []cpio.File{{Name: modules, Mode: cpio.Directory | 0o755}}
	for _, f := range files {
		if !f.IsRegular() || !strings.HasSuffix(path.Base(f.Name), nsmModule) {
			continue
		}
		if f.Data, err = kmod.Retarget(f.Data, kmod.VirtioNSM, kmod.VirtioRNG); err != nil {
			t.Fatal(err)
		}
		f.Data = change(f.Data)
		overlay = append(overlay, f)
	}
	var out bytes.Buffer
	for _, r := range b.Ramdisks {
		out.Write(r)
	}
	if err := cpio.Write(&out, overlay); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}
