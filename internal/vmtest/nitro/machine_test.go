package nitro_test

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/vmtest/hostvsock"
	"github.com/keyhold/keyhold/internal/wire"
)

const (
	// folderEnv names the folder that scripts/nitro-machine made.
	folderEnv = "KEYHOLD_NITRO"
	guestCID  = 16
	// patience is for one step of an emulated machine on a shared one.
	patience = 2 * time.Minute
)

// machineFolder skips a test that is not to run now.
func machineFolder(t *testing.T) string {
	t.Helper()
	folder := os.Getenv(folderEnv)
	if folder == "" {
		t.Skip("this test boots QEMU's nitro-enclave machine: make vm-test-nitro builds and runs it")
	}
	return folder
}

// console collects what QEMU and the machine print.
type console struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.buf.Write(p)
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.buf.String()
}

// machine is a machine that runs until the test ends.
type machine struct {
	vsock   *hostvsock.Device
	console *console
	ended   chan struct{}
}

// start gives an image file to QEMU. The sockets' folder has a short name: that of
// a socket has 107 bytes at most.
func start(t *testing.T, file []byte) *machine {
	t.Helper()
	folder := machineFolder(t)
	dir, err := os.MkdirTemp("", "keyhold-nitro-") //nolint:usetesting // its names are too long
	if err != nil {
		t.Fatal(err)
	}
	image, socket := filepath.Join(dir, "test.eif"), filepath.Join(dir, "vsock")
	if err := os.WriteFile(image, file, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{vsock: hostvsock.New(guestCID), console: &console{}, ended: make(chan struct{})}
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() {
		conn, err := l.AcceptUnix()
		if err != nil {
			return // QEMU ended before it connected
		}
		if err := m.vsock.Backend().Serve(ctx, conn); err != nil && ctx.Err() == nil {
			t.Errorf("the vsock device: %v", err)
		}
	})
	// Debian's firmware; -L names where it is.
	cmd := exec.CommandContext(ctx, filepath.Join(folder, "qemu-system-x86_64"),
		"-L", "/usr/share/seabios", "-L", "/usr/share/qemu",
		"-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
		"-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", "512",
		"-chardev", "socket,id=vsock,path="+socket,
		"-M", "nitro-enclave,vsock=vsock,id=keyhold,parent-role=arn:aws:iam::000000000000:role/test,parent-id=i-00000000000000000",
		// The vsock device speaks virtio 1; the machine would offer the version before it.
		"-global", "virtio-mmio.force-legacy=false",
		"-kernel", image)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Stdout, cmd.Stderr = m.console, m.console
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	running.Go(func() {
		_ = cmd.Wait() // it is killed at the end, and what it has to say is on the console
		close(m.ended)
		_ = l.Close()
	})
	t.Cleanup(func() {
		stop()
		running.Wait()
		if t.Failed() {
			t.Logf("the console:\n%s", m.console)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return m
}

func encode(t *testing.T, m eif.Image) []byte {
	t.Helper()
	b, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// dial reaches the enclave.
func (m *machine) dial(ctx context.Context) (net.Conn, error) {
	return m.vsock.Dial(ctx, wire.EnclavePort)
}
