// Package dynoxide runs a local DynamoDB, the dynoxide server, as a child process. It refuses a
// database file that another process has open.
package dynoxide

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

const (
	defaultStartTimeout = 10 * time.Second // it takes 10 ms on an idle machine
	stopTimeout         = 5 * time.Second  // between SIGTERM and SIGKILL
	portAttempts        = 8                // a free port can be taken before the server binds it
	probeInterval       = 5 * time.Millisecond
)

var (
	// ErrInUse means that another process holds the database file.
	ErrInUse = errors.New("the database is in use by another process")

	// ErrPortInUse means that another process listens on the port that was asked for.
	ErrPortInUse = errors.New("the port is in use by another process")

	// ErrNotFound means that no dynoxide binary was found. Its text says how to get one.
	ErrNotFound = errors.New("dynoxide not found: run `make tools`, or name the binary in KEYHOLD_DYNOXIDE")
)

// Options describes one server.
type Options struct {
	Binary string // path of the binary; empty: see Find
	DBPath string // the SQLite file, its folder is made where it is missing; empty: in memory
	Port   int    // on 127.0.0.1; 0: any free one

	StartTimeout time.Duration // from Start to the first answer; zero: 10 s
	Logger       *slog.Logger  // nil: none
	Output       io.Writer     // what the server prints; nil: nowhere but in the error of a failed start
}

// Server is a running dynoxide. It ends with Stop, with Kill, or with this process, however that ends.
type Server struct {
	endpoint string
	child    *child
	lock     *os.File
	log      *slog.Logger
}

// Start runs a server and returns once it answers. The context bounds the start, not the server.
func Start(ctx context.Context, o Options) (*Server, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.StartTimeout == 0 {
		o.StartTimeout = defaultStartTimeout
	}
	if o.Binary == "" {
		binary, err := Find()
		if err != nil {
			return nil, err
		}
		o.Binary = binary
	}
	ctx, cancel := context.WithTimeout(ctx, o.StartTimeout)
	defer cancel()

	lock, err := lockDatabase(ctx, o.DBPath)
	if err != nil {
		return nil, err
	}
	server, err := startOnFreePort(ctx, o, lock)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start dynoxide: %w", err), closeLock(lock))
	}
	o.Logger.InfoContext(ctx, "local database started",
		slog.String("endpoint", server.endpoint), slog.Int("pid", server.PID()))
	return server, nil
}

// startOnFreePort tries again with another port where the one picked was taken in the meantime.
func startOnFreePort(ctx context.Context, o Options, lock *os.File) (*Server, error) {
	for attempt := 1; ; attempt++ {
		port := o.Port
		if port == 0 {
			var err error
			if port, err = freePort(ctx); err != nil {
				return nil, err
			}
		}
		server, err := startOnPort(ctx, o, port, lock)
		if err == nil {
			return server, nil
		}
		if o.Port != 0 || attempt == portAttempts || !errors.Is(err, ErrPortInUse) {
			return nil, err
		}
	}
}

func startOnPort(ctx context.Context, o Options, port int, lock *os.File) (*Server, error) {
	args := []string{"serve", "--host", "127.0.0.1", "--port", strconv.Itoa(port)}
	if o.DBPath != "" {
		args = append(args, "--db-path", o.DBPath)
	}
	process, err := startChild(ctx, o.Binary, args, lock, o.Output)
	if err != nil {
		return nil, err
	}
	server := &Server{
		endpoint: "http://" + net.JoinHostPort("127.0.0.1", strconv.Itoa(port)),
		child:    process,
		lock:     lock,
		log:      o.Logger,
	}
	if err := server.waitReady(ctx); err != nil {
		process.kill()
		return nil, err
	}
	return server, nil
}

// waitReady returns when the server says that it listens, and then answers. The first alone could come
// too early; the second alone could be another server's on the same port.
func (s *Server) waitReady(ctx context.Context) error {
	select {
	case <-s.child.listening:
	case <-s.child.done:
		return s.child.startFailure()
	case <-ctx.Done():
		return fmt.Errorf("wait until it listens: %w", context.Cause(ctx))
	}
	probe := time.NewTicker(probeInterval)
	defer probe.Stop()
	for !s.answers(ctx) {
		select {
		case <-probe.C:
		case <-s.child.done:
			return s.child.startFailure()
		case <-ctx.Done():
			return fmt.Errorf("wait until it answers: %w", context.Cause(ctx))
		}
	}
	return nil
}

// answers asks for the health page, which like DynamoDB's own needs no credentials.
func (s *Server) answers(ctx context.Context) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.endpoint, http.NoBody)
	if err != nil {
		return false
	}
	transport := &http.Transport{DisableKeepAlives: true}
	res, err := transport.RoundTrip(req)
	if err != nil {
		return false
	}
	return res.Body.Close() == nil && res.StatusCode == http.StatusOK
}

// Endpoint is the base URL for the SDK.
func (s *Server) Endpoint() string { return s.endpoint }

// PID is the process id, for tests that kill.
func (s *Server) PID() int { return s.child.cmd.Process.Pid }

// Done is closed when the server has ended, for whatever reason. Its database stays locked for other
// processes until Stop or Kill.
func (s *Server) Done() <-chan struct{} { return s.child.done }

// Stop ends the server in order, SIGTERM, and SIGKILL after 5 s or when ctx ends, and gives its
// database free. Stopping a stopped server does nothing.
func (s *Server) Stop(ctx context.Context) error {
	if err := s.child.signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop dynoxide: %w", err)
	}
	patience := time.NewTimer(stopTimeout)
	defer patience.Stop()
	select {
	case <-s.child.done:
	case <-patience.C:
		s.log.WarnContext(ctx, "local database did not stop and is killed", slog.Int("pid", s.PID()))
	case <-ctx.Done():
	}
	return s.Kill()
}

// Kill ends the server at once, as kill -9 does, and returns when it has ended.
func (s *Server) Kill() error {
	s.child.kill()
	return closeLock(s.lock)
}

// freePort asks the kernel for a port that nobody listens on right now.
func freePort(ctx context.Context) (int, error) {
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("look for a free port: %w", err)
	}
	address, ok := listener.Addr().(*net.TCPAddr)
	if !ok {
		return 0, errors.Join(errors.New("look for a free port: the listener has no TCP address"), listener.Close())
	}
	return address.Port, listener.Close()
}

// lockDatabase takes the lock file beside the database. It returns nil for a database in memory.
//
// The child inherits the open file and with it the lock, so the lock is held until the last process
// that could write the database has ended: a supervisor that was killed and started again waits for
// the server that is still dying, and no longer than a second.
func lockDatabase(ctx context.Context, dbPath string) (*os.File, error) {
	if dbPath == "" {
		return nil, nil //nolint:nilnil // no file, no lock
	}
	if err := os.MkdirAll(filepath.Dir(dbPath), 0o700); err != nil {
		return nil, fmt.Errorf("make the database's folder: %w", err)
	}
	file, err := os.OpenFile(dbPath+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the database's lock: %w", err)
	}
	if err := flock(ctx, file); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", dbPath, err), file.Close())
	}
	return file, nil
}

func flock(ctx context.Context, file *os.File) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for {
		err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return err
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return ErrInUse
		}
	}
}

// closeLock gives the lock up, as far as this process holds it. Closing twice is fine.
func closeLock(lock *os.File) error {
	if lock == nil {
		return nil
	}
	if err := lock.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("release the database's lock: %w", err)
	}
	return nil
}
