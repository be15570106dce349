package watch_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/watch"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// runUntil runs h until it has heard n events, then stops it.
func runUntil(t *testing.T, h *host, n int) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	notify := h.Notify
	h.Notify = func(e watch.Event) {
		notify(e)
		if e != watch.Ending && len(h.heard()) >= n {
			cancel()
		}
	}
	return watch.Run(ctx, h.Config)
}

func TestAnEnclaveIsStartedWatchedAndEnded(t *testing.T) {
	h := newHost(t)
	if err := runUntil(t, h, 4); err != nil {
		t.Fatalf("%v\n%s", err, h.logged())
	}
	run := h.calls("run-enclave")
	want := "run-enclave --enclave-name keyhold-16 --eif-path " + h.EIF + " --enclave-cid 16 --cpu-count 2 --memory 1024"
	if len(run) != 1 || run[0] != want {
		t.Errorf("run-enclave was called as %q, want %q", run, want)
	}
	if n := len(h.calls("terminate-enclave --enclave-id i-0abc-enc1")); n != 1 {
		t.Errorf("terminate-enclave was called %d times", n)
	}
	events := h.heard()
	if events[0] != watch.Started || events[1] != watch.Answered || events[len(events)-1] != watch.Ending {
		t.Errorf("events: %v", events)
	}
}

func TestAStartThatRacesIsTriedAgain(t *testing.T) {
	for _, tt := range []struct {
		name     string
		command  string
		failures string
		runs     int
		want     error
	}{
		{"another start listens for its boot signal", "run-enclave", "E36 E39\n", 2, nil},
		{"the allocator has not given the memory yet", "run-enclave", "E27 E39\nE27 E39\n", 3, nil},
		{"pages of the enclave before are not free yet", "run-enclave", "E29 E39\n", 2, nil},
		{"another enclave of the host is about to end", "describe-enclaves", "E39\n", 1, nil},
		{"it never works", "run-enclave", strings.Repeat("E36 E39\n", 10), watch.DefaultAttempts, refusal.NitroCLI},
		{"too little memory for the image", "run-enclave", "E26 E39\n", 1, refusal.NitroCLI},
		{"a signature that does not verify", "run-enclave", "E59 E39\n", 1, refusal.NitroCLI},
		{"a CPU that is not in the pool", "run-enclave", "E21 E39\n", 1, refusal.NitroCLI},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			h.write("fail-"+tt.command, tt.failures)
			err := runUntil(t, h, 1)
			if !errors.Is(err, tt.want) {
				t.Fatalf("got %v, want %v\n%s", err, tt.want, h.logged())
			}
			if n := len(h.calls("run-enclave")); n != tt.runs {
				t.Errorf("run-enclave was called %d times, want %d", n, tt.runs)
			}
		})
	}
}

func TestOnlyTheMeasuredImageIsStarted(t *testing.T) {
	for _, tt := range []struct {
		name  string
		setup func(*host)
		want  error
	}{
		{"another PCR0", func(h *host) { h.Images = []eif.Measurements{{PCR0: otherPCR}} }, refusal.ImageMismatch},
		{"another PCR2", func(h *host) { h.Images = []eif.Measurements{{PCR0: goodPCR, PCR2: otherPCR}} }, refusal.ImageMismatch},
		{"a file that measures as a debug enclave", func(h *host) {
			h.write("eif.json", strings.Replace(h.read("eif.json"), goodPCR, strings.Repeat("0", 96), 1))
		}, refusal.ImageMismatch},
		{"a file that is not measured", func(h *host) { h.write("fail-describe-eif", "E19\n") }, refusal.NitroCLI},
		{"no file", func(h *host) { h.EIF += ".missing" }, refusal.ImageMismatch},
		{"an empty file", func(h *host) { h.write("image.eif", "") }, refusal.ImageMismatch},
		{"memory below four times the image", func(h *host) {
			h.write("image.eif", strings.Repeat("x", 300<<10))
			h.MemoryMiB = 1
		}, refusal.EnclaveMemory},
		{"no nitro-cli", func(h *host) { h.CLI.Path += ".missing" }, refusal.NitroCLI},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			tt.setup(h)
			if err := watch.Run(t.Context(), h.Config); !errors.Is(err, tt.want) {
				t.Fatalf("got %v, want %v", err, tt.want)
			}
			if n := len(h.calls("run-enclave")); n != 0 {
				t.Errorf("an enclave was started all the same")
			}
		})
	}
}

