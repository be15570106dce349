package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// boot does the work of an init before there is an enclave to speak of.
func (p *program) boot(ctx context.Context, log *slog.Logger) error {
	s := &p.sys
	// The console first, since everything after may have something to say.
	if err := s.attach(mounts[0]); err != nil {
		return err
	}
	if err := s.openConsole(); err != nil {
		return err
	}
	log.InfoContext(ctx, "init started", slog.String("kernel", s.release()))
	for _, m := range mounts[1:] {
		if err := s.attach(m); err != nil {
			return err
		}
	}
	names, err := s.loadModules()
	if err != nil {
		return err
	}
	log.InfoContext(ctx, "kernel modules loaded", slog.Any("modules", names))
	for _, d := range devices {
		if err := p.awaitDevice(ctx, d); err != nil {
			return err
		}
	}
	log.InfoContext(ctx, "devices present")
	if err := s.checkNetwork(); err != nil {
		return err
	}

	// Nothing needs to be changed from here on, so nothing can be.
	set, err := s.closeKernel()
	if err != nil {
		return err
	}
	if err := s.freeze(); err != nil {
		return err
	}
	log.InfoContext(ctx, "kernel closed", slog.Int("settings", set))
	return nil
}

// A mount is one file system of the machine. Nothing in it can be run.
type mount struct {
	source, target, fstype string
	flags                  uintptr
	options                string
}

// mounts begin with the devices, for the console is one.
//
//nolint:gochecknoglobals // a table that is never written
var mounts = []mount{
	{"dev", "dev", "devtmpfs", unix.MS_NOSUID | unix.MS_NOEXEC, ""},
	{"proc", "proc", "proc", unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV, "hidepid=2"},
	{"sysfs", "sys", "sysfs", unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV, ""},
}

// attach mounts m. EBUSY says that the kernel has mounted it already (CONFIG_DEVTMPFS_MOUNT).
func (s *system) attach(m mount) error {
	target := s.path(m.target)
	if err := os.MkdirAll(target, 0o700); err != nil {
		return failed(codeMount, fmt.Errorf("make mount point: %w", err))
	}
	if err := s.mount(m.source, target, m.fstype, m.flags, m.options); err != nil && !errors.Is(err, unix.EBUSY) {
		return failed(codeMount, fmt.Errorf("mount %s: %w", m.fstype, err))
	}
	return nil
}

// freeze makes the file systems read-only but for the devices, whose nodes the kernel keeps.
func (s *system) freeze() error {
	for _, m := range append([]mount{{target: ".", flags: unix.MS_NOSUID | unix.MS_NODEV}}, mounts[1:]...) {
		flags := m.flags | unix.MS_REMOUNT | unix.MS_BIND | unix.MS_RDONLY
		if err := s.mount("", s.path(m.target), "", flags, ""); err != nil {
			return failed(codeMount, fmt.Errorf("make /%s read-only: %w", path.Clean(m.target), err))
		}
	}
	return nil
}

// openConsole puts the console behind standard output, and nothing behind the other two: what the Go runtime
// or C prints when it crashes goes to standard error.
func (s *system) openConsole() error {
	if err := s.redirect(s.path("dev/console"), os.O_WRONLY, 1); err != nil {
		return failed(codeConsole, fmt.Errorf("open the console: %w", err))
	}
	if err := s.redirect(s.path("dev/null"), os.O_RDONLY, 0); err != nil {
		return failed(codeConsole, fmt.Errorf("close standard input: %w", err))
	}
	return s.muteCrashes()
}

// muteCrashes keeps tracebacks from the console: the words of a stack can be parts of a key. GOTRACEBACK=none
// would have to be set before this process starts (debug.SetTraceback never goes below the environment's
// level) and would still print the value of the panic.
func (s *system) muteCrashes() error {
	if err := s.redirect(s.path("dev/null"), os.O_WRONLY, 2); err != nil {
		return failed(codeConsole, fmt.Errorf("close standard error: %w", err))
	}
	return nil
}

// moduleFolder is in the first ramdisk, which PCR1 measures. It is absent where the kernel has all built in.
const moduleFolder = "modules"

