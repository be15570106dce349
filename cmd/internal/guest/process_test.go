package guest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyhold/keyhold/cmd/internal/guest"
	"github.com/keyhold/keyhold/enclave"
)

// The tests here start this test program again, as a process whose end can be looked at: in a namespace of its
// own it is process 1 there, and the kernel treats it as an init.
const (
	roleEnv  = "KEYHOLD_GUEST_ROLE" // what the process does; empty in a test
	rootEnv  = "KEYHOLD_GUEST_ROOT" // the folder that stands for /
	spaceEnv = "KEYHOLD_GUEST_SPACE"
)

// secretValue stands for what a crash must not print. The process makes it anew, so that it is not in its
// arguments.
func secretValue() string { return strings.Repeat("5ec7e7", 4) }

//nolint:gochecknoglobals // a table that is never written
var roles = map[string]func(context.Context, enclave.Config) error{
	"ends": func(_ context.Context, c enclave.Config) error { return c.Listener.Close() },
	"shows its environment": func(ctx context.Context, c enclave.Config) error {
		c.Logger.InfoContext(ctx, "serving", slog.Any("environment", os.Environ()))
		return c.Listener.Close()
	},
	"waits for SIGTERM": func(ctx context.Context, c enclave.Config) error {
		c.Logger.InfoContext(ctx, "serving")
		<-ctx.Done()
		return c.Listener.Close()
	},
	"has orphans": func(ctx context.Context, c enclave.Config) error { return errors.Join(adopt(ctx), c.Listener.Close()) },
	"panics":      func(context.Context, enclave.Config) error { panic(secretValue()) },
	"panics beside": func(ctx context.Context, _ enclave.Config) error {
		go onTheStack([4]uint64{0x5ec7e75ec7e7, 2, 3, 4})
		<-ctx.Done()
		return nil
	},
	"stops for good": func(context.Context, enclave.Config) error { new(sync.Mutex).Unlock(); return nil }, // no panic: nothing recovers it
	"segfaults": func(ctx context.Context, _ enclave.Config) error {
		err := unix.Kill(os.Getpid(), unix.SIGSEGV) // as C would
		<-ctx.Done()                                // another thread may get it
		return err
	},
}

//go:noinline
func onTheStack(key [4]uint64) { panic(fmt.Sprint(secretValue(), key[0])) }

func TestMain(m *testing.M) {
	switch role := os.Getenv(roleEnv); role {
	case "":
		m.Run()
	case "orphan": // ends when its standard input does
		_, _ = io.Copy(io.Discard, os.Stdin) // an error is an end as well
	case "parent of an orphan":
		orphan := exec.Command(os.Args[0]) //nolint:noctx // it shall outlive this process
		orphan.Env, orphan.Stdin = []string{roleEnv + "=orphan"}, os.Stdin
		if err := orphan.Start(); err == nil {
			fmt.Fprintln(os.Stdout, orphan.Process.Pid)
		}
	case "main", "main without roots":
		if os.Getpid() == 1 {
			return // it would change the settings of this machine's kernel
		}
		roots, err := os.ReadFile(filepath.Join(os.Getenv(rootEnv), role+".pem"))
		if err != nil {
			roots = nil
		}
		guest.Main(roots)
	default:
		play(role)
	}
}

