// Package qemu runs a virtual machine whose devices are served by this process.
// It emulates every instruction (no KVM), and never leaves a machine running.
package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"

	"github.com/keyhold/keyhold/internal/vmtest/vhostuser"
)

// Binary is the program that is run. On Debian it is in qemu-system-x86.
const Binary = "qemu-system-x86_64"

// Config of a machine: one CPU, a serial console, and the devices.
type Config struct {
	Kernel    []byte
	Initrd    []byte
	Cmdline   string
	MemoryMiB int
	Devices   []Device
}

// Device of a machine.
type Device struct {
	Name    string // QEMU's, with properties
	Backend *vhostuser.Backend
}

// VM is a machine that was started.
type VM struct {
	console console
	cancel  context.CancelFunc // ends the devices
	done    chan struct{}

	mu      sync.Mutex
	process *os.Process // nil until it runs
	killed  bool
	err     error // why it ended, before done is closed
}

// Start starts a machine. Kill ends it, and so does the end of this process.
func Start(c Config) (_ *VM, err error) {
	binary, err := exec.LookPath(Binary)
	if err != nil {
		return nil, fmt.Errorf("%s is missing (Debian: apt-get install --no-install-recommends qemu-system-x86): %w", Binary, err)
	}
	dir, err := os.MkdirTemp("", "keyhold-vm-") // not t.TempDir: the names of sockets have 107 bytes at most
	if err != nil {
		return nil, fmt.Errorf("make a folder for the machine: %w", err)
	}
	for name, data := range map[string][]byte{"kernel": c.Kernel, "initrd": c.Initrd} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return nil, errors.Join(fmt.Errorf("write %s: %w", name, err), os.RemoveAll(dir))
		}
	}
	vm := &VM{done: make(chan struct{})}
	vm.console.changed.L = &vm.console.mu
	ctx, cancel := context.WithCancel(context.Background())
	vm.cancel = cancel
	devices, err := vm.serve(ctx, dir, c.Devices)
	if err == nil {
		err = vm.start(binary, c.arguments(dir), dir, devices)
	}
	if err != nil {
		cancel()
		return nil, errors.Join(err, devices.wait(), os.RemoveAll(dir))
	}
	return vm, nil
}

func socket(dir string, i int) string { return filepath.Join(dir, strconv.Itoa(i)+".sock") }

// arguments of QEMU. The guest's memory is a file that the devices map.
func (c *Config) arguments(dir string) []string {
	memory := fmt.Sprintf("memory-backend-memfd,id=memory,size=%dM,share=on", c.MemoryMiB)
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
		"-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", strconv.Itoa(c.MemoryMiB),
		"-object", memory, "-M", "pc,memory-backend=memory",
		"-kernel", filepath.Join(dir, "kernel"), "-initrd", filepath.Join(dir, "initrd"), "-append", c.Cmdline,
	}
	for i, d := range c.Devices {
		id := "device" + strconv.Itoa(i)
		args = append(args, "-chardev", "socket,id="+id+",path="+socket(dir, i), "-device", d.Name+",chardev="+id)
	}
	return args
}

// devices that are served.
type devices struct {
	listeners []*net.UnixListener
	all       sync.WaitGroup
}

// wait ends the listeners and waits for what is served.
func (d *devices) wait() error {
	var errs []error
	for _, l := range d.listeners {
		errs = append(errs, ignoreClosed(l.Close()))
	}
	d.all.Wait()
	return errors.Join(errs...)
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// serve listens for QEMU, which connects once for each device.
func (vm *VM) serve(ctx context.Context, dir string, list []Device) (*devices, error) {
	d := &devices{}
	for i := range list {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket(dir, i), Net: "unix"})
		if err != nil {
			return d, fmt.Errorf("listen for device %d: %w", i, err)
		}
		d.listeners = append(d.listeners, l)
	}
	for i, l := range d.listeners {
		d.all.Go(func() {
			conn, err := l.AcceptUnix()
			if err != nil {
				return // QEMU ended before it connected, which says why
			}
			if err := list[i].Backend.Serve(ctx, conn); err != nil && ctx.Err() == nil {
				vm.end(fmt.Errorf("device %s: %w", list[i].Name, err))
			}
		})
	}
	return d, nil
}

// start starts QEMU and what follows its end.
func (vm *VM) start(binary string, args []string, dir string, devices *devices) error {
	cmd := exec.Command(binary, args...) //nolint:gosec,noctx // QEMU; Kill ends it
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Stdout, cmd.Stderr = &vm.console, &vm.console
	started := make(chan error, 1)
	go func() {
		// Pdeathsig comes when the thread that started the child ends, so that
		// thread waits for it.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		err = cmd.Wait()
		vm.cancel()
		vm.finish(errors.Join(err, devices.wait(), os.RemoveAll(dir)))
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start %s: %w", Binary, err)
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.process = cmd.Process
	if vm.err != nil { // a device failed meanwhile
		vm.signal()
	}
	return nil
}

// finish notes why the machine ended.
func (vm *VM) finish(err error) {
	vm.mu.Lock()
	if vm.err == nil && !vm.killed { // who is killed ends with an error
		vm.err = err
	}
	vm.mu.Unlock()
	close(vm.done)
	vm.console.end()
}

// end kills the machine for a reason.
func (vm *VM) end(err error) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.err == nil {
		vm.err = err
	}
	vm.signal()
}

// signal kills QEMU, which starts no processes of its own.
func (vm *VM) signal() {
	if vm.process != nil {
		_ = vm.process.Kill() // it may have ended already, and the number is not reused for this
	}
}

// Kill ends the machine as losing power does, and returns once it and its
// devices have ended. What went wrong with them before is its error.
func (vm *VM) Kill() error {
	vm.mu.Lock()
	vm.killed = true
	vm.signal()
	vm.mu.Unlock()
	<-vm.done
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.err
}

// Wait waits until the machine has switched itself off.
func (vm *VM) Wait(ctx context.Context) error {
	select {
	case <-vm.done:
	case <-ctx.Done():
		return vm.console.wrap(fmt.Errorf("wait for the machine to switch off: %w", ctx.Err()))
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.err != nil {
		return vm.console.wrap(fmt.Errorf("the machine did not switch off: %w", vm.err))
	}
	return nil
}

// Await waits for a line of the console that has all these parts, and returns it.
func (vm *VM) Await(ctx context.Context, parts ...string) (string, error) {
	line, err := vm.console.await(ctx, parts)
	if err != nil {
		vm.mu.Lock()
		defer vm.mu.Unlock()
		return "", vm.console.wrap(errors.Join(err, vm.err))
	}
	return line, nil
}

// Console returns what the machine has printed.
func (vm *VM) Console() string { return vm.console.text() }