// loadModules loads what is in the folder, in order of the names.
func (s *system) loadModules() ([]string, error) {
	entries, err := os.ReadDir(s.path(moduleFolder))
	if errors.Is(err, fs.ErrNotExist) {
		return []string{}, nil
	}
	if err != nil {
		return nil, failed(codeModule, fmt.Errorf("read the folder of modules: %w", err))
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		if path.Ext(e.Name()) != ".ko" || !e.Type().IsRegular() {
			return nil, failed(codeModule, fmt.Errorf("%s is no kernel module", e.Name()))
		}
		if err := s.loadModule(s.path(moduleFolder, e.Name())); err != nil {
			return nil, failed(codeModule, fmt.Errorf("load kernel module %s: %w", e.Name(), err))
		}
		names = append(names, e.Name())
	}
	return names, nil
}

// A device is one that an enclave cannot do without, and the code of its absence.
type device struct {
	path string
	code code
}

//nolint:gochecknoglobals // a table that is never written
var devices = []device{{"dev/vsock", codeNoVsock}, {"dev/nsm", codeNoNSM}}

func (p *program) awaitDevice(ctx context.Context, d device) error {
	err := p.await(ctx, deviceLooks, func() (bool, error) {
		_, err := os.Stat(p.sys.path(d.path))
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		return err == nil, err
	})
	if err != nil {
		return failed(d.code, fmt.Errorf("wait for /%s, is its kernel module in the image? %w", d.path, err))
	}
	return nil
}

// checkNetwork refuses a machine with a network: an enclave has vsock and nothing else. The loopback device is
// part of every kernel; it must be down.
func (s *system) checkNetwork() error {
	entries, err := os.ReadDir(s.path("sys/class/net"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // a kernel without
	}
	if err != nil {
		return failed(codeNetwork, fmt.Errorf("look for network interfaces: %w", err))
	}
	for _, e := range entries {
		if e.Name() != "lo" {
			return failed(codeNetwork, errors.New("there is a network interface"))
		}
		flags, err := os.ReadFile(s.path("sys/class/net", e.Name(), "flags"))
		if err != nil {
			return failed(codeNetwork, fmt.Errorf("look at the loopback interface: %w", err))
		}
		var bits uint
		if _, err := fmt.Sscanf(strings.TrimSpace(string(flags)), "0x%x", &bits); err != nil {
			return failed(codeNetwork, fmt.Errorf("look at the loopback interface: %w", err))
		}
		if bits&unix.IFF_UP != 0 {
			return failed(codeNetwork, errors.New("the loopback interface is up"))
		}
	}
	return nil
}

// A setting is a file of proc or sysfs and what is written to it. A kernel can lack some.
type setting struct{ name, value string }

// settings end with the one that shuts the door on modules, which nothing opens again before the next start.
//
//nolint:gochecknoglobals // a table that is never written
var settings = []setting{
	{"proc/sys/kernel/panic", "-1"},        // a kernel that panics restarts at once, which ends the enclave, and does not hang
	{"proc/sys/kernel/panic_on_oops", "1"}, // a kernel that has lost its way signs nothing
	// A panic, such as the one over an init that crashed, would print registers and make the console show them
	// whatever its level (Linux 5.19 and later can be told not to).
	{"proc/sys/kernel/printk", "4"},
	{"sys/module/printk/parameters/console_no_auto_verbose", "Y"},
	{"proc/sys/kernel/kptr_restrict", "2"},
	{"proc/sys/kernel/dmesg_restrict", "1"},
	{"proc/sys/kernel/perf_event_paranoid", "2"},
	{"proc/sys/kernel/yama/ptrace_scope", "3"},
	{"proc/sys/kernel/unprivileged_bpf_disabled", "1"},
	{"proc/sys/net/core/bpf_jit_harden", "2"},
	{"proc/sys/user/max_user_namespaces", "0"},
	{"proc/sys/fs/suid_dumpable", "0"},
	{"proc/sys/kernel/sysrq", "0"},
	{"proc/sys/kernel/kexec_load_disabled", "1"},
	{"proc/sys/kernel/modules_disabled", "1"},
}

// closeKernel writes the settings and returns how many this kernel has.
func (s *system) closeKernel() (int, error) {
	set := 0
	for _, e := range settings {
		err := s.set(e)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, failed(codeKernel, fmt.Errorf("set /%s: %w", e.name, err))
		}
		set++
	}
	return set, nil
}

func (s *system) set(e setting) (err error) {
	f, err := os.OpenFile(s.path(e.name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	_, err = f.WriteString(e.value)
	return err
}
