// Package watch starts one Nitro enclave with nitro-cli and watches over it until
// it is told to stop. It refuses an image other than the measured one, and debug
// mode unless that was asked for in so many words.
package watch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/refusal"
)

// Defaults of Config.
const (
	DefaultCID        = 16
	DefaultCPUs       = 2    // a c6a.xlarge has 4 and gives 2 to the enclave
	DefaultMemoryMiB  = 1024 // four times an image of 256 MiB
	DefaultAttempts   = 6    // with the waits between them half a minute and more: an allocator that starts late is ready by then
	DefaultRetryFirst = time.Second
	DefaultEvery      = 5 * time.Second
	DefaultPatience   = 45 * time.Second // longer than three answers that each take the client's whole time-out
	DefaultBoot       = 90 * time.Second // from boot signal to first answer
)

// DebugWords is what Config.Debug must hold to start an enclave in debug mode.
const DebugWords = "yes-this-enclave-has-no-secrets"

// describeEvery is how many rounds lie between two looks at describe-enclaves
// while the enclave answers.
const describeEvery = 12

// lastWords is how long ending the enclave may take once Run was told to stop.
const lastWords = 60 * time.Second

// Config is everything that Run needs.
type Config struct {
	// EIF is the image file, and Images what it may measure as: one, or two while
	// an upgrade is rolled out.
	EIF    string
	Images []eif.Measurements
	// CID is the enclave's vsock context id. 0 is DefaultCID.
	CID uint32
	// CPUs and MemoryMiB are the enclave's share of the host. 0: the defaults.
	CPUs      int
	MemoryMiB int
	// Debug starts the enclave in debug mode where it is DebugWords: its console
	// and its memory are open to the host, its PCR0 is zero, and neither KMS nor
	// a parent works with it.
	Debug string

	CLI NitroCLI
	// Probe makes one round trip to the enclave and returns nil where it answered
	// well. An enclave that hangs stays RUNNING: only this tells.
	Probe func(context.Context) error
	// Lock keeps other run-enclaves of this host waiting until unlock is called:
	// two at the same time fail with E36. Nil: there are none.
	Lock func(context.Context) (unlock func(), err error)
	// Notify is called with Started, with Answered after each good round trip,
	// and with Ending. Nil: nobody wants to know.
	Notify func(Event)

	// Attempts bounds how often run-enclave is tried, RetryFirst is the wait after
	// the first; it doubles. 0: the defaults.
	Attempts   int
	RetryFirst time.Duration
	// Every is the time between two round trips, Patience how long the enclave may
	// stay without a good one, Boot the same for the first. 0: the defaults.
	Every, Patience, Boot time.Duration
	// Logger is told what happens. Nil: nobody is.
	Logger *slog.Logger
}

// Event is what Notify is told.
type Event int

// The events.
const (
	Started  Event = iota // the enclave has answered for the first time
	Answered              // a later round trip went well
	Ending                // the enclave is about to be ended
)

// Validate reports everything that is wrong with c.
func (c *Config) Validate() error {
	var errs []error
	bad := func(is bool, text string) {
		if is {
			errs = append(errs, fmt.Errorf("%s: %w", text, refusal.UsageWrong))
		}
	}
	bad(c.EIF == "", "an image file is needed")
	bad(len(c.Images) == 0, "the measurements of the wanted image are needed")
	bad(c.CPUs < 0 || c.MemoryMiB < 0 || c.Attempts < 0, "numbers must not be negative")
	bad(c.Every < 0 || c.Patience < 0 || c.Boot < 0 || c.RetryFirst < 0, "times must not be negative")
	bad(c.Probe == nil, "a round trip is needed")
	bad(c.Debug != "" && c.Debug != DebugWords, "debug mode opens the enclave's memory to this host: it starts only where the setting reads "+DebugWords)
	return errors.Join(errs...)
}