// On a machine without /dev/nsm, as most are, the real main function gets that far.
func TestMainSaysWhyItEnds(t *testing.T) {
	if _, err := os.Stat("/dev/nsm"); err == nil {
		t.Skip("this is an enclave")
	}
	for role, code := range map[string]string{"main": "no_nsm", "main without roots": "kms_roots"} {
		cmd, root, stdout, stderr := prepare(t, role, false)
		if role == "main" {
			m, err := bareMachine(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			if err := write(filepath.Join(root, role+".pem"), string(m.roots)); err != nil {
				t.Fatal(err)
			}
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if status := ended(t, cmd); status.ExitStatus() != 1 {
			t.Errorf("%s: %v", role, cmd.ProcessState)
		}
		if got := stdout.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, `"code":"`+code+`"`) || stderr.Len() > 0 {
			t.Errorf("%s printed\n%s%s, want one line with %s", role, got, stderr, code)
		}
	}
}

func TestTheEnvironmentIsGone(t *testing.T) {
	for _, init := range []bool{false, true} {
		cmd, root, stdout, _ := start(t, "shows its environment", init)
		ended(t, cmd)
		if shown := stdout.String() + console(t, root); !strings.Contains(shown, `"environment":[]`) {
			t.Errorf("init %t: it printed\n%s", init, shown)
		}
	}
}

// play is Main in a folder, but for what the test has no machine for.
func play(role string) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	// A restart is real here, and restarts what the kernel takes for this process's machine.
	space, err := os.Readlink("/proc/self/ns/pid")
	first := os.Getpid() == 1 && err == nil && space != os.Getenv(spaceEnv)
	m, err := bareMachine(os.Getenv(rootEnv))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	m.Init, m.Console, m.Serve, m.Redirect, m.ClearEnv = first, os.Stdout, roles[role], nil, nil
	if first {
		m.Drain, m.Sync, m.Restart = nil, nil, nil
	}
	os.Exit(guest.TestingOnlyMain(ctx, &m.TestingOnlyMachine, m.roots)) //nolint:forbidigo,revive // the exit code is looked at
}

// start starts the test program in a role, and as process 1 of a namespace of its own if init is set.
func start(t *testing.T, role string, init bool) (cmd *exec.Cmd, root string, stdout, stderr *bytes.Buffer) {
	t.Helper()
	cmd, root, stdout, stderr = prepare(t, role, init)
	err := cmd.Start()
	if init && errors.Is(err, unix.EPERM) {
		t.Skip("this machine permits no process namespace (root or user namespaces are needed): an init cannot be run here")
	}
	if err != nil {
		t.Fatal(err)
	}
	return cmd, root, stdout, stderr
}

func prepare(t *testing.T, role string, init bool) (cmd *exec.Cmd, root string, stdout, stderr *bytes.Buffer) {
	t.Helper()
	root = t.TempDir()
	for _, name := range []string{"dev/console", "dev/null"} {
		put(name)(t, &machine{TestingOnlyMachine: guest.TestingOnlyMachine{Root: root}})
		if err := os.Truncate(filepath.Join(root, name), 0); err != nil {
			t.Fatal(err)
		}
	}
	space, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		t.Skipf("the namespace of this process is not to be seen, and nothing that restarts is run without: %v", err)
	}
	cmd = exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = []string{roleEnv + "=" + role, rootEnv + "=" + root, spaceEnv + "=" + space}
	stdout, stderr = new(bytes.Buffer), new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	if init {
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
		if os.Getuid() != 0 {
			cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
			cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		}
	}
	return cmd, root, stdout, stderr
}

// console is what an init has printed.
func console(t *testing.T, root string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, "dev/console"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// ended waits for a process and tells how it ended.
func ended(t *testing.T, cmd *exec.Cmd) syscall.WaitStatus {
	t.Helper()
	err := cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !ok {
		t.Fatal("no wait status")
	}
	return status
}

// The kernel ends the first process of a namespace that restarts its machine with SIGHUP (reboot(2)).
func TestARealInitRestartsItsMachineAtTheEnd(t *testing.T) {
	for _, tc := range []struct{ role, last string }{
		{"ends", `"enclave ended"}`},
		{"panics", `"code":"crashed"`},
		{"waits for SIGTERM", `"enclave ended"}`},
	} {
		t.Run(tc.role, func(t *testing.T) {
			cmd, root, _, stderr := start(t, tc.role, true)
			if tc.role == "waits for SIGTERM" {
				waitFor(t, func() bool { return strings.Contains(console(t, root), `"serving"`) })
				if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
					t.Fatal(err)
				}
			}
			if status := ended(t, cmd); !status.Signaled() || status.Signal() != syscall.SIGHUP {
				t.Errorf("it ended with %v, so it did not restart: %s%s", cmd.ProcessState, console(t, root), stderr)
			}
			if got := console(t, root); !strings.Contains(got, tc.last) || !strings.Contains(got, "switching off") || strings.Contains(got, secretValue()) {
				t.Errorf("the console says\n%s", got)
			}
		})
	}
}

