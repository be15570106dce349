package guest

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// system is what an init asks of the kernel, so that a test can see it asked, and in which order.
type system struct {
	root       string // stands for /
	clearEnv   func()
	mount      func(source, target, fstype string, flags uintptr, options string) error
	loadModule func(file string) error
	redirect   func(file string, flag, fd int) error // opens file as that descriptor
	drain      func()                                // waits until the console has printed all
	sync       func()
	restart    func() error
	reap       func() (found bool) // waits for one child that has ended, if there is one
}

// linux is the real one.
func linux() system {
	return system{
		root: "/", clearEnv: os.Clearenv, mount: unix.Mount, loadModule: loadModule, redirect: redirect, drain: drain, sync: unix.Sync,
		restart: func() error { return unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) }, reap: reap,
	}
}

func (s *system) path(elements ...string) string {
	return filepath.Join(append([]string{s.root}, elements...)...)
}

// powerOff ends the machine. AWS's init restarts at the end as well: Nitro, like QEMU with -no-reboot, takes
// the restart of an enclave for its end, and a halt would leave it standing.
func (s *system) powerOff() error {
	s.drain()
	s.sync()
	if err := s.restart(); err != nil {
		return fmt.Errorf("restart: %w", err)
	}
	return nil
}

// reapOrphans waits for children, which an init gets from everybody. The enclave starts no process, so whatever
// ends was not its own. The returned function stops that.
func (s *system) reapOrphans() (stop func()) {
	ended := make(chan os.Signal, 1) // one is enough: each makes it look for all
	signal.Notify(ended, unix.SIGCHLD)
	done := make(chan struct{})
	var all sync.WaitGroup
	all.Go(func() {
		for {
			for s.reap() {
			}
			select {
			case <-ended:
			case <-done:
				return
			}
		}
	})
	return func() {
		signal.Stop(ended)
		close(done)
		all.Wait()
	}
}

// release names the kernel.
func (s *system) release() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

func loadModule(file string) (err error) {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) { // EEXIST: built in
		return err
	}
	return nil
}

func redirect(file string, flag, fd int) (err error) {
	// O_NOCTTY: nobody shall interrupt an init by a key.
	from, err := unix.Open(file, flag|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Close(from)) }()
	return unix.Dup3(from, fd, 0)
}

// drain waits for a serial line. What is no terminal refuses, and has nothing to wait for.
func drain() { _ = unix.IoctlSetInt(1, unix.TCSBRK, 1) }

func reap() bool {
	pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
	return err == nil && pid > 0
}
