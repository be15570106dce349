// Package image assembles a Keyhold image out of a kernel, its modules and the
// program that is its init, and says where two images differ. It refuses parts
// that would not boot together, or that could start anything but that program.
package image

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"

	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/eif/cpio"
)

// Layout is the version of how an image is laid out. Another layout of the same
// parts has another PCR0.
const Layout = "1"

// BuildTool is what an image names as the tool that built it.
const BuildTool = "keyhold image build"

// DefaultCmdline is for Debian's kernel: console on the serial port, and a kernel
// that ends the machine when something is wrong rather than running on.
const DefaultCmdline = "reboot=k panic=-1 oops=panic console=ttyS0 quiet"

// The two ramdisks, and where their files lie.
const (
	BootRamdisk  = 0 // measured in PCR1, with kernel and command line
	AppRamdisk   = 1 // measured in PCR2
	moduleFolder = "modules"
	initName     = "init"
)

// Parts is what an image is built of.
type Parts struct {
	Arch    eif.Arch
	Kernel  Kernel
	Cmdline string
	Modules []Module // loaded in this order
	// NSMBuiltIn says that the kernel needs no module for the NSM.
	NSMBuiltIn bool
	Init       []byte // a static ELF file
	// Beside puts files next to the init. Images under test have some, the shipped one has none.
	Beside []cpio.File

	Name      string    // not measured
	BuildTime time.Time // not measured
}

// Kernel is a kernel and where it came from.
type Kernel struct {
	Image  []byte // bzImage, or an arm64 Image
	Source Source
}

// Source says where a kernel came from. It goes into the metadata, which are not
// measured: the kernel itself is.
type Source struct {
	Package       string `json:"package,omitempty"`
	Version       string `json:"version,omitempty"`
	PackageSHA256 string `json:"package_sha256,omitempty"`
}

// Module is a kernel module, decompressed.
type Module struct {
	Name string // NN-name.ko
	Data []byte
}

// Build assembles an image. The same parts give the same bytes.
func Build(p Parts) (eif.Image, error) {
	release, err := p.check()
	if err != nil {
		return eif.Image{}, err
	}
	boot, err := ramdisk(p.bootFiles())
	if err != nil {
		return eif.Image{}, fmt.Errorf("ramdisk %d: %w", BootRamdisk, err)
	}
	app, err := ramdisk(append([]cpio.File{{Name: initName, Mode: cpio.Regular | 0o755, Data: p.Init}}, p.Beside...))
	if err != nil {
		return eif.Image{}, fmt.Errorf("ramdisk %d: %w", AppRamdisk, err)
	}
	meta, err := p.metadata(release)
	if err != nil {
		return eif.Image{}, err
	}
	return eif.Image{
		Arch: p.Arch, DefaultMemory: eif.DefaultMemory, DefaultCPUs: eif.DefaultCPUs,
		Kernel: p.Kernel.Image, Cmdline: p.Cmdline, Metadata: meta, Ramdisks: [][]byte{boot, app},
	}, nil
}

// bootFiles are the mount points that the init uses, the console that the kernel
// opens for it, and the modules.
func (p *Parts) bootFiles() []cpio.File {
	folder := func(name string) cpio.File { return cpio.File{Name: name, Mode: cpio.Directory | 0o755} }
	files := []cpio.File{
		folder("dev"),
		{Name: "dev/console", Mode: cpio.CharDev | 0o600, Major: 5, Minor: 1},
		folder("proc"),
		folder("sys"),
	}
	if len(p.Modules) > 0 {
		files = append(files, folder(moduleFolder))
	}
	for _, m := range p.Modules {
		files = append(files, cpio.File{Name: moduleFolder + "/" + m.Name, Mode: cpio.Regular | 0o644, Data: m.Data})
	}
	return files
}

// ramdisk stays uncompressed: another release of a compressor would change PCR0,
// and a loader that shows one part of the image as it is needs no other tool.
func ramdisk(files []cpio.File) ([]byte, error) {
	var b bytes.Buffer
	if err := cpio.Write(&b, files); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// custom is Keyhold's own part of the metadata.
type custom struct {
	Keyhold about
}

// about lets somebody who has an image and its inputs find out which are which.
type about struct {
	Arch         eif.Arch `json:"arch"`
	KernelSHA256 string   `json:"kernel_sha256"`
	KernelSource Source   `json:"kernel_source"`
	InitSHA256   string   `json:"init_sha256"`
	Modules      []string `json:"modules"`
}

func (p *Parts) metadata(release string) ([]byte, error) {
	a := about{Arch: p.Arch, KernelSHA256: sum(p.Kernel.Image), KernelSource: p.Kernel.Source, InitSHA256: sum(p.Init), Modules: []string{}}
	for _, m := range p.Modules {
		a.Modules = append(a.Modules, m.Name)
	}
	own, err := json.Marshal(custom{a})
	if err != nil {
		return nil, fmt.Errorf("encode metadata: %w", err)
	}
	name := p.Name
	if name == "" {
		name = "keyhold"
	}
	return eif.Info{
		ImageName: name, ImageVersion: a.InitSHA256[:16],
		BuildMetadata: eif.BuildInfo{
			BuildTime: p.BuildTime.UTC().Format(time.RFC3339), BuildTool: BuildTool, BuildToolVersion: Layout,
			OperatingSystem: "Linux", KernelVersion: release,
		},
		DockerInfo: json.RawMessage("null"), CustomMetadata: own,
	}.Encode()
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}