func (c Config) withDefaults() Config {
	number := func(n *int, d int) {
		if *n == 0 {
			*n = d
		}
	}
	duration := func(v *time.Duration, d time.Duration) {
		if *v == 0 {
			*v = d
		}
	}
	if c.CID == 0 {
		c.CID = DefaultCID
	}
	number(&c.CPUs, DefaultCPUs)
	number(&c.MemoryMiB, DefaultMemoryMiB)
	number(&c.Attempts, DefaultAttempts)
	duration(&c.RetryFirst, DefaultRetryFirst)
	duration(&c.Every, DefaultEvery)
	duration(&c.Patience, DefaultPatience)
	duration(&c.Boot, DefaultBoot)
	if c.Lock == nil {
		c.Lock = func(context.Context) (func(), error) { return func() {}, nil }
	}
	if c.Notify == nil {
		c.Notify = func(Event) {}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// Name is what an enclave of Keyhold with that context id is called on its host.
func Name(cid uint32) string { return fmt.Sprintf("keyhold-%d", cid) }

// Run starts the enclave and returns nil once ctx has ended and the enclave was
// terminated. It returns an error, with no enclave left behind as far as
// nitro-cli lets it, where the enclave could not be started, ended by itself
// (refusal.EnclaveGone), or stopped answering (refusal.EnclaveWedged).
func Run(ctx context.Context, c Config) error {
	if err := c.Validate(); err != nil {
		return err
	}
	w := &watcher{Config: c.withDefaults()}
	if err := w.checkImage(ctx); err != nil {
		return err
	}
	if err := w.start(ctx); err != nil {
		return errors.Join(stopped(ctx, err), w.end(ctx))
	}
	err := w.watch(ctx)
	w.Notify(Ending)
	return errors.Join(stopped(ctx, err), w.end(ctx))
}

// stopped drops an error that says no more than that ctx ended.
func stopped(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		return err
	}
	return nil
}

// watcher is one Run.
type watcher struct {
	Config
	id string // of the enclave; empty before it runs
}

// checkImage compares the image file with the wanted measurements, as nitro-cli
// measures it. What really counts comes later, by attestation; this finds a
// mistake before an enclave is started, and names it.
func (w *watcher) checkImage(ctx context.Context) error {
	if err := checkMemory(w.EIF, w.MemoryMiB); err != nil {
		return err
	}
	got, err := w.CLI.DescribeEIF(ctx, w.EIF)
	if err != nil {
		return fmt.Errorf("measure the image file: %w", err)
	}
	if !w.wanted(got) {
		return fmt.Errorf("%w: it measures as PCR0 %s", refusal.ImageMismatch, got.PCR0)
	}
	w.Logger.InfoContext(ctx, "image measured", slog.String("pcr0", got.PCR0))
	return nil
}

func (w *watcher) wanted(m eif.Measurements) bool {
	for _, want := range w.Images {
		if Same(m, want) {
			return true
		}
	}
	return false
}

// start runs the enclave and waits for its first answer.
func (w *watcher) start(ctx context.Context) error {
	unlock, err := w.Lock(ctx)
	if err != nil {
		return fmt.Errorf("wait for other starts on this host: %w", err)
	}
	err = w.launch(ctx)
	unlock()
	if err != nil {
		return err
	}
	if err := w.look(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, w.Boot, refusal.EnclaveWedged)
	defer cancel()
	for {
		err := w.Probe(ctx)
		if err == nil {
			w.Logger.InfoContext(ctx, "enclave answers", slog.String("enclave_id", w.id))
			w.Notify(Started)
			return nil
		}
		w.Logger.DebugContext(ctx, "no answer yet", slog.Any("error", err))
		if gone := w.look(ctx); gone != nil && ctx.Err() == nil {
			return gone // it powered itself off while it booted
		}
		if waited := pause(ctx, w.RetryFirst); waited != nil {
			return fmt.Errorf("wait for the first answer: %w: %w", waited, err)
		}
	}
}

// launch calls run-enclave until it succeeds, the attempts are used up, or the
// answer is that trying again is of no use.
func (w *watcher) launch(ctx context.Context) error {
	wait := w.RetryFirst
	for attempt := 1; ; attempt++ {
		err := w.attempt(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if attempt >= w.Attempts || !mayHelp(err) {
			return fmt.Errorf("start the enclave, attempt %d of %d: %w", attempt, w.Attempts, err)
		}
		w.Logger.WarnContext(ctx, "enclave not started, trying again", slog.Int("attempt", attempt), slog.Any("codes", codes(err)), slog.Int64("wait_ms", wait.Milliseconds()))
		if err := pause(ctx, wait); err != nil {
			return err
		}
		wait *= 2
	}
}

// attempt makes room where an enclave of ours was left behind, and starts one.
func (w *watcher) attempt(ctx context.Context) error {
	list, err := w.CLI.Describe(ctx)
	if err != nil {
		return err
	}
	for _, e := range list {
		if e.Name != Name(w.CID) {
			if e.CID == w.CID {
				return fmt.Errorf("context id %d is taken: %w", w.CID, refusal.EnclaveState)
			}
			continue
		}
		w.Logger.WarnContext(ctx, "enclave left behind is ended", slog.String("enclave_id", e.ID))
		if err := w.CLI.Terminate(ctx, e.ID); err != nil {
			return err
		}
	}
	if w.Debug != "" {
		w.Logger.WarnContext(ctx, "DEBUG MODE: this host reads the enclave's console and memory, and neither KMS nor a parent will work with it")
	}
	return w.CLI.run(ctx, launch{name: Name(w.CID), eif: w.EIF, cid: w.CID, cpus: w.CPUs, memoryMiB: w.MemoryMiB, debug: w.Debug != ""})
}

// look finds the enclave in describe-enclaves and refuses one that does not run
// as it was started. A list that nitro-cli could not complete proves nothing.
func (w *watcher) look(ctx context.Context) error {
	list, err := w.CLI.Describe(ctx)
	for _, e := range list {
		if e.Name != Name(w.CID) {
			continue
		}
		w.id = e.ID
		return w.judge(e)
	}
	if err != nil {
		w.Logger.DebugContext(ctx, "enclaves not listed", slog.Any("codes", codes(err)))
		return nil
	}
	return refusal.EnclaveGone
}

func (w *watcher) judge(e Enclave) error {
	flags := FlagsNone
	if w.Debug != "" {
		flags = FlagsDebug
	}
	switch {
	case e.State != StateRunning:
		return refusal.EnclaveGone
	case e.CID != w.CID:
		return fmt.Errorf("it has another context id: %w", refusal.EnclaveState)
	case e.Flags != flags:
		return fmt.Errorf("its debug mode is not what was asked for: %w", refusal.EnclaveState)
	case e.Measurements.PCR0 != "" && !w.wanted(e.Measurements):
		return fmt.Errorf("the image was exchanged while it was started: %w", refusal.ImageMismatch)
	}
	return nil
}

// watch returns when ctx ends, the enclave is gone, or it has not answered well
// for as long as Patience.
func (w *watcher) watch(ctx context.Context) error {
	last := time.Now()
	for round := 1; ; round++ {
		if err := pause(ctx, w.Every); err != nil {
			return err
		}
		err := w.probe(ctx, w.Patience-time.Since(last))
		if err == nil {
			last = time.Now()
			w.Notify(Answered)
		} else if ctx.Err() == nil {
			w.Logger.WarnContext(ctx, "enclave does not answer", slog.Int64("since_ms", time.Since(last).Milliseconds()), slog.Any("error", err))
		}
		if err != nil || round%describeEvery == 0 {
			if gone := w.look(ctx); gone != nil {
				return gone
			}
		}
		if err != nil && time.Since(last) >= w.Patience {
			return fmt.Errorf("%w: %w", refusal.EnclaveWedged, err)
		}
		if w.Debug != "" && round%describeEvery == 0 {
			w.Logger.WarnContext(ctx, "DEBUG MODE: this enclave has no secrets from this host")
		}
	}
}

// probe gives one round trip no more time than the enclave has left, or that of a
// round where this process itself was late.
func (w *watcher) probe(ctx context.Context, left time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, max(left, w.Every))
	defer cancel()
	return w.Probe(ctx)
}

// end terminates what runs under our name, also when ctx has ended.
func (w *watcher) end(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastWords)
	defer cancel()
	return Stop(ctx, w.CLI, w.CID)
}

