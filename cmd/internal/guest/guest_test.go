package guest_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/cmd/internal/guest"
	"github.com/keyhold/keyhold/enclave"
	"github.com/keyhold/keyhold/internal/refusal"
)

// ending is what every init does last, whatever happened before.
var ending = []string{"drain", "sync", "restart"}

func TestAnInitBringsTheMachineUpInThisOrder(t *testing.T) {
	m := newMachine(t)
	if exit := m.run(t); exit != 0 {
		t.Errorf("exit code %d", exit)
	}
	want := []string{
		"clear environment",
		"mount devtmpfs on /dev nosuid,noexec",
		"open dev/console as 1", "open dev/null as 0", "open dev/null as 2",
		"mount proc on /proc nosuid,nodev,noexec hidepid=2",
		"mount sysfs on /sys nosuid,nodev,noexec",
		"load modules/01-first.ko", "load modules/02-vsock.ko", "load modules/10-nsm.ko",
		"mount / remount,bind,ro,nosuid,nodev",
		"mount /proc remount,bind,ro,nosuid,nodev,noexec",
		"mount /sys remount,bind,ro,nosuid,nodev,noexec",
		"open nsm", "listen 5000", "dial 9000", "got 0xb7", "serve",
		"drain", "sync", "restart",
	}
	if diff := cmp.Diff(want, m.calls); diff != "" {
		t.Errorf("asked of the kernel and the parent (-want +got):\n%s", diff)
	}
	var got []string
	for _, line := range m.lines(t) {
		if line["level"] != "INFO" {
			t.Errorf("a line of a good boot: %v", line)
		}
		got = append(got, fmt.Sprint(line["msg"]))
	}
	lines := []string{
		"init started", "kernel modules loaded", "devices present", "kernel closed", "nsm answers", "listening", "heartbeat answered", "serving",
		"enclave ended", "switching off",
	}
	if diff := cmp.Diff(lines, got); diff != "" {
		t.Errorf("the console (-want +got):\n%s", diff)
	}
}

func TestAnInitClosesTheKernel(t *testing.T) {
	m := newMachine(t)
	m.remove(t, "proc/sys/kernel/yama") // a kernel without it
	if exit := m.run(t); exit != 0 {
		t.Errorf("exit code %d:\n%s", exit, m.console.String())
	}
	for name, want := range map[string]string{
		"proc/sys/kernel/modules_disabled": "1", "proc/sys/kernel/kexec_load_disabled": "1", "proc/sys/kernel/kptr_restrict": "2",
		"proc/sys/kernel/dmesg_restrict": "1", "proc/sys/kernel/panic_on_oops": "1", "proc/sys/kernel/panic": "-1",
		"sys/module/printk/parameters/console_no_auto_verbose": "Y",
	} {
		got, err := os.ReadFile(filepath.Join(m.Root, name))
		if err != nil || string(got) != want {
			t.Errorf("%s is %q, %v, want %q", name, got, err, want)
		}
	}
	if _, err := os.Stat(filepath.Join(m.Root, "proc/sys/kernel/yama")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a setting that the kernel lacks was made: %v", err)
	}
	if names := guest.TestingOnlySettings(); names[len(names)-1] != "proc/sys/kernel/modules_disabled" {
		t.Errorf("the last setting is %s: what fails after it would leave the door on modules shut for a retry", names[len(names)-1])
	}
}

