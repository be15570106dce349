// Package local runs keyhold-local as a process, for tests and the soak, and kills what it started. It ends
// no process of another session.
package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyhold/keyhold/internal/awslocal/dynoxide"
)

// Supervisor is the name of keyhold-local itself among the processes of a run. The others are those of
// the files in DIR/run.
const Supervisor = "supervisor"

// Build builds a program of this module into folder and returns its path.
func Build(ctx context.Context, root, folder, program string) (string, error) {
	out := filepath.Join(folder, program)
	cmd := exec.CommandContext(ctx, "go", "build", "-o", out, "./cmd/"+program) //nolint:gosec // this module's own programs
	cmd.Dir = root
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", program, err, text)
	}
	return out, nil
}

// FindDatabase returns the local DynamoDB's program.
func FindDatabase() (string, error) {
	path, err := dynoxide.Find()
	if err != nil {
		return "", fmt.Errorf("find the local DynamoDB: %w", err)
	}
	return path, nil
}

// Serve starts the database on the tables of a run that is over. The caller calls end.
func Serve(ctx context.Context, database, dir string) (endpoint string, end func() error, err error) {
	db, err := dynoxide.Start(ctx, dynoxide.Options{Binary: database, DBPath: filepath.Join(dir, "dynamodb.db")})
	if err != nil {
		return "", nil, fmt.Errorf("open the tables: %w", err)
	}
	return db.Endpoint(), db.Kill, nil
}

// Run is keyhold-local as a process, in a session of its own.
type Run struct {
	Dir            string
	Stdout, Stderr Text
	cmd            *exec.Cmd
	ended          chan struct{}
}

// Text is what a process has said so far.
type Text struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

// Write implements io.Writer.
func (t *Text) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.buf.Write(p)
}

func (t *Text) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.buf.String()
}

// Start runs a command of the program on dir, with that database. The caller ends it with End.
func Start(program, database, dir, command string, args ...string) (*Run, error) {
	r := &Run{Dir: dir, ended: make(chan struct{})}
	r.cmd = exec.Command(program, append([]string{command, "--dir", dir}, args...)...) //nolint:gosec,noctx // End ends it, with all that it started
	r.cmd.Env = append(os.Environ(), dynoxide.BinaryEnv+"="+database)
	r.cmd.Stdout, r.cmd.Stderr = &r.Stdout, &r.Stderr
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	r.cmd.WaitDelay = time.Second
	if err := r.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", command, err)
	}
	go func() {
		defer close(r.ended)
		_ = r.cmd.Wait() // how it ended is in ProcessState
	}()
	return r, nil
}

// Ended is closed when the process is over.
func (r *Run) Ended() <-chan struct{} { return r.ended }

// ExitCode of a process that is over, -1 where a signal ended it.
func (r *Run) ExitCode() int {
	<-r.ended
	return r.cmd.ProcessState.ExitCode()
}

// End kills whatever is left of the run.
func (r *Run) End() {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		entries = nil // the supervisor is killed below, and the kernel ends its children with it
	}
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && session(pid) == r.cmd.Process.Pid {
			_ = unix.Kill(pid, unix.SIGKILL) // it may have ended by itself
		}
	}
	_ = r.cmd.Process.Kill() // likewise
	<-r.ended
}

// PID of a process of the run, 0 where it is not there at the moment.
func (r *Run) PID(name string) int {
	if name == Supervisor {
		return r.cmd.Process.Pid
	}
	raw, err := os.ReadFile(filepath.Join(r.Dir, "run", name+".pid"))
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil || session(pid) != r.cmd.Process.Pid {
		return 0 // it is being written, or of an earlier run
	}
	return pid
}

// Signal reports whether the process was there to get it.
func (r *Run) Signal(name string, sig syscall.Signal) bool {
	pid := r.PID(name)
	return pid != 0 && unix.Kill(pid, sig) == nil
}

// session of a living process, 0 where there is none. A process's name stands in parentheses and may hold
// anything.
func session(pid int) int {
	raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0
	}
	f := strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+1:]))
	if len(f) < 4 || f[0] == "Z" || f[0] == "X" {
		return 0
	}
	n, err := strconv.Atoi(f[3])
	if err != nil {
		return 0
	}
	return n
}

// Killer kills at moments and in an order that its dice give.
type Killer struct {
	Dice    *rand.Rand
	Victims []string      // one that stands twice is chosen twice as often
	Every   time.Duration // on average; kills that find nobody do not count
	Killed  map[string]int
	Total   int
}

// Work kills processes of r until it ends, ctx ends or the kills are as many as limit.
func (k *Killer) Work(ctx context.Context, r *Run, limit int) {
	if k.Killed == nil {
		k.Killed = map[string]int{}
	}
	for k.Total < limit && Pause(ctx, time.Duration(k.Dice.Int64N(int64(2*k.Every)))) == nil {
		select {
		case <-r.ended:
			return
		default:
		}
		if victim := k.Victims[k.Dice.IntN(len(k.Victims))]; r.Signal(victim, unix.SIGKILL) {
			k.Killed[victim]++
			k.Total++
		}
	}
}

// Pause waits, or not any longer than ctx lasts.
func Pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Shorten makes the folder's config, with `up`, and puts a lease of two seconds into it in place of ten:
// what was killed is taken over sooner. It is to be called before there is a keyring.
func Shorten(ctx context.Context, program, database, dir string) error {
	r, err := Start(program, database, dir, "up")
	if err != nil {
		return err
	}
	defer r.End()
	for !strings.Contains(r.Stdout.String(), "KEYHOLD_PCR0") {
		select {
		case <-r.Ended():
			return errors.New("shorten the lease: keyhold-local up ended")
		default:
		}
		if err := Pause(ctx, 20*time.Millisecond); err != nil {
			return fmt.Errorf("shorten the lease: %w", err)
		}
	}
	name := filepath.Join(dir, "config.json")
	raw, err := os.ReadFile(name)
	if err != nil {
		return fmt.Errorf("shorten the lease: %w", err)
	}
	short := bytes.Replace(raw, []byte("\"max_ms\": 10000,\n    \"margin_ms\": 1000\n"), []byte("\"max_ms\": 2000,\n    \"margin_ms\": 200\n"), 1)
	if len(short) == len(raw) {
		return errors.New("shorten the lease: the config has another form")
	}
	r.Signal(Supervisor, unix.SIGINT)
	<-r.Ended()
	if err := os.WriteFile(name, short, 0o600); err != nil { //nolint:gosec // in the folder that the caller made
		return fmt.Errorf("shorten the lease: %w", err)
	}
	return nil
}