func TestOneOfTwoWantedImagesIsEnough(t *testing.T) {
	h := newHost(t)
	h.Images = []eif.Measurements{{PCR0: otherPCR}, {PCR0: goodPCR, PCR1: goodPCR}}
	if err := runUntil(t, h, 1); err != nil {
		t.Fatal(err)
	}
}

func TestDebugModeNeedsItsWords(t *testing.T) {
	h := newHost(t)
	h.Debug = "true"
	err := watch.Run(t.Context(), h.Config)
	if !errors.Is(err, refusal.UsageWrong) || !strings.Contains(err.Error(), watch.DebugWords) {
		t.Fatalf("got %v", err)
	}
	h.Debug = watch.DebugWords
	if err := runUntil(t, h, 1); err != nil {
		t.Fatal(err)
	}
	if run := h.calls("run-enclave"); len(run) != 1 || !strings.HasSuffix(run[0], "--debug-mode") {
		t.Errorf("run-enclave was called as %q", run)
	}
	if !strings.Contains(h.logged(), "level=WARN msg=\"DEBUG MODE") {
		t.Error("nobody was told about the debug mode")
	}
}

func TestAnEnclaveThatDoesNotRunAsStartedIsEnded(t *testing.T) {
	for _, tt := range []struct {
		name    string
		started string
		want    error
	}{
		{"in debug mode", enclaveJSON("keyhold-16", 16, "RUNNING", "DEBUG_MODE", goodPCR), refusal.EnclaveState},
		{"with another context id", enclaveJSON("keyhold-16", 17, "RUNNING", "NONE", goodPCR), refusal.EnclaveState},
		{"from another image", enclaveJSON("keyhold-16", 16, "RUNNING", "NONE", otherPCR), refusal.ImageMismatch},
		{"ending", enclaveJSON("keyhold-16", 16, "TERMINATING", "NONE", goodPCR), refusal.EnclaveGone},
		{"gone at once", "[]", refusal.EnclaveGone},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t)
			h.write("started", tt.started)
			if err := watch.Run(t.Context(), h.Config); !errors.Is(err, tt.want) {
				t.Fatalf("got %v, want %v", err, tt.want)
			}
			if left := strings.TrimSpace(h.read("enclaves")); left != "[]" {
				t.Errorf("it was left running: %s", left)
			}
		})
	}
}

func TestAWedgedEnclaveThatStaysRunningIsEnded(t *testing.T) {
	h := newHost(t)
	notify := h.Notify
	h.Notify = func(e watch.Event) {
		notify(e)
		h.hangs.Store(e == watch.Answered)
	}
	err := watch.Run(t.Context(), h.Config)
	if !errors.Is(err, refusal.EnclaveWedged) || !errors.Is(err, errHangs) {
		t.Fatalf("got %v\n%s", err, h.logged())
	}
	if n := len(h.calls("terminate-enclave")); n != 1 {
		t.Errorf("terminate-enclave was called %d times", n)
	}
}

func TestAnEnclaveThatNeverAnswersIsEnded(t *testing.T) {
	h := newHost(t)
	h.hangs.Store(true)
	h.Boot = 50 * time.Millisecond
	if err := watch.Run(t.Context(), h.Config); !errors.Is(err, refusal.EnclaveWedged) {
		t.Fatalf("got %v", err)
	}
	if h.heard() != nil {
		t.Errorf("systemd was told that it is up: %v", h.heard())
	}
}

func TestAnEnclaveThatVanishedIsNoticedAtTheNextRound(t *testing.T) {
	h := newHost(t)
	h.Patience = time.Minute // so that it is not patience that ends it
	notify := h.Notify
	h.Notify = func(e watch.Event) {
		notify(e)
		if e == watch.Answered {
			h.write("enclaves", "[]")
			h.hangs.Store(true)
		}
	}
	if err := watch.Run(t.Context(), h.Config); !errors.Is(err, refusal.EnclaveGone) {
		t.Fatalf("got %v", err)
	}
}

