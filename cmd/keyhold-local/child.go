package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// Waits around a child's end.
const (
	stopPatience   = 20 * time.Second // from SIGTERM to SIGKILL: a parent finishes batches within a lease
	restartFirst   = 100 * time.Millisecond
	restartLongest = 3 * time.Second
	healthyAfter   = 5 * time.Second // a child that ran this long is restarted at once
)

// child is a process of this program that is kept running until its context
// ends. Its output goes to a log file.
type child struct {
	name string
	args []string
	log  *slog.Logger
}

// keep runs the child again and again until ctx ends; then it is told to stop
// and waited for. None outlives this process: the kernel kills it with us.
func (c *child) keep(ctx context.Context) error {
	wait := restartFirst
	for {
		began := time.Now()
		err := c.once(ctx)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // it was told to stop
		}
		if time.Since(began) > healthyAfter {
			wait = restartFirst
		}
		c.log.WarnContext(ctx, "process ended and is started again", slog.String("process", c.name), slog.Any("error", err))
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
		wait = min(2*wait, restartLongest)
	}
}

// once runs the child to its end.
func (c *child) once(ctx context.Context) (err error) {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("start %s: %w", c.name, err)
	}
	out, err := os.OpenFile(filepath.Join(logs, c.name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("start %s: %w", c.name, full(err))
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	cmd := exec.CommandContext(context.WithoutCancel(ctx), self, c.args...) //nolint:gosec // this program itself
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig: syscall.SIGKILL,
		Setpgid:   true, // Ctrl-C is for the supervisor, which stops children in order
	}
	ended := make(chan error, 1)
	started := make(chan error, 1)
	go func() {
		// Pdeathsig comes when the thread that started the child ends, so that
		// thread waits for it.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			ended <- cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start %s: %w", c.name, err)
	}
	if err := writePID(c.name, cmd.Process.Pid); err != nil {
		c.log.WarnContext(ctx, "process id not written", slog.String("process", c.name), slog.Any("error", err))
	}
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	return stop(cmd.Process, ended)
}

func stop(p *os.Process, ended <-chan error) error {
	if err := p.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop process %d: %w", p.Pid, err)
	}
	patience := time.NewTimer(stopPatience)
	defer patience.Stop()
	select {
	case err := <-ended:
		return err
	case <-patience.C:
	}
	if err := p.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill process %d: %w", p.Pid, err)
	}
	return <-ended
}

// writePID tells people and tests which process is which.
func writePID(name string, pid int) error {
	return os.WriteFile(filepath.Join(sockets, name+".pid"), fmt.Appendln(nil, pid), 0o600)
}

// logTo returns a JSON logger.
func logTo(w io.Writer) *slog.Logger { return slog.New(slog.NewJSONHandler(w, nil)) }
