// Package guest is what a program in an enclave image needs besides enclave.Run: console, vsock, the NSM
// device and, as the first process, the work of an init. It refuses to serve in a machine that is not as an
// enclave should be: it says so on the console and switches the machine off.
package guest

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/enclave"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

// program is the guest with its ends given: production's, or a test's.
type program struct {
	init    bool      // the first process of the machine, so its init
	console io.Writer // where the log goes; an init opens /dev/console behind it
	sys     system
	listen  func(port uint32) (net.Listener, error)
	dial    func(ctx context.Context, port uint32) (net.Conn, error) // to the parent instance
	openNSM func() (nsm.Session, error)
	serve   func(context.Context, enclave.Config) error
	pause   time.Duration // between two looks at something that is waited for
	beat    time.Duration // for one try of a heartbeat
}

// Main is the main function of a program in an enclave image, which trusts those roots (PEM) to vouch for KMS.
// It has no flags and reads no environment. It does not return.
func Main(kmsRoots []byte) {
	p := &program{
		init: os.Getpid() == 1, console: os.Stdout, sys: linux(),
		listen: listenVsock, dial: dialParent, openNSM: nsm.Open, serve: enclave.Run,
		pause: 20 * time.Millisecond, beat: 10 * time.Second,
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	code := p.main(ctx, kmsRoots)
	stop()
	os.Exit(code) //nolint:forbidigo,revive // this is main
}

// main runs the program and then, as an init, switches the machine off. It returns the exit code, of which the
// kernel makes a panic where an init is left to exit.
func (p *program) main(ctx context.Context, kmsRoots []byte) int {
	log := newLog(p.console)
	err := survive(func() error { return p.run(ctx, log, kmsRoots) })
	if err != nil {
		log.ErrorContext(ctx, "enclave ended", slog.String("code", string(codeOf(err))), slog.Any("error", err))
	} else {
		log.InfoContext(ctx, "enclave ended")
	}
	if p.init {
		log.InfoContext(ctx, "switching off")
		if err := p.sys.powerOff(); err != nil {
			log.ErrorContext(ctx, "not switched off", slog.Any("error", err))
		}
	}
	if err != nil {
		return 1
	}
	return 0
}

// run brings the machine up and serves until ctx ends.
func (p *program) run(ctx context.Context, log *slog.Logger, kmsRoots []byte) (err error) {
	p.sys.clearEnv() // what kernel or init put there: nothing is configured by it, in no library either
	if p.init {
		defer p.sys.reapOrphans()()
		if err := p.boot(ctx, log); err != nil {
			return err
		}
	} else if err := p.sys.muteCrashes(); err != nil {
		return err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(kmsRoots) {
		return failed(codeRoots, errors.New("the roots of KMS are no certificates"))
	}
	session, err := p.openNSM()
	if err != nil {
		return failed(codeNoNSM, err)
	}
	debug, err := p.askNSM(ctx, session)
	if err != nil {
		// The session stays open: closing it would wait for the answer.
		return failed(code(refusal.NSMFailed), err)
	}
	defer func() { err = errors.Join(err, session.Close()) }()
	log.InfoContext(ctx, "nsm answers", slog.Bool("debug_enclave", debug))
	l, err := p.listen(wire.EnclavePort)
	if err != nil {
		return failed(codeVsock, err)
	}
	log.InfoContext(ctx, "listening", slog.Int("vsock_port", wire.EnclavePort))
	return p.serve(ctx, enclave.Config{
		Listener: l, CheckPeer: fromParent, NSM: session, KMSRoots: roots, Ready: p.ready(log),
		DialKMS: p.port(wire.KMSPort), DialCredentials: p.port(wire.CredsPort), Logger: log,
	})
}

// ready tells the parent instance that this enclave is up, which nitro-cli run-enclave waits for. AWS's init has
// done that before it starts a program.
func (p *program) ready(log *slog.Logger) func(context.Context) error {
	return func(ctx context.Context) error {
		if p.init {
			if err := p.heartbeat(ctx); err != nil {
				return failed(codeHeartbeat, err)
			}
			log.InfoContext(ctx, "heartbeat answered")
		}
		log.InfoContext(ctx, "serving")
		return nil
	}
}

func (p *program) port(port uint32) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) { return p.dial(ctx, port) }
}

// Looks at something that is waited for, before it counts as missing. They are counted, and no clock is read:
// that of a machine under emulation can jump by minutes while nothing else happened.
const (
	deviceLooks = 500  // 10 s, for a device to appear once its driver is loaded
	nsmLooks    = 1500 // 30 s, for the first answer of the NSM, which takes milliseconds; its driver gives up after 120 s
)

// errAway says that something did not come.
var errAway = errors.New("it did not come in time")

func (p *program) await(ctx context.Context, looks int, look func() (bool, error)) error {
	tick := time.NewTicker(p.pause)
	defer tick.Stop()
	for range looks {
		if ok, err := look(); ok || err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return errAway
}

// askNSM asks the NSM for PCR0 and tells whether it is that of debug mode. What follows from that, no key, is
// for enclave.Run to say.
func (p *program) askNSM(ctx context.Context, session nsm.Session) (debug bool, err error) {
	type answer struct {
		value []byte
		err   error
	}
	done := make(chan answer, 1)
	go func() {
		value, _, err := session.DescribePCR(0)
		done <- answer{value, err}
	}()
	var a answer
	err = p.await(ctx, nsmLooks, func() (bool, error) {
		select {
		case a = <-done:
			return true, a.err
		default:
			return false, nil
		}
	})
	if err != nil {
		return false, fmt.Errorf("ask the NSM: %w", err)
	}
	if len(a.value) != nsm.PCRSize {
		return false, fmt.Errorf("ask the NSM: %w", nsm.ErrMalformed)
	}
	return [nsm.PCRSize]byte(a.value) == [nsm.PCRSize]byte{}, nil
}

// errCrashed stands for a panic. Its value is not printed: a library may have put anything into it.
var errCrashed = errors.New("the program crashed")

// survive turns a panic of f's goroutine into an error, so that the machine is switched off in order. A panic
// elsewhere ends the process, and with an init the machine.
func survive(f func() error) (err error) {
	defer func() {
		if recover() != nil {
			err = failed(codeCrashed, errCrashed)
		}
	}()
	return f()
}