func TestAListThatIsNotWholeProvesNothing(t *testing.T) {
	h := newHost(t)
	var hung bool
	notify := h.Notify
	h.Notify = func(e watch.Event) {
		notify(e)
		if e == watch.Answered && !hung {
			hung = true
			h.write("partial-describe-enclaves", "[]")
			h.write("fail-describe-enclaves", "E39\n")
			h.hangs.Store(true)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	err := watch.Run(ctx, h.Config)
	if !errors.Is(err, refusal.EnclaveWedged) {
		t.Fatalf("an incomplete list was taken for an enclave that is gone: %v", err)
	}
}

func TestWhatWasLeftBehindIsEndedAndAStrangerIsNot(t *testing.T) {
	h := newHost(t)
	h.write("enclaves", enclaveJSON("keyhold-16", 16, "RUNNING", "DEBUG_MODE", otherPCR))
	if err := runUntil(t, h, 1); err != nil {
		t.Fatal(err)
	}
	if n := len(h.calls("terminate-enclave")); n != 2 {
		t.Errorf("terminate-enclave was called %d times, want 2: what was left behind, and the own one", n)
	}
	h = newHost(t)
	h.write("enclaves", enclaveJSON("somebody-else", 16, "RUNNING", "NONE", otherPCR))
	if err := watch.Run(t.Context(), h.Config); !errors.Is(err, refusal.EnclaveState) {
		t.Fatalf("got %v", err)
	}
	if h.calls("terminate-enclave") != nil || h.calls("run-enclave") != nil {
		t.Error("the stranger was touched")
	}
}

func TestBeingStoppedWhileItStartsLeavesNothing(t *testing.T) {
	h := newHost(t)
	h.hangs.Store(true)
	ctx, cancel := context.WithCancel(t.Context())
	h.Probe = func(context.Context) error {
		cancel()
		return errHangs
	}
	if err := watch.Run(ctx, h.Config); err != nil {
		t.Fatal(err)
	}
	if left := strings.TrimSpace(h.read("enclaves")); left != "[]" {
		t.Errorf("left running: %s", left)
	}
}

func TestAnEnclaveThatCannotBeEndedIsAnError(t *testing.T) {
	h := newHost(t)
	h.write("enclaves", enclaveJSON("keyhold-16", 16, "RUNNING", "NONE", goodPCR))
	h.write("keep", "")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := watch.Stop(ctx, h.CLI, 16); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
}

// nitro-cli leaves the process that holds the enclave running behind it.
func TestADaemonThatHoldsThePipesHoldsNothingUp(t *testing.T) {
	h := newHost(t)
	h.write("holds-pipes", "")
	begin := time.Now()
	if err := runUntil(t, h, 1); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took > 20*time.Second {
		t.Errorf("took %v: the daemon sleeps for 30 s", took)
	}
}

func TestStartsOfOneHostWaitForEachOther(t *testing.T) {
	h := newHost(t)
	var held, during bool
	h.Lock = func(context.Context) (func(), error) {
		held = true
		return func() { during, held = len(h.calls("run-enclave")) == 1, false }, nil
	}
	if err := runUntil(t, h, 1); err != nil {
		t.Fatal(err)
	}
	if !during || held {
		t.Error("run-enclave ran outside of the lock, or the lock was kept")
	}
	h = newHost(t)
	h.Lock = func(context.Context) (func(), error) { return nil, errHangs }
	if err := watch.Run(t.Context(), h.Config); !errors.Is(err, errHangs) || h.calls("run-enclave") != nil {
		t.Fatalf("started without the lock: %v", err)
	}
}

func TestSettingsAreCheckedTogether(t *testing.T) {
	err := watch.Run(t.Context(), watch.Config{Every: -1, CPUs: -1})
	for _, want := range []string{"image file", "measurements", "numbers", "times", "round trip"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("nothing is said about %s: %v", want, err)
		}
	}
}
