package image_test

import (
	"bytes"
	"compress/gzip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/image"
	"github.com/keyhold/keyhold/internal/image/imagetest"
)

// stubs stand in for the programs that scripts/kernel calls: the archive has one
// package, the tree in $FIXTURE, which is not compressed.
var stubs = map[string]string{
	"apt-cache": `[ "$2" = linux-image-6.12-cloud-amd64 ] && [ -d "$FIXTURE" ] && printf '%s\n  Depends: linux-image-6.12.0-test-cloud-amd64\n' "$2"`,
	"apt-get":   `case " $* " in *" download "*) echo package >linux-image-test.deb ;; esac`,
	"dpkg-deb":  `case $1 in -x) mkdir -p "$3" && cp -r "$FIXTURE"/. "$3" ;; -f) echo "the $3" ;; esac`,
	"xz":        `shift 2; cat "$@"`,
}

const kernelRelease = "6.12.0-test-cloud-amd64"

// fixture is what Debian's package has in it; module files are named below the
// modules' folder.
func fixture(t *testing.T, builtIn string, modules map[string][]byte) string {
	t.Helper()
	folder := t.TempDir()
	write(t, folder, "boot/vmlinuz-"+kernelRelease, imagetest.Kernel(eif.AMD64, kernelRelease))
	write(t, folder, "lib/modules/"+kernelRelease+"/modules.builtin", []byte(builtIn))
	for name, data := range modules {
		write(t, folder, "lib/modules/"+kernelRelease+"/kernel/"+name, data)
	}
	return folder
}

// runKernelScript returns what the script wrote to stderr.
func runKernelScript(t *testing.T, fixture, out string) (string, error) {
	t.Helper()
	bin := t.TempDir()
	for name, body := range stubs {
		if err := os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "bash", filepath.Join("..", "..", "scripts", "kernel"), out)
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "FIXTURE="+fixture)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err := cmd.Run()
	return stderr.String(), err
}

func ko(name string, needs ...string) []byte {
	return imagetest.Module(eif.AMD64, name, kernelRelease, needs...)
}

// debian is laid out like Debian's kernel: some modules depend on others, some are
// compressed, and what is called - in a file's name is _ to the kernel.
func debian() map[string][]byte {
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	_, _ = w.Write(ko("vmw_vsock_virtio_transport", "vmw_vsock_virtio_transport_common", "vsock")) // to a buffer
	_ = w.Close()
	return map[string][]byte{
		"drivers/misc/nsm.ko.xz":                             ko("nsm", "rng-core"),
		"drivers/char/hw_random/rng-core.ko":                 ko("rng_core"),
		"net/vmw_vsock/vsock.ko":                             ko("vsock"),
		"net/vmw_vsock/vmw_vsock_virtio_transport.ko.gz":     packed.Bytes(),
		"net/vmw_vsock/vmw_vsock_virtio_transport_common.ko": ko("vmw_vsock_virtio_transport_common", "vsock"),
		"net/vmw_vsock/vsock_loopback.ko":                    ko("vsock_loopback", "vsock"),
		"drivers/net/virtio_net.ko":                          ko("virtio_net"),
		"drivers/virtio/virtio_mmio.ko":                      ko("virtio_mmio"),
	}
}

func TestTheKernelScriptOrdersModulesByWhatTheyNeed(t *testing.T) {
	out := filepath.Join(t.TempDir(), "amd64")
	if text, err := runKernelScript(t, fixture(t, "kernel/drivers/virtio/virtio_pci.ko\n", debian()), out); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	kernel, modules, err := image.ReadKernel(out, eif.AMD64)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range modules {
		names = append(names, m.Name)
	}
	want := []string{
		"01-virtio_mmio.ko", "02-vsock.ko", "03-vmw_vsock_virtio_transport_common.ko", "04-vmw_vsock_virtio_transport.ko",
		"05-rng_core.ko", "06-nsm.ko",
	}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if kernel.Source.Package != "the Package" || kernel.Source.Version != "the Version" || len(kernel.Source.PackageSHA256) != 64 {
		t.Errorf("the source is %+v", kernel.Source)
	}
	p := parts()
	p.Kernel, p.Modules = kernel, modules
	build(t, p)
}

func TestTheKernelScriptLeavesWhatIsBuiltIn(t *testing.T) {
	out := filepath.Join(t.TempDir(), "amd64")
	all := debian()
	delete(all, "drivers/char/hw_random/rng-core.ko")
	delete(all, "net/vmw_vsock/vsock.ko")
	if text, err := runKernelScript(t, fixture(t, "kernel/drivers/char/hw_random/rng-core.ko\nkernel/net/vmw_vsock/vsock.ko\n", all), out); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	entries, err := os.ReadDir(filepath.Join(out, "modules"))
	if err != nil {
		t.Fatal(err)
	}
	if last := entries[len(entries)-1].Name(); len(entries) != 4 || last != "04-nsm.ko" {
		t.Errorf("%d modules, the last is %s", len(entries), last)
	}
}

func TestTheKernelScriptSaysWhatIsMissing(t *testing.T) {
	for _, tc := range []struct {
		name    string
		fixture func(t *testing.T) string
		want    string
	}{
		{"no such package", func(*testing.T) string { return "nowhere" }, "linux-image-6.12-cloud-amd64"},
		{"no nsm", func(t *testing.T) string {
			t.Helper()
			all := debian()
			delete(all, "drivers/misc/nsm.ko.xz")
			return fixture(t, "", all)
		}, "the kernel " + kernelRelease + " has no module nsm: an enclave cannot work with it"},
		{"a module that another needs", func(t *testing.T) string {
			t.Helper()
			all := debian()
			delete(all, "net/vmw_vsock/vsock.ko")
			return fixture(t, "", all)
		}, "has no module vsock, which vmw_vsock_virtio_transport"},
		{"a compression that is not known", func(t *testing.T) string {
			t.Helper()
			all := debian()
			all["net/vmw_vsock/vsock.ko.br"] = all["net/vmw_vsock/vsock.ko"]
			delete(all, "net/vmw_vsock/vsock.ko")
			return fixture(t, "", all)
		}, "vsock.ko.br: the compression is unknown"},
		{"no kernel", func(t *testing.T) string {
			t.Helper()
			f := fixture(t, "", debian())
			if err := os.RemoveAll(filepath.Join(f, "boot")); err != nil {
				t.Fatal(err)
			}
			return f
		}, "has no kernel in /boot"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			out := filepath.Join(t.TempDir(), "amd64")
			write(t, out, "bzImage", []byte("the one before"))
			text, err := runKernelScript(t, tc.fixture(t), out)
			if err == nil || !strings.Contains(text, tc.want) {
				t.Errorf("%v, %q, want %q", err, text, tc.want)
			}
			if b, err := os.ReadFile(filepath.Join(out, "bzImage")); err != nil || string(b) != "the one before" {
				t.Errorf("the folder that was there is gone: %q, %v", b, err)
			}
		})
	}
}