// Everything here ends the machine. Nothing of it may end with a running enclave.
func TestADoubtfulMachineIsSwitchedOff(t *testing.T) {
	silent := make(chan struct{})
	t.Cleanup(func() { close(silent) })
	for _, tc := range []struct {
		name   string
		change func(*testing.T, *machine)
		code   string // on the console
		text   string // part of the error
	}{
		{"no devices", refuse("mount devtmpfs on /dev nosuid,noexec", unix.EPERM), "mount", "devtmpfs"},
		{"no console", refuse("open dev/console as 1", unix.ENODEV), "console", "console"},
		{"standard input stays", refuse("open dev/null as 0", unix.ENOENT), "console", "standard input"},
		{"crashes would be printed", refuse("open dev/null as 2", unix.ENOENT), "console", "standard error"},
		{"no proc", refuse("mount proc on /proc nosuid,nodev,noexec hidepid=2", unix.ENODEV), "mount", "proc"},
		{"no sysfs", refuse("mount sysfs on /sys nosuid,nodev,noexec", unix.ENODEV), "mount", "sysfs"},
		{"a module that does not load", refuse("load modules/02-vsock.ko", unix.ENOENT), "kernel_module", "02-vsock.ko"},
		{"a file that is no module", put("modules/11-nsm.ko.xz"), "kernel_module", "11-nsm.ko.xz"},
		{"a folder among the modules", put("modules/11-nsm.ko/x"), "kernel_module", "11-nsm.ko"},
		{"the folder of modules is a file", func(t *testing.T, m *machine) {
			t.Helper()
			m.remove(t, "modules")
			m.write(t, "modules", "")
		}, "kernel_module", "folder"},
		{"no vsock device", drop("dev/vsock"), "no_vsock", "/dev/vsock"},
		{"no NSM device", drop("dev/nsm"), "no_nsm", "/dev/nsm"},
		{"a network card", put("sys/class/net/eth0/flags"), "network_present", "interface"},
		{"the loopback interface is up", func(t *testing.T, m *machine) {
			t.Helper()
			m.write(t, "sys/class/net/lo/flags", "0x9\n")
		}, "network_present", "loopback"},
		{"nobody knows of the loopback interface", func(t *testing.T, m *machine) {
			t.Helper()
			m.write(t, "sys/class/net/lo/flags", "up\n")
		}, "network_present", "loopback"},
		{"a loopback interface without flags", drop("sys/class/net/lo/flags"), "network_present", "loopback"},
		{"the door on modules stays open", func(t *testing.T, m *machine) {
			t.Helper()
			m.remove(t, "proc/sys/kernel/modules_disabled")
			m.write(t, "proc/sys/kernel/modules_disabled/x", "") // a folder cannot be written to
		}, "kernel_open", "modules_disabled"},
		{"the root stays writable", refuse("mount / remount,bind,ro,nosuid,nodev", unix.EBUSY), "mount", "read-only"},
		{"the NSM cannot be opened", refuse("open nsm", unix.EACCES), "no_nsm", "permission"},
		{"the NSM refuses", func(t *testing.T, m *machine) {
			t.Helper()
			m.OpenNSM = func() (nsm.Session, error) {
				return device(t, nsmtest.Options{PCRs: nsmtest.Measurements(image), Faults: nsmtest.Faults{
					Fault: func(string) error { return nsm.ErrInternal },
				}}), nil
			}
		}, "nsm_failed", "InternalError"},
		{"the NSM does not answer", func(t *testing.T, m *machine) {
			t.Helper()
			m.OpenNSM = func() (nsm.Session, error) {
				return device(t, nsmtest.Options{PCRs: nsmtest.Measurements(image), Faults: nsmtest.Faults{
					Fault: func(string) error { <-silent; return nil },
				}}), nil
			}
		}, "nsm_failed", "in time"},
		{"no vsock", refuse("listen 5000", unix.EADDRNOTAVAIL), "vsock", "address"},
		{"nobody listens for a heartbeat", refuse("dial 9000", unix.ECONNRESET), "heartbeat", "reset"},
		{"the heartbeat gets another byte", answer([]byte{0xb8}), "heartbeat", "another byte"},
		{"the heartbeat gets no answer", answer(nil), "heartbeat", "await"},
		{"the heartbeat hangs", func(t *testing.T, m *machine) {
			t.Helper()
			m.Beat = 50 * time.Millisecond
			m.Dial = m.dial(func(byte) []byte { <-silent; return nil })
		}, "heartbeat", "await"},
		{"no roots", func(_ *testing.T, m *machine) { m.roots = nil }, "kms_roots", "roots"},
		{"roots that are none", func(_ *testing.T, m *machine) { m.roots = []byte("marker") }, "kms_roots", "roots"},
		{"weak entropy", serve(func() error { return fmt.Errorf("boot: %w", refusal.EntropyWeak) }), "entropy_weak", "entropy_weak"},
		{"an enclave that fails", serve(func() error { return errors.New("it failed") }), "internal", "it failed"},
		{"an enclave that crashes", serve(func() error { panic("marker") }), "crashed", "crashed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := newMachine(t)
			tc.change(t, m)
			if exit := m.run(t); exit != 1 {
				t.Errorf("exit code %d", exit)
			}
			if slices.Contains(m.calls, "serve") || strings.Contains(m.console.String(), `"serving"`) {
				t.Error("the enclave ran")
			}
			if n := len(m.calls); n < len(ending) || !slices.Equal(m.calls[n-len(ending):], ending) {
				t.Errorf("the machine was not switched off: %q", m.calls)
			}
			ends(t, m, tc.code, tc.text)
		})
	}
}

// ends checks that the console says why, once.
func ends(t *testing.T, m *machine, code, text string) {
	t.Helper()
	var why []map[string]any
	for _, line := range m.lines(t) {
		if line["level"] == "ERROR" {
			why = append(why, line)
		}
	}
	if len(why) != 1 || why[0]["msg"] != "enclave ended" || why[0]["code"] != code || !strings.Contains(fmt.Sprint(why[0]["error"]), text) {
		t.Errorf("the console says %v, want one line with code %q and %q", why, code, text)
	}
	if strings.Contains(m.console.String(), "marker") {
		t.Errorf("the console quotes what came from elsewhere:\n%s", m.console.String())
	}
}

func refuse(call string, err error) func(*testing.T, *machine) {
	return func(_ *testing.T, m *machine) { m.refuse[call] = err }
}

