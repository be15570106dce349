package image

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/keyhold/keyhold/internal/eif"
)

// ErrTooLarge refuses a file that can be no part of an image.
var ErrTooLarge = errors.New("the file is larger than 256 MiB, which no part of an image is")

// MaxFile bounds what is read of a file, in bytes.
const MaxFile = 256 << 20

// ReadFile reads a part of an image, or an image.
func ReadFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if len(b) > MaxFile {
		return nil, fmt.Errorf("%s: %w", name, ErrTooLarge)
	}
	return b, nil
}

// kernelName is how both scripts/kernel and AWS call the file.
func kernelName(arch eif.Arch) string {
	if arch == eif.ARM64 {
		return "Image"
	}
	return "bzImage"
}

// ReadKernel reads a folder that scripts/kernel wrote: bzImage (or Image), version
// and modules. Without a folder of modules there are none.
func ReadKernel(folder string, arch eif.Arch) (Kernel, []Module, error) {
	raw, err := ReadFile(filepath.Join(folder, kernelName(arch)))
	if err != nil {
		return Kernel{}, nil, fmt.Errorf("read the kernel (scripts/kernel fetches one): %w", err)
	}
	k := Kernel{Image: raw}
	version, err := ReadFile(filepath.Join(folder, "version"))
	switch {
	case err == nil:
		k.Source = parseVersion(string(version))
	case !errors.Is(err, fs.ErrNotExist): // it is only a note
		return Kernel{}, nil, fmt.Errorf("read where the kernel came from: %w", err)
	}
	entries, err := os.ReadDir(filepath.Join(folder, moduleFolder))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Kernel{}, nil, fmt.Errorf("read the modules: %w", err)
	}
	var modules []Module
	for _, e := range entries {
		raw, err := ReadFile(filepath.Join(folder, moduleFolder, e.Name()))
		if err != nil {
			return Kernel{}, nil, fmt.Errorf("read a module: %w", err)
		}
		modules = append(modules, Module{e.Name(), raw})
	}
	return k, modules, nil
}

// parseVersion reads the lines release, package, version and SHA-256.
func parseVersion(text string) Source {
	lines := append(strings.Split(text, "\n"), "", "", "", "")
	return Source{Package: lines[1], Version: lines[2], PackageSHA256: lines[3]}
}

// ReadBlobs reads AWS's folder of blobs, which the package
// aws-nitro-enclaves-cli-devel installs: kernel, command line and nsm.ko, in it or,
// as in AWS's repository, in one folder below for each architecture. The kernel has
// vsock built in. The init is left: Keyhold's is the enclave itself.
func ReadBlobs(folder string, arch eif.Arch) (Kernel, []Module, string, error) {
	below := filepath.Join(folder, map[eif.Arch]string{eif.AMD64: "x86_64", eif.ARM64: "aarch64"}[arch])
	if _, err := os.Stat(filepath.Join(below, kernelName(arch))); err == nil {
		folder = below
	}
	var parts [3][]byte
	for i, name := range []string{kernelName(arch), "nsm.ko", "cmdline"} {
		raw, err := ReadFile(filepath.Join(folder, name))
		if err != nil {
			return Kernel{}, nil, "", fmt.Errorf("read AWS's blobs (package aws-nitro-enclaves-cli-devel): %w", err)
		}
		parts[i] = raw
	}
	return Kernel{Image: parts[0], Source: Source{Package: "aws-nitro-enclaves-cli-devel"}},
		[]Module{{"01-nsm.ko", parts[1]}}, strings.TrimSpace(string(parts[2])), nil
}
