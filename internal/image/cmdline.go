package image

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// Reasons to refuse a command line.
var (
	ErrCmdlineForm    = errors.New("the command line is empty, longer than 2047 bytes, or has a byte that is not printable ASCII or a quotation mark")
	ErrCmdlineDanger  = errors.New("the command line would open the enclave")
	ErrCmdlineUnknown = errors.New("the command line has a parameter that is not among those of docs/image.md")
)

const maxCmdline = 2047 // Linux on x86 cuts it there

// dangers are parameters for which the reason to refuse is worth naming. Whatever
// else is not known is refused as well.
//
//nolint:gochecknoglobals // never written
var dangers = map[string]string{
	"init": "another program than /init would run", "rdinit": "another program than /init would run",
	"single": "a shell", "emergency": "a shell", "rescue": "a shell", "S": "a shell", "s": "a shell", "1": "a shell",
	"break": "a shell", "debug": "a verbose kernel", "initcall_debug": "a verbose kernel", "ignore_loglevel": "a verbose kernel",
	"kgdboc": "a kernel debugger", "kgdbwait": "a kernel debugger", "kgdbdbgp": "a kernel debugger", "ekgdboc": "a kernel debugger",
	"sysrq_always_enabled": "commands from the console", "earlyprintk": "a verbose kernel",
	"netconsole": "a network", "ip": "a network", "nfsroot": "a network",
	"nokaslr": "a kernel without its defences", "nosmap": "a kernel without its defences", "nosmep": "a kernel without its defences",
	"nopti": "a kernel without its defences", "iomem": "a kernel without its defences", "norandmaps": "a kernel without its defences",
	"mitigations": "a kernel without its defences", "panic": "a kernel that hangs instead of ending",
	"--": "arguments for the init", "module_blacklist": "a module would be missing", "modprobe.blacklist": "a module would be missing",
}

// allowed are the parameters that an image may have: those of AWS's command lines,
// of firmware in the way of QEMU, and some that harden. The values are anchored.
//
//nolint:gochecknoglobals // never written
var allowed = compile(
	"quiet", "nomodules", "ro", "no_timer_check", "nomodeset", "slab_nomerge", "keep_bootcon",
	"i8042.noaux", "i8042.nomux", "i8042.nopnp", "i8042.dumbkbd",
	"reboot=[a-z]", "panic=(-1|[1-9][0-9]{0,2})", "oops=panic", "loglevel=[0-7]",
	"console=(ttyS[0-3]|ttyAMA0|hvc0)(,[0-9a-z]+)?", "8250.nr_uarts=[0-9]{1,2}",
	"root=/dev/ram0", "pci=[a-z]+", "acpi=off", "nr_cpus=[0-9]{1,3}",
	"random.trust_(cpu|bootloader)=(on|off)",
	"tsc=(reliable|unstable)", "clocksource=[-_a-z]+", "lpj=[0-9]+",
	"virtio_mmio.device=[0-9]+@0x[0-9a-f]+:[0-9]+",
	"init_on_(alloc|free)=1", "page_alloc.shuffle=1", "vsyscall=none", "mitigations=auto(,nosmt)?",
	"lockdown=(integrity|confidentiality)", "module.sig_enforce=1", "randomize_kstack_offset=(on|1)",
)

func compile(patterns ...string) *regexp.Regexp {
	for i, p := range patterns {
		name, value, _ := strings.Cut(p, "=")
		quoted := strings.ReplaceAll(name, ".", `\.`)
		if value != "" {
			quoted += "=(?:" + value + ")"
		}
		patterns[i] = quoted
	}
	return regexp.MustCompile("^(?:" + strings.Join(patterns, "|") + ")$")
}

// CheckCmdline refuses a command line that has anything but known parameters: the
// kernel hands every word that it does not know to the init, and there are some
// that start another one.
func CheckCmdline(s string) error {
	if s == "" || len(s) > maxCmdline || strings.ContainsFunc(s, func(c rune) bool { return c < ' ' || c > '~' || c == '"' || c == '\'' }) {
		return ErrCmdlineForm
	}
	words := strings.Fields(s)
	if len(words) == 0 {
		return ErrCmdlineForm
	}
	for _, w := range words {
		if allowed.MatchString(w) {
			continue
		}
		name, _, _ := strings.Cut(w, "=")
		if why, known := dangers[name]; known {
			return fmt.Errorf("%w: %q, %s", ErrCmdlineDanger, w, why)
		}
		return fmt.Errorf("%w: %q", ErrCmdlineUnknown, w)
	}
	return nil
}