func put(name string) func(*testing.T, *machine) {
	return func(t *testing.T, m *machine) { t.Helper(); m.write(t, name, "0x1002\n") }
}

func drop(name string) func(*testing.T, *machine) {
	return func(t *testing.T, m *machine) { t.Helper(); m.remove(t, name) }
}

func answer(b []byte) func(*testing.T, *machine) {
	return func(_ *testing.T, m *machine) { m.Dial = m.dial(func(byte) []byte { return b }) }
}

func serve(f func() error) func(*testing.T, *machine) {
	return func(_ *testing.T, m *machine) {
		m.Serve = func(_ context.Context, c enclave.Config) error { return errors.Join(c.Listener.Close(), f()) }
	}
}

func TestAMachineWithAllBuiltInNeedsNoModules(t *testing.T) {
	m := newMachine(t)
	m.remove(t, "modules")
	m.refuse["mount devtmpfs on /dev nosuid,noexec"] = unix.EBUSY // this kernel mounts it by itself
	if exit := m.run(t); exit != 0 || !slices.Contains(m.calls, "serve") {
		t.Errorf("exit code %d:\n%s", exit, m.console.String())
	}
}

func TestADeviceMayAppearLate(t *testing.T) {
	m := newMachine(t)
	m.remove(t, "dev/nsm")
	m.LoadModule = func(file string) error {
		if filepath.Base(file) == "10-nsm.ko" {
			m.write(t, "dev/nsm", "")
		}
		return nil
	}
	if exit := m.run(t); exit != 0 {
		t.Errorf("exit code %d:\n%s", exit, m.console.String())
	}
}

func TestAHeartbeatIsTriedAgain(t *testing.T) {
	m := newMachine(t)
	good, tries := m.Dial, 0
	m.Dial = func(ctx context.Context, port uint32) (net.Conn, error) {
		if tries++; tries < 3 {
			return nil, unix.ETIMEDOUT
		}
		return good(ctx, port)
	}
	if exit := m.run(t); exit != 0 || tries != 3 {
		t.Errorf("exit code %d after %d tries", exit, tries)
	}
}

func TestAnEnclaveInDebugModeSaysSo(t *testing.T) {
	for _, debug := range []bool{false, true} {
		m := newMachine(t)
		m.OpenNSM = func() (nsm.Session, error) {
			return device(t, nsmtest.Options{PCRs: nsmtest.Measurements(image), Debug: debug}), nil
		}
		m.run(t)
		lines := m.lines(t)
		i := slices.IndexFunc(lines, func(v map[string]any) bool { return v["msg"] == "nsm answers" })
		if i < 0 || lines[i]["debug_enclave"] != debug {
			t.Errorf("debug %t: the console says\n%s", debug, m.console.String())
		}
	}
}

func TestAMachineThatCannotBeSwitchedOffSaysSo(t *testing.T) {
	m := newMachine(t)
	m.refuse["restart"] = unix.EPERM
	m.run(t)
	if !strings.Contains(m.console.String(), "not switched off") {
		t.Errorf("the console says\n%s", m.console.String())
	}
}

func TestAStoppedInitSwitchesTheMachineOff(t *testing.T) {
	m := newMachine(t)
	ctx, cancel := context.WithCancel(t.Context())
	m.Serve = func(ctx context.Context, c enclave.Config) error {
		cancel()
		<-ctx.Done()
		return c.Listener.Close()
	}
	if exit := guest.TestingOnlyMain(ctx, &m.TestingOnlyMachine, m.roots); exit != 0 {
		t.Errorf("exit code %d", exit)
	}
	if n := len(m.calls); !slices.Equal(m.calls[n-len(ending):], ending) {
		t.Errorf("the machine was not switched off: %q", m.calls)
	}
}

// Under the init of nitro-cli build-enclave, or on a laptop, the program must leave the machine alone.
func TestAProgramThatIsNoInitDoesNoneOfItsWork(t *testing.T) {
	m := newMachine(t)
	m.Init = false
	if exit := m.run(t); exit != 0 {
		t.Errorf("exit code %d", exit)
	}
	want := []string{"clear environment", "open dev/null as 2", "open nsm", "listen 5000", "serve"}
	if diff := cmp.Diff(want, m.calls); diff != "" {
		t.Errorf("asked of the kernel and the parent (-want +got):\n%s", diff)
	}
	for _, name := range guest.TestingOnlySettings() {
		if got, err := os.ReadFile(filepath.Join(m.Root, name)); err != nil || len(got) > 0 {
			t.Errorf("%s was set to %q, %v", name, got, err)
		}
	}
}

// One signal can stand for any number of children.
func TestAllChildrenThatEndedAreReapedAtOnce(t *testing.T) {
	left := 5
	guest.TestingOnlyReap(func() bool {
		left--
		return left >= 0
	})
	if left >= 0 {
		t.Errorf("%d children stay", left+1)
	}
}
