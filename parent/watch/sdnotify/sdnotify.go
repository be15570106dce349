// Package sdnotify tells systemd how a service does (sd_notify(3)). Started by
// anything else than systemd it says nothing, and it never starts a process.
package sdnotify

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"
)

// Assignments that Send takes; Status makes one more.
const (
	Ready    = "READY=1"
	Stopping = "STOPPING=1"
	Alive    = "WATCHDOG=1"
)

// Variables that systemd sets. Children of a service must not inherit them.
const (
	envSocket      = "NOTIFY_SOCKET"
	envWatchdog    = "WATCHDOG_USEC"
	envWatchdogPID = "WATCHDOG_PID"
)

// maxState bounds one datagram, in bytes; systemd reads 4 KiB.
const maxState = 4 << 10

// Service is this process as systemd sees it. The zero value is one that systemd
// did not start.
type Service struct {
	socket   string
	watchdog time.Duration
}

// FromEnv reads what systemd put into the environment of the process pid.
func FromEnv(lookup func(string) (string, bool), pid int) (Service, error) {
	var s Service
	if socket, ok := lookup(envSocket); ok && socket != "" {
		// systemd passes a path or, with a leading @, an abstract name.
		if socket[0] != '/' && socket[0] != '@' {
			return Service{}, fmt.Errorf("%s is neither a path nor an abstract name", envSocket)
		}
		s.socket = socket
	}
	text, ok := lookup(envWatchdog)
	if !ok || text == "" {
		return s, nil
	}
	if owner, ok := lookup(envWatchdogPID); ok && owner != strconv.Itoa(pid) {
		return s, nil // the watchdog is that of another process
	}
	micros, err := strconv.ParseInt(text, 10, 64)
	if err != nil || micros <= 0 || micros > int64(time.Hour/time.Microsecond)*24 {
		return Service{}, fmt.Errorf("%s is no time between 1 µs and a day", envWatchdog)
	}
	s.watchdog = time.Duration(micros) * time.Microsecond
	return s, nil
}

// Watchdog returns how long the service may be silent before systemd ends it; 0
// where nobody watches.
func (s Service) Watchdog() time.Duration { return s.watchdog }

// Status is the assignment of one line that systemctl status shows.
func Status(text string) string {
	return "STATUS=" + strings.Map(func(r rune) rune {
		if r < ' ' {
			return ' ' // a line break would begin another assignment
		}
		return r
	}, text)
}

// Send delivers assignments in one datagram. Without systemd it does nothing.
func (s Service) Send(state ...string) error {
	if s.socket == "" || len(state) == 0 {
		return nil
	}
	message := strings.Join(state, "\n")
	if len(message) > maxState {
		return errors.New("tell systemd: the message is too long")
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: s.socket, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("tell systemd: %w", err)
	}
	if _, err := conn.Write([]byte(message)); err != nil {
		return errors.Join(fmt.Errorf("tell systemd: %w", err), conn.Close())
	}
	if err := conn.Close(); err != nil {
		return fmt.Errorf("tell systemd: %w", err)
	}
	return nil
}

// Without returns the environment env without what systemd meant for this
// process alone.
func Without(env []string) []string {
	var rest []string
	for _, entry := range env {
		name, _, _ := strings.Cut(entry, "=")
		if name != envSocket && name != envWatchdog && name != envWatchdogPID {
			rest = append(rest, entry)
		}
	}
	return rest
}
