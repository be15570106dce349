package main_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyhold/keyhold/internal/awslocal/dynoxide"
)

const (
	patience = 4 * time.Minute // for anything at all: the machine may be busy
	leaseFor = 10 * time.Second
	look     = 20 * time.Millisecond // between looks at something that is awaited
)

// running is keyhold-local as a process, in a session of its own: whatever it starts stays in there.
type running struct {
	t      *testing.T
	dir    string
	cmd    *exec.Cmd
	stdout tail
	stderr tail
	ended  chan struct{}
}

// tail is what a process has said so far.
type tail struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *tail) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *tail) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// start runs keyhold-local on dir. Nothing of it survives t.
func start(t *testing.T, dir string, env []string, command string, args ...string) *running {
	t.Helper()
	r := &running{t: t, dir: dir, ended: make(chan struct{})}
	r.cmd = exec.CommandContext(context.WithoutCancel(t.Context()), os.Args[0], append([]string{command, "--dir", dir}, args...)...)
	r.cmd.Env = append(os.Environ(), programEnv+"=1", dynoxide.BinaryEnv+"="+database(t))
	r.cmd.Env = append(r.cmd.Env, env...)
	r.cmd.Stdout, r.cmd.Stderr = &r.stdout, &r.stderr
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	r.cmd.WaitDelay = time.Second
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(r.ended)
		_ = r.cmd.Wait() // how it ended is in ProcessState
	}()
	t.Cleanup(func() {
		for _, p := range r.session() {
			_ = unix.Kill(p.pid, unix.SIGKILL) // it may have ended by itself
		}
		<-r.ended
		if t.Failed() {
			t.Logf("keyhold-local %s: %v\n%s\n%s", command, r.cmd.ProcessState, r.stdout.String(), r.stderr.String())
		}
	})
	return r
}

// wait returns the exit code, -1 where a signal ended the process.
func (r *running) wait() int {
	r.t.Helper()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-r.ended:
		return r.cmd.ProcessState.ExitCode()
	case <-timer.C:
		r.t.Fatalf("keyhold-local still runs after %s", patience)
		return 0
	}
}

func (r *running) over() bool {
	select {
	case <-r.ended:
		return true
	default:
		return false
	}
}

// process is a line of /proc that anybody may read.
type process struct {
	pid   int
	state string
}

// session lists the living processes of the run's session.
func (r *running) session() []process {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		r.t.Fatal(err)
	}
	var out []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if state, session := stat(pid); session == r.cmd.Process.Pid && state != "Z" && state != "X" {
			out = append(out, process{pid, state})
		}
	}
	return out
}

// stat returns state and session of a process, or nothing where it is gone. Its name stands in
// parentheses and may hold anything.
func stat(pid int) (state string, session int) {
	raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return "", 0
	}
	fields := strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+1:]))
	if len(fields) < 4 {
		return "", 0
	}
	session, err = strconv.Atoi(fields[3])
	if err != nil {
		return "", 0
	}
	return fields[0], session
}

// nothingIsLeft waits for the kernel to end what the supervisor left behind: moments, no more.
func (r *running) nothingIsLeft() {
	r.t.Helper()
	var left []process
	deadline := time.Now().Add(leaseFor)
	for time.Now().Before(deadline) {
		if left = r.session(); len(left) == 0 {
			return
		}
		nap(r.t, look)
	}
	r.t.Errorf("processes outlive their supervisor: %v", left)
}

// signal sends a signal to one process of the run, "supervisor" or a name in DIR/run. It returns 0
// where that process is not there at the moment.
func (r *running) signal(name string, sig syscall.Signal) (pid int) {
	r.t.Helper()
	pid = r.cmd.Process.Pid
	if name != "supervisor" {
		raw, err := os.ReadFile(filepath.Join(r.dir, "run", name+".pid"))
		if errors.Is(err, os.ErrNotExist) {
			return 0
		}
		if err == nil {
			pid, err = strconv.Atoi(strings.TrimSpace(string(raw)))
		}
		if err != nil {
			return 0 // it is being written
		}
	}
	if state, session := stat(pid); session != r.cmd.Process.Pid || state == "Z" {
		return 0 // of an earlier run, or just gone
	}
	if err := unix.Kill(pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
		r.t.Fatal(err)
	}
	return pid
}

// until waits for something to be so, and gives up when the run has ended.
func (r *running) until(what string, so func() bool) {
	r.t.Helper()
	deadline := time.Now().Add(patience)
	for !so() {
		if r.over() {
			r.t.Fatalf("keyhold-local ended before %s", what)
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("no sign in %s that %s", patience, what)
		}
		nap(r.t, look)
	}
}

// nap waits, or not any longer than the test lasts.
func nap(t *testing.T, d time.Duration) {
	t.Helper()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-t.Context().Done():
	}
}

// report is the last line of stdout with --json.
type report struct {
	Records          int     `json:"records"`
	Signed           int     `json:"signed"`
	Refused          int     `json:"refused"`
	Keys             int     `json:"keys"`
	Batches          int     `json:"batches"`
	SecondsSign      float64 `json:"seconds_sign"`
	RecordsPerSecond float64 `json:"records_per_second"`
	Verified         int     `json:"verified"`
	Receipts         int     `json:"receipts"`
	Quarantined      int     `json:"quarantined"`
}

func (r *running) report() report {
	r.t.Helper()
	lines := strings.Split(strings.TrimSpace(r.stdout.String()), "\n")
	var out report
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &out); err != nil {
		r.t.Fatalf("the last line of stdout: %v", err)
	}
	return out
}

// mustEnd waits for an exit code and, where text is given, for it on stderr.
func (r *running) mustEnd(code int, text string) {
	r.t.Helper()
	if got := r.wait(); got != code {
		r.t.Fatalf("exit code %d, want %d", got, code)
	}
	if text != "" && !strings.Contains(r.stderr.String(), text) {
		r.t.Errorf("stderr does not say %q", text)
	}
	r.nothingIsLeft()
}
