// Command bootstrap stands in for the init that nitro-cli puts into an image: it
// mounts, loads the modules, beats, and starts the enclave's program in a root of
// its own, as another process than the first. It is for tests, and refuses to go
// on where a step fails.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	root      = "/rootfs" // becomes / of the program
	program   = "/keyhold-enclave"
	modules   = "/modules/*.ko"
	parentCID = 3
	beatPort  = 9000
	beat      = 0xb7
)

func main() {
	if err := run(); err != nil {
		say("failed: " + err.Error())
	}
	say("restarts")
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) // there is nobody to tell
}

func say(text string) {
	if console, err := os.OpenFile("/dev/console", os.O_WRONLY, 0); err == nil {
		_, _ = fmt.Fprintln(console, "bootstrap:", text) // what is not printed is not waited for
		_ = console.Close()
	}
}

func run() error {
	if err := errors.Join(mount("dev", "/dev", "devtmpfs"), loadModules(), heartbeat()); err != nil {
		return err
	}
	say("heartbeat answered")
	return start()
}

func mount(source, target, fstype string) error {
	if err := unix.Mount(source, target, fstype, unix.MS_NOSUID|unix.MS_NOEXEC, ""); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("mount %s: %w", target, err)
	}
	return nil
}

func loadModules() error {
	files, err := filepath.Glob(modules) // in order of the names
	if err != nil {
		return err
	}
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("load %s: %w", name, err)
		}
	}
	return nil
}

func heartbeat() error {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("heartbeat: %w", err)
	}
	defer unix.Close(fd) //nolint:errcheck // nothing is written after the answer
	if err := unix.Connect(fd, &unix.SockaddrVM{CID: parentCID, Port: beatPort}); err != nil {
		return fmt.Errorf("heartbeat: connect: %w", err)
	}
	b := []byte{beat}
	if _, err := unix.Write(fd, b); err != nil {
		return fmt.Errorf("heartbeat: %w", err)
	}
	b[0] = 0
	if n, err := unix.Read(fd, b); err != nil || n != 1 || b[0] != beat {
		return fmt.Errorf("heartbeat: no answer: %w", err)
	}
	return nil
}

// start runs the program below its own root and waits for it.
func start() error {
	if err := errors.Join(
		mount("dev", root+"/dev", "devtmpfs"), mount("proc", root+"/proc", "proc"), mount("sysfs", root+"/sys", "sysfs"),
		unix.Chroot(root), unix.Chdir("/"),
	); err != nil {
		return err
	}
	console, err := os.OpenFile("/dev/console", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	cmd := exec.Command(program) //nolint:noctx // the machine ends with it
	cmd.Stdin, cmd.Stdout, cmd.Stderr = console, console, console
	cmd.Env = []string{"PATH=/"}
	err = cmd.Run()
	return errors.Join(err, console.Close())
}
