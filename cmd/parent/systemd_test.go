package main_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	parent "github.com/keyhold/keyhold/cmd/parent"
	"github.com/keyhold/keyhold/parent/watch/sdnotify"
)

// systemd is a socket that is told how a service does.
func systemd(t *testing.T, watchdog string) (service sdnotify.Service, heard func() string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	ln, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	service, err = sdnotify.FromEnv(func(name string) (string, bool) {
		value, ok := map[string]string{"NOTIFY_SOCKET": path, "WATCHDOG_USEC": watchdog}[name]
		return value, ok
	}, 1)
	if err != nil {
		t.Fatal(err)
	}
	return service, func() string {
		t.Helper()
		b := make([]byte, 4096)
		if err := ln.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		n, err := ln.Read(b)
		if err != nil {
			t.Fatalf("systemd heard nothing: %v", err)
		}
		return string(b[:n])
	}
}

func TestSystemdHearsWhatReadyzSays(t *testing.T) {
	service, heard := systemd(t, "300000") // 0.3 s, so every 0.1 s
	var hangs atomic.Bool
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if hangs.Load() {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = io.WriteString(w, `{"ready":false,"enclaves":[{"name":"cid-16","phase":"ready","live":true},{"name":"cid-17","phase":"failed","code":"kms_denied","live":false}]}`)
	}))
	defer srv.Close()
	ctx, cancel := context.WithCancel(t.Context())
	stop := parent.TestingOnlyReport(ctx, service, strings.TrimPrefix(srv.URL, "http://"))
	defer stop()
	first := heard()
	for _, want := range []string{"READY=1", "WATCHDOG=1", "STATUS=1 of 2 enclaves ready (cid-17: failed kms_denied)"} {
		if !strings.Contains(first, want) {
			t.Errorf("the first word lacks %q: %q", want, first)
		}
	}
	if second := heard(); strings.Contains(second, "READY=1") || !strings.Contains(second, "WATCHDOG=1") {
		t.Errorf("second word: %q", second)
	}
	hangs.Store(true)
	cancel()
	for {
		said := heard()
		if said == "STOPPING=1" {
			break
		}
		if !strings.Contains(said, "WATCHDOG=1") {
			t.Fatalf("heard %q", said)
		}
	}
}

func TestAParentWithoutAddressIsReportedAllTheSame(t *testing.T) {
	service, heard := systemd(t, "")
	stop := parent.TestingOnlyReport(t.Context(), service, "")
	defer stop()
	if said := heard(); !strings.Contains(said, "READY=1") {
		t.Errorf("heard %q", said)
	}
}

func TestStartsTakeTurns(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := parent.TestingOnlyLock(path)(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := parent.TestingOnlyLock(path)(ctx); err == nil {
		t.Fatal("two have the lock")
	}
	unlock()
	again, err := parent.TestingOnlyLock(path)(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	again()
	if _, err := parent.TestingOnlyLock(filepath.Join(path, "below"))(t.Context()); err == nil {
		t.Error("a lock that cannot be had was given")
	}
}
