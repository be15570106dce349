package guest

import (
	"context"
	"io"
	"net"
	"time"

	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/enclave"
)

// TestingOnlyMachine is what a program runs in. A nil call to the kernel is the real one.
type TestingOnlyMachine struct {
	Init    bool
	Console io.Writer
	Root    string
	Pause   time.Duration
	Beat    time.Duration

	ClearEnv   func()
	Mount      func(source, target, fstype string, flags uintptr, options string) error
	LoadModule func(file string) error
	Redirect   func(file string, flag, fd int) error
	Drain      func()
	Sync       func()
	Restart    func() error

	Listen  func(port uint32) (net.Listener, error)
	Dial    func(ctx context.Context, port uint32) (net.Conn, error)
	OpenNSM func() (nsm.Session, error)
	Serve   func(context.Context, enclave.Config) error
}

// TestingOnlyMain is Main in that machine.
func TestingOnlyMain(ctx context.Context, m *TestingOnlyMachine, kmsRoots []byte) (exit int) {
	s := linux()
	s.root = m.Root
	if m.ClearEnv != nil {
		s.clearEnv = m.ClearEnv
	}
	if m.Mount != nil {
		s.mount = m.Mount
	}
	if m.LoadModule != nil {
		s.loadModule = m.LoadModule
	}
	if m.Redirect != nil {
		s.redirect = m.Redirect
	}
	if m.Drain != nil {
		s.drain = m.Drain
	}
	if m.Sync != nil {
		s.sync = m.Sync
	}
	if m.Restart != nil {
		s.restart = m.Restart
	}
	p := &program{
		init: m.Init, console: m.Console, sys: s, listen: m.Listen, dial: m.Dial, openNSM: m.OpenNSM, serve: m.Serve,
		pause: m.Pause, beat: m.Beat,
	}
	return p.main(ctx, kmsRoots)
}

// TestingOnlyReap lets an init look for children that have ended once.
func TestingOnlyReap(reap func() (found bool)) {
	s := system{reap: reap}
	s.reapOrphans()()
}

// TestingOnlySettings are the names of the kernel's files that are written.
func TestingOnlySettings() []string {
	names := make([]string, len(settings))
	for i, s := range settings {
		names[i] = s.name
	}
	return names
}

// TestingOnlyDialParent dials the parent instance over vsock.
func TestingOnlyDialParent(ctx context.Context, port uint32) (net.Conn, error) {
	return dialParent(ctx, port)
}

// TestingOnlyFromParent is the check of a peer.
func TestingOnlyFromParent(c net.Conn) error { return fromParent(c) }
