package dynoxide

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"
)

const (
	listeningLine = "listening on" // dynoxide prints it to stderr once its port is bound
	portTakenLine = "already in use"

	maxKept = 4 << 10 // of what the server prints, for the error of a failed start
)

// child is a process that ends when this one does.
type child struct {
	cmd       *exec.Cmd
	output    *output
	listening <-chan struct{}
	done      chan struct{} // closed when the process has ended and was waited for
}

// startChild starts the binary; lock, where not nil, is inherited.
//
// The kernel sends Pdeathsig when the *thread* that started the child ends, not the process. So one
// thread is set apart, which starts the child and waits for it.
func startChild(ctx context.Context, binary string, args []string, lock *os.File, w io.Writer) (*child, error) {
	out := &output{to: w, listening: make(chan struct{})}
	// Not the caller's context: it bounds the start, and the server outlives it.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), binary, args...) //nolint:gosec // the operator names the binary
	cmd.Stdout, cmd.Stderr = out, out
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig: syscall.SIGKILL,
		Setpgid:   true, // Ctrl-C is for us: whoever started the server stops it last
	}
	if lock != nil {
		cmd.ExtraFiles = []*os.File{lock}
	}
	c := &child{cmd: cmd, output: out, listening: out.listening, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended is in ProcessState
			close(c.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("run the binary: %w", err)
	}
	return c, nil
}

// signal does nothing where the process has ended.
func (c *child) signal(sig syscall.Signal) error {
	if err := c.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// kill returns when the process has ended.
func (c *child) kill() {
	_ = c.signal(syscall.SIGKILL) // to a child of ours it fails only where the child has ended
	<-c.done
}

// startFailure tells why a server that ended before it answered did so, in its own words.
func (c *child) startFailure() error {
	said := c.output.kept()
	if bytes.Contains(said, []byte(portTakenLine)) {
		return ErrPortInUse
	}
	return fmt.Errorf("it ended (%s) saying: %q", c.cmd.ProcessState, said)
}

// output passes on what the server prints, keeps its beginning, and notices that it listens.
type output struct {
	to        io.Writer // may be nil
	listening chan struct{}

	mu    sync.Mutex
	begin []byte
	seen  bool
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.begin = append(o.begin, p[:min(len(p), maxKept-len(o.begin))]...)
	if !o.seen && bytes.Contains(o.begin, []byte(listeningLine)) {
		o.seen = true
		close(o.listening)
	}
	if o.to == nil {
		return len(p), nil
	}
	return o.to.Write(p)
}

func (o *output) kept() []byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	return bytes.TrimSpace(bytes.Clone(o.begin))
}
