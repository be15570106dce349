package guest_test

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/cmd/internal/guest"
	"github.com/keyhold/keyhold/enclave"
)

// machine is a folder in the place of /, and a kernel that notes what it is asked.
type machine struct {
	guest.TestingOnlyMachine
	roots   []byte
	console bytes.Buffer
	refuse  map[string]error // calls that fail, by their line in calls

	mu    sync.Mutex
	calls []string
}

func (m *machine) call(line string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.calls = append(m.calls, line)
	return m.refuse[line]
}

// newMachine is one in which an enclave can run.
func newMachine(t *testing.T) *machine {
	t.Helper()
	m, err := bareMachine(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func bareMachine(root string) (*machine, error) {
	ca, err := nsmtest.NewCA(nil)
	if err != nil {
		return nil, err
	}
	session, err := nsmtest.New(ca, nsmtest.Options{PCRs: nsmtest.Measurements(image)})
	if err != nil {
		return nil, err
	}
	m := &machine{roots: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Root().Raw}), refuse: map[string]error{}}
	m.TestingOnlyMachine = guest.TestingOnlyMachine{
		Init: true, Console: &m.console, Root: root, Pause: time.Millisecond, Beat: 20 * time.Second,
		ClearEnv:   func() { _ = m.call("clear environment") },
		Mount:      m.mount,
		LoadModule: func(file string) error { return m.call("load " + m.rel(file)) },
		Redirect:   func(file string, _, fd int) error { return m.call(fmt.Sprintf("open %s as %d", m.rel(file), fd)) },
		Drain:      func() { _ = m.call("drain") },
		Sync:       func() { _ = m.call("sync") },
		Restart:    func() error { return m.call("restart") },
		Listen: func(port uint32) (net.Listener, error) {
			if err := m.call(fmt.Sprintf("listen %d", port)); err != nil {
				return nil, err
			}
			return new(net.ListenConfig).Listen(context.Background(), "unix", filepath.Join(m.Root, "listener"))
		},
		Dial:    m.dial(func(beat byte) []byte { return []byte{beat} }),
		OpenNSM: func() (nsm.Session, error) { return session, m.call("open nsm") },
		Serve: func(ctx context.Context, c enclave.Config) error {
			if err := errors.Join(c.Validate(), c.Ready(ctx)); err != nil {
				return errors.Join(err, c.Listener.Close())
			}
			return errors.Join(m.call("serve"), c.Listener.Close())
		},
	}
	files := map[string]string{
		"dev/vsock": "", "dev/nsm": "", "modules/02-vsock.ko": "", "modules/01-first.ko": "", "modules/10-nsm.ko": "",
		"sys/class/net/lo/flags": "0x8\n",
	}
	for _, name := range guest.TestingOnlySettings() {
		files[name] = ""
	}
	for name, content := range files {
		if err := write(filepath.Join(root, name), content); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func write(file, content string) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, []byte(content), 0o600)
}

func (m *machine) mount(_, target, fstype string, flags uintptr, options string) error {
	var words []string
	for _, f := range []struct {
		bit  uintptr
		name string
	}{
		{unix.MS_REMOUNT, "remount"},
		{unix.MS_BIND, "bind"},
		{unix.MS_RDONLY, "ro"},
		{unix.MS_NOSUID, "nosuid"},
		{unix.MS_NODEV, "nodev"},
		{unix.MS_NOEXEC, "noexec"},
	} {
		if flags&f.bit != 0 {
			words = append(words, f.name)
			flags &^= f.bit
		}
	}
	if flags != 0 {
		words = append(words, fmt.Sprintf("%#x", flags))
	}
	line := fmt.Sprintf("mount /%s %s", strings.TrimPrefix(m.rel(target), "."), strings.Join(words, ","))
	if fstype != "" {
		line = fmt.Sprintf("mount %s on /%s %s", fstype, m.rel(target), strings.Join(words, ","))
	}
	if options != "" {
		line += " " + options
	}
	return m.call(line)
}

// dial reaches a parent that answers a heartbeat with what answer makes of it; nil bytes hang up.
func (m *machine) dial(answer func(byte) []byte) func(context.Context, uint32) (net.Conn, error) {
	return func(_ context.Context, port uint32) (net.Conn, error) {
		if err := m.call(fmt.Sprintf("dial %d", port)); err != nil {
			return nil, err
		}
		near, far := net.Pipe()
		go func() {
			defer far.Close()
			beat := make([]byte, 1)
			if _, err := far.Read(beat); err != nil {
				return
			}
			_ = m.call(fmt.Sprintf("got %#x", beat[0]))
			if b := answer(beat[0]); b != nil {
				_, _ = far.Write(b) // the guest may have hung up
			}
		}()
		return near, nil
	}
}

func (m *machine) rel(file string) string {
	rel, err := filepath.Rel(m.Root, file)
	if err != nil {
		return "outside"
	}
	return rel
}

func (m *machine) write(t *testing.T, name, content string) {
	t.Helper()
	if err := write(filepath.Join(m.Root, name), content); err != nil {
		t.Fatal(err)
	}
}

func (m *machine) remove(t *testing.T, name string) {
	t.Helper()
	if err := os.RemoveAll(filepath.Join(m.Root, name)); err != nil {
		t.Fatal(err)
	}
}

// run runs the program until it ends, which is within the patience of a test.
func (m *machine) run(t *testing.T) (exit int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	exit = guest.TestingOnlyMain(ctx, &m.TestingOnlyMachine, m.roots)
	if ctx.Err() != nil {
		t.Error("it did not end by itself")
	}
	return exit
}

// lines are what the console shows. Each must be an object with a level, a message and the time since the start.
func (m *machine) lines(t *testing.T) []map[string]any {
	t.Helper()
	var all []map[string]any
	for line := range strings.Lines(m.console.String()) {
		var v map[string]any
		if err := json.Unmarshal([]byte(line), &v); err != nil {
			t.Fatalf("a line of the console is no JSON: %q", line)
		}
		if up, ok := v["up_ms"].(float64); !ok || up <= 0 || v["msg"] == nil || v["level"] == nil || v["time"] != nil {
			t.Errorf("a line of the console is incomplete: %q", line)
		}
		all = append(all, v)
	}
	return all
}

const image = "an image"

func device(t *testing.T, o nsmtest.Options) nsm.Session {
	t.Helper()
	ca, err := nsmtest.NewCA(nil)
	if err != nil {
		t.Fatal(err)
	}
	d, err := nsmtest.New(ca, o)
	if err != nil {
		t.Fatal(err)
	}
	return d
}
