package sdnotify_test

import (
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/parent/watch/sdnotify"
)

const pid = 4711

func environment(pairs map[string]string) func(string) (string, bool) {
	return func(name string) (string, bool) {
		value, ok := pairs[name]
		return value, ok
	}
}

func TestTheEnvironmentSaysWhetherSystemdWatches(t *testing.T) {
	for _, tt := range []struct {
		name string
		env  map[string]string
		want time.Duration
		bad  bool
	}{
		{"nothing", nil, 0, false},
		{"a watchdog of 30 s", map[string]string{"WATCHDOG_USEC": "30000000"}, 30 * time.Second, false},
		{"mine", map[string]string{"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "4711"}, 30 * time.Second, false},
		{"that of another process", map[string]string{"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, 0, false},
		{"empty", map[string]string{"WATCHDOG_USEC": "", "NOTIFY_SOCKET": ""}, 0, false},
		{"no number", map[string]string{"WATCHDOG_USEC": "soon"}, 0, true},
		{"zero", map[string]string{"WATCHDOG_USEC": "0"}, 0, true},
		{"years", map[string]string{"WATCHDOG_USEC": "9223372036854775807"}, 0, true},
		{"a relative socket", map[string]string{"NOTIFY_SOCKET": "run/notify"}, 0, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, err := sdnotify.FromEnv(environment(tt.env), pid)
			if (err != nil) != tt.bad || s.Watchdog() != tt.want {
				t.Fatalf("got %v, %v", s.Watchdog(), err)
			}
		})
	}
}

func TestADatagramCarriesTheAssignments(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	ln, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	s, err := sdnotify.FromEnv(environment(map[string]string{"NOTIFY_SOCKET": path}), pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(sdnotify.Ready, sdnotify.Status("up\nWATCHDOG=trigger")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4096)
	n, err := ln.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff("READY=1\nSTATUS=up WATCHDOG=trigger", string(b[:n])); diff != "" {
		t.Error(diff)
	}
	if err := s.Send(sdnotify.Status(strings.Repeat("x", 5000))); err == nil {
		t.Error("a message that systemd would cut off was sent")
	}
}

func TestWithoutSystemdNothingIsSent(t *testing.T) {
	var s sdnotify.Service
	if err := s.Send(sdnotify.Ready); err != nil {
		t.Error(err)
	}
	gone, err := sdnotify.FromEnv(environment(map[string]string{"NOTIFY_SOCKET": filepath.Join(t.TempDir(), "nobody")}), pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := gone.Send(sdnotify.Ready); err == nil {
		t.Error("a socket that is not there swallowed the message")
	}
}

func TestChildrenDoNotInheritTheSocket(t *testing.T) {
	got := sdnotify.Without([]string{"PATH=/bin", "NOTIFY_SOCKET=/run/x", "WATCHDOG_PID=1", "WATCHDOG_USEC=2", "A=b"})
	if diff := cmp.Diff([]string{"PATH=/bin", "A=b"}, got); diff != "" {
		t.Error(diff)
	}
}
