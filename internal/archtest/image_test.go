package archtest_test

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/image"
	"github.com/keyhold/keyhold/internal/image/imagetest"
)

// maxImage is what an image with its kernel may have, in bytes: the enclave's memory is at least four times it.
const maxImage = 30 << 20

// fetchedKernel is where scripts/kernel puts one.
const fetchedKernel = "dist/kernel/amd64"

// giveOnePCR0 makes an image of each program, with the kernel that make eif has fetched. Where it has not, one
// that no machine can run stands in, since the image is the same function of either.
func giveOnePCR0(t *testing.T, programs [][]byte) {
	t.Helper()
	kernel, modules, err := image.ReadKernel(filepath.Join(moduleRoot(t), fetchedKernel), eif.AMD64)
	fetched := err == nil
	if errors.Is(err, fs.ErrNotExist) {
		t.Log("no kernel was fetched (scripts/kernel): the images have an empty one")
		kernel = image.Kernel{Image: imagetest.Kernel(eif.AMD64, "6.12.0")}
		modules = []image.Module{{Name: "01-nsm.ko", Data: imagetest.Module(eif.AMD64, "nsm", "6.12.0")}}
	} else if err != nil {
		t.Fatal(err)
	}
	var first eif.Measurements
	for i, program := range programs {
		m, err := image.Build(image.Parts{Arch: eif.AMD64, Kernel: kernel, Cmdline: image.DefaultCmdline, Modules: modules, Init: program})
		if err != nil {
			t.Fatal(err)
		}
		raw, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		measured, err := m.Measure()
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = measured
			t.Logf("image of %d bytes, PCR0 %s", len(raw), measured.PCR0)
		}
		if measured != first {
			t.Errorf("the measurements differ: %+v, %+v", first, measured)
		}
		if fetched && len(raw) > maxImage {
			t.Errorf("the image has %d bytes, more than %d", len(raw), maxImage)
		}
	}
}

// The whole of make eif, in two copies that differ in their place. It compiles what the cache does not have.
func TestMakeEIFGivesOneFileFromTwoFolders(t *testing.T) {
	if os.Getenv(coldEnv) != "1" {
		t.Skip("runs make eif twice (" + coldEnv + "=1)")
	}
	if _, err := os.Stat(filepath.Join(moduleRoot(t), fetchedKernel, "version")); err != nil {
		t.Skip("no kernel was fetched, and two fetches could bring two: run scripts/kernel")
	}
	var files [][]byte
	for _, name := range []string{"one", "a-longer-name/two"} {
		folder := copyOfTheModule(t, name)
		copyInto(t, folder, "Makefile", "scripts", fetchedKernel)
		cmd := exec.CommandContext(t.Context(), "make", "eif")
		cmd.Dir, cmd.Env = folder, append(os.Environ(), "MAKEFLAGS=", "MAKELEVEL=", "MFLAGS=")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("make eif: %v\n%s", err, out)
		}
		raw, err := os.ReadFile(filepath.Join(folder, "dist/amd64/keyhold.eif"))
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, raw)
	}
	if string(files[0]) != string(files[1]) {
		t.Error("the two images differ")
	}
	m, err := eif.Parse(files[0])
	if err != nil {
		t.Fatal(err)
	}
	measured, err := m.Measure()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d bytes, PCR0 %s", len(files[0]), measured.PCR0)
}

// copyInto copies files and trees of the repository to the same place below folder.
func copyInto(t *testing.T, folder string, names ...string) {
	t.Helper()
	for _, name := range names {
		source, target := filepath.Join(moduleRoot(t), name), filepath.Join(folder, name)
		info, err := os.Stat(source)
		if err != nil {
			t.Fatal(err)
		}
		if info.IsDir() {
			err = os.CopyFS(target, os.DirFS(source))
		} else {
			var raw []byte
			if raw, err = os.ReadFile(source); err == nil {
				err = os.WriteFile(target, raw, 0o600)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}
