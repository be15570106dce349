package qemu_test

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhold/keyhold/internal/vmtest/hostvsock"
	"github.com/keyhold/keyhold/internal/vmtest/qemu"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// standIn puts a shell script in QEMU's place and its files under a folder that
// the test sees.
func standIn(t *testing.T, script string) (folder string) {
	t.Helper()
	bin, folder := t.TempDir(), t.TempDir()
	path := filepath.Join(bin, qemu.Binary)
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+string(os.PathListSeparator)+os.Getenv("PATH"))
	t.Setenv("TMPDIR", folder)
	return folder
}

func start(t *testing.T, devices ...qemu.Device) *qemu.VM {
	t.Helper()
	vm, err := qemu.Start(qemu.Config{Kernel: []byte("kernel"), Initrd: []byte("initrd"), Cmdline: "quiet", MemoryMiB: 64, Devices: devices})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = vm.Kill() })
	return vm
}

func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func empty(t *testing.T, folder string) {
	t.Helper()
	left, err := os.ReadDir(folder)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestAMachineThatSwitchesItselfOffLeavesNothing(t *testing.T) {
	folder := standIn(t, `printf 'one\r\ntwo three\r\n'`)
	vm := start(t)
	if line, err := vm.Await(soon(t), "two", "three"); err != nil || line != "two three" {
		t.Errorf("awaited %q, %v", line, err)
	}
	if err := vm.Wait(soon(t)); err != nil {
		t.Error(err)
	}
	if got := vm.Console(); got != "one\ntwo three\n" {
		t.Errorf("the console says %q", got)
	}
	if err := vm.Kill(); err != nil {
		t.Errorf("killing one that has ended: %v", err)
	}
	empty(t, folder)
}

func TestAKilledMachineIsGone(t *testing.T) {
	folder := standIn(t, "echo $$\nexec sleep 1000")
	vm := start(t)
	pid, err := vm.Await(soon(t), "")
	if err != nil {
		t.Fatal(err)
	}
	if err := vm.Kill(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat("/proc/" + pid); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("process %s: %v", pid, err)
	}
	empty(t, folder)
}

func TestALineThatDoesNotComeIsAnErrorWithTheConsole(t *testing.T) {
	standIn(t, "echo kernel panic\nexec sleep 1000")
	vm := start(t)
	if _, err := vm.Await(soon(t), "kernel panic"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := vm.Await(ctx, "serving")
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "kernel panic") {
		t.Errorf("await: %v", err)
	}
	if err := vm.Wait(ctx); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "kernel panic") {
		t.Errorf("wait: %v", err)
	}
}

func TestAMachineThatFailsIsAnErrorWithTheConsole(t *testing.T) {
	standIn(t, "echo could not load kernel >&2\nexit 3")
	vm := start(t)
	if _, err := vm.Await(soon(t), "serving"); !errors.Is(err, qemu.ErrSilent) {
		t.Errorf("await: %v", err)
	}
	var exit *exec.ExitError
	if err := vm.Wait(soon(t)); !errors.As(err, &exit) || exit.ExitCode() != 3 || !strings.Contains(err.Error(), "could not load kernel") {
		t.Errorf("wait: %v", err)
	}
}

func TestHalfALineIsNotALine(t *testing.T) {
	standIn(t, "printf 'serv'\nexec sleep 1000")
	vm := start(t)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if line, err := vm.Await(ctx, "serv"); err == nil {
		t.Errorf("got %q", line)
	}
}

func TestADeviceThatFailsEndsTheMachine(t *testing.T) {
	folder := standIn(t, "exec sleep 1000")
	device := hostvsock.New(16)
	vm := start(t, qemu.Device{Name: "a-device", Backend: device.Backend()})
	socket, err := filepath.Glob(filepath.Join(folder, "*", "0.sock"))
	if err != nil || len(socket) != 1 {
		t.Fatalf("sockets: %v, %v", socket, err)
	}
	c, err := (&net.Dialer{}).DialContext(t.Context(), "unix", socket[0])
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write(make([]byte, 12)); err != nil { // of no version
		t.Fatal(err)
	}
	if err := vm.Wait(soon(t)); err == nil || !strings.Contains(err.Error(), "device a-device") {
		t.Errorf("wait: %v", err)
	}
	empty(t, folder)
}

func TestAMissingProgramIsNamedWithItsPackage(t *testing.T) {
	folder := t.TempDir()
	t.Setenv("PATH", t.TempDir())
	t.Setenv("TMPDIR", folder)
	_, err := qemu.Start(qemu.Config{})
	if !errors.Is(err, exec.ErrNotFound) || !strings.Contains(err.Error(), "apt-get install") {
		t.Errorf("got: %v", err)
	}
	empty(t, folder)
}