func TestARealInitReapsOrphans(t *testing.T) {
	cmd, root, _, stderr := start(t, "has orphans", true)
	ended(t, cmd)
	if got := console(t, root); strings.Contains(got, "ERROR") || !strings.Contains(got, "enclave ended") {
		t.Errorf("the console says\n%s%s", got, stderr)
	}
}

// adopt makes an orphan of this init and sees that nothing of it stays behind when it ends.
func adopt(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	gate, hold, err := os.Pipe()
	if err != nil {
		return err
	}
	defer gate.Close()
	out, number, err := os.Pipe()
	if err != nil {
		return err
	}
	defer out.Close()
	parent, err := os.StartProcess(os.Args[0], os.Args[:1], &os.ProcAttr{
		Env: []string{roleEnv + "=parent of an orphan"}, Files: []*os.File{gate, number, number},
	})
	if err != nil {
		return fmt.Errorf("start a process: %w", err)
	}
	number.Close()
	said, err := io.ReadAll(io.LimitReader(out, 64)) // to the end of the parent
	if err != nil {
		return err
	}
	var orphan int
	if _, err := fmt.Sscan(string(said), &orphan); err != nil {
		return fmt.Errorf("no orphan: %w", err)
	}
	if err := gone(ctx, parent.Pid); err != nil {
		return fmt.Errorf("a child that ended stayed: %w", err)
	}
	if err := unix.Kill(orphan, 0); err != nil {
		return fmt.Errorf("the orphan ended by itself: %w", err)
	}
	hold.Close()
	if err := gone(ctx, orphan); err != nil {
		return fmt.Errorf("an orphan that ended stayed: %w", err)
	}
	return nil
}

// gone waits until there is no such process, not even a dead one that nobody waited for.
func gone(ctx context.Context, pid int) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for unix.Kill(pid, 0) == nil {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func waitFor(t *testing.T, look func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !look() {
		select {
		case <-tick.C:
		case <-time.After(20 * time.Second):
			t.Fatal("it did not happen")
		}
	}
}

// A traceback has words of stacks in it, and the value of a panic is anything.
func TestACrashPrintsNothing(t *testing.T) {
	for _, role := range []string{"panics", "panics beside", "stops for good", "segfaults"} {
		for _, init := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, init %t", role, init), func(t *testing.T) {
				cmd, root, stdout, stderr := start(t, role, init)
				status := ended(t, cmd)
				if status.Exited() && status.ExitStatus() == 0 {
					t.Error("it did not crash")
				}
				shown := stdout.String() + stderr.String() + console(t, root)
				for _, trace := range []string{secretValue(), "5ec7e7", "goroutine", "panic", "runtime.", "0x"} {
					if strings.Contains(shown, trace) {
						t.Errorf("it printed %q:\n%s", trace, shown)
					}
				}
				if !strings.Contains(shown, `"listening"`) {
					t.Errorf("it crashed too early:\n%s", shown)
				}
				if role == "panics" {
					return // in the first goroutine, which survives to say so
				}
				// What is hidden there is what would have been shown.
				hidden, err := os.ReadFile(filepath.Join(root, "dev/null"))
				if err != nil || !bytes.Contains(hidden, []byte("goroutine")) {
					t.Errorf("nothing was hidden, so the search proves nothing: %v\n%s", err, hidden)
				}
			})
		}
	}
}