// Stop terminates the enclave of Keyhold with that context id. Nil means that
// nitro-cli lists none any more.
func Stop(ctx context.Context, cli NitroCLI, cid uint32) error {
	wait := DefaultRetryFirst
	for attempt := 1; ; attempt++ {
		left, err := stopOnce(ctx, cli, cid)
		switch {
		case err == nil && !left:
			return nil
		case err == nil && attempt == 1:
			continue // it was ended: look whether that is so
		case !left && !mayHelp(err):
			return fmt.Errorf("end the enclave: %w", err)
		}
		if waited := pause(ctx, wait); waited != nil {
			return fmt.Errorf("end the enclave: %w", errors.Join(waited, err))
		}
		wait = min(2*wait, 8*DefaultRetryFirst)
	}
}

// stopOnce tells whether an enclave was there.
func stopOnce(ctx context.Context, cli NitroCLI, cid uint32) (found bool, err error) {
	list, err := cli.Describe(ctx)
	for _, e := range list {
		if e.Name == Name(cid) {
			return true, errors.Join(err, cli.Terminate(ctx, e.ID))
		}
	}
	return false, err
}

// codes are those that nitro-cli printed.
func codes(err error) []string {
	var e *CLIError
	if errors.As(err, &e) {
		return e.Codes
	}
	return nil
}

// pause waits for d, or returns why ctx ended.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
