package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/watch"
	"github.com/keyhold/keyhold/parent/watch/sdnotify"
)

// defaultLock keeps the starts of one host apart: nitro-cli waits for the signal
// of a booting enclave on one vsock port.
const defaultLock = "/run/keyhold/nitro-cli.lock"

const enclaveLong = `Start one enclave with nitro-cli, watch over it, end it.

nitro-cli run-enclave returns as soon as the enclave boots, and an enclave that
hangs stays RUNNING. So "run" stays, asks the enclave itself every few seconds,
and ends with an error where it is gone or does not answer: keyhold-enclave.service
then starts it again.`

const enclaveRunLong = `Start the enclave and stay with it until SIGTERM, then terminate it.

Before anything is started the image file is measured (nitro-cli describe-eif)
and compared with the measurements, and its size with the memory: an enclave needs
four times its image. Starts that fail because CPUs or memory are not free yet, or
because another enclave of this host starts at the same moment (E36, E39), are
tried again a few times.

Started by systemd (Type=notify) it is ready once the enclave has answered, and
feeds the watchdog after every good round trip and at no other time.

Debug mode is refused. It opens the enclave's console and memory to this host, and
its PCR0 is zero: KMS gives it nothing and no parent works with it. To look at a
boot all the same: --debug-mode ` + watch.DebugWords + `

Every flag can be given as an environment variable: --memory-mib is
KEYHOLD_MEMORY_MIB, and so on; flags win.

Exit codes: 0 ended as it was told, 1 failed, 2 wrong usage.`

// enclaveOptions are the flags of the enclave commands.
type enclaveOptions struct {
	eif          string
	measurements []string
	cid          uint
	cpus         int
	memoryMiB    int
	debug        string
	cli          string
	lock         string
	every        time.Duration
	patience     time.Duration
	boot         time.Duration
	attempts     int
	json         bool
}

func enclaveCommand(log *slog.Logger) *cobra.Command {
	cmd := &cobra.Command{
		Use: "enclave", Short: "Start, watch and end an enclave on this host", Long: enclaveLong, Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(enclaveRun(log), enclaveStatus(), enclaveStop())
	return cmd
}

// with registers the flags that all enclave commands have.
func (o *enclaveOptions) with(cmd *cobra.Command, f func(*cobra.Command) error) *cobra.Command {
	cmd.Args = noArguments
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := fromEnvironment(cmd.Flags(), os.LookupEnv); err != nil {
			return err
		}
		if o.cid < firstCID || o.cid >= cidAny {
			return fmt.Errorf("--enclave-cid must be between %d and %d: %w", firstCID, uint32(cidAny-1), refusal.UsageWrong)
		}
		return f(cmd)
	}
	cmd.Flags().SortFlags = false
	cmd.Flags().UintVar(&o.cid, "enclave-cid", watch.DefaultCID, "vsock `CID` of the enclave")
	cmd.Flags().StringVar(&o.cli, "nitro-cli", "nitro-cli", "nitro-cli `program`")
	return cmd
}

func enclaveRun(log *slog.Logger) *cobra.Command {
	o := &enclaveOptions{}
	cmd := o.with(&cobra.Command{
		Use: "run --eif FILE --measurements FILE", Short: "Start the enclave and watch over it", Long: enclaveRunLong,
		Example: `  keyhold-parent enclave run --eif keyhold.eif --measurements measurements.json
  keyhold-parent enclave run --eif keyhold.eif --measurements measurements.json --memory-mib 2048 --enclave-cid 17`,
	}, func(cmd *cobra.Command) error { return o.run(cmd.Context(), log) })
	f := cmd.Flags()
	f.StringVar(&o.eif, "eif", "", "image `file`")
	f.StringSliceVar(&o.measurements, "measurements", nil, "what the image must measure as: JSON `file` of its build; repeat while rolling")
	f.IntVar(&o.memoryMiB, "memory-mib", watch.DefaultMemoryMiB, "memory of the enclave in `MiB`, at least four times the image")
	f.IntVar(&o.cpus, "cpu-count", watch.DefaultCPUs, "vCPUs of the enclave, whole cores")
	f.IntVar(&o.attempts, "attempts", watch.DefaultAttempts, "how often to try to start it, with doubling waits from 1s")
	f.DurationVar(&o.every, "every", watch.DefaultEvery, "time between two round trips")
	f.DurationVar(&o.patience, "patience", watch.DefaultPatience, "how long it may stay without a good answer")
	f.DurationVar(&o.boot, "boot", watch.DefaultBoot, "the same for the first answer")
	f.StringVar(&o.lock, "lock", defaultLock, "`file` that keeps starts on this host apart; empty for none")
	f.StringVar(&o.debug, "debug-mode", "", "start in debug mode where this is `"+watch.DebugWords+"`")
	return cmd
}

func (o *enclaveOptions) run(ctx context.Context, log *slog.Logger) error {
	service, err := sdnotify.FromEnv(os.LookupEnv, os.Getpid())
	if err != nil {
		return fmt.Errorf("%w: %w", err, refusal.UsageWrong)
	}
	pulse := &watch.Pulse{Dial: dialEnclave(uint32(o.cid)), Logger: log} //nolint:gosec // G115: with bounds it
	defer pulse.Close()
	cfg := watch.Config{
		EIF: o.eif, CID: uint32(o.cid), CPUs: o.cpus, MemoryMiB: o.memoryMiB, Debug: o.debug, //nolint:gosec // G115: with bounds it
		CLI: watch.NitroCLI{Path: o.cli}, Probe: pulse.Probe, Notify: tell(ctx, service, log),
		Attempts: o.attempts, Every: o.every, Patience: o.patience, Boot: o.boot, Logger: log,
	}
	if o.lock != "" {
		cfg.Lock = lockFile(filepath.Clean(o.lock))
	}
	var errs []error
	for _, path := range o.measurements {
		m, err := watch.ReadMeasurements(path)
		if err != nil {
			errs = append(errs, fmt.Errorf("--measurements: %w: %w", err, refusal.UsageWrong))
		}
		cfg.Images = append(cfg.Images, m)
	}
	if err := errors.Join(append(errs, cfg.Validate())...); err != nil {
		return err
	}
	if w := service.Watchdog(); w > 0 && w < o.patience+2*o.every {
		log.WarnContext(ctx, "the watchdog of systemd is shorter than the patience with the enclave", slog.String("watchdog", w.String()), slog.String("patience", o.patience.String()))
	}
	return watch.Run(ctx, cfg)
}

// tell passes what happens to the enclave on to systemd.
func tell(ctx context.Context, service sdnotify.Service, log *slog.Logger) func(watch.Event) {
	states := map[watch.Event][]string{
		watch.Started:  {sdnotify.Ready, sdnotify.Alive, sdnotify.Status("the enclave answers")},
		watch.Answered: {sdnotify.Alive},
		watch.Ending:   {sdnotify.Stopping, sdnotify.Status("ending the enclave")},
	}
	return func(e watch.Event) {
		if err := service.Send(states[e]...); err != nil {
			log.WarnContext(ctx, "systemd not told", slog.Any("error", err))
		}
	}
}

// enclaveState is what status prints.
type enclaveState struct {
	CID       uint   `json:"enclave_cid"`
	ID        string `json:"enclave_id,omitempty"`
	State     string `json:"state"` // as nitro-cli has it, or "absent"
	Debug     bool   `json:"debug"`
	MemoryMiB int    `json:"memory_mib,omitempty"`
	CPUs      int    `json:"cpus,omitempty"`
	PCR0      string `json:"pcr0,omitempty"`
	Answers   bool   `json:"answers"`
	Error     string `json:"error,omitempty"`
}

func enclaveStatus() *cobra.Command {
	o := &enclaveOptions{}
	cmd := o.with(&cobra.Command{
		Use: "status", Short: "Say whether the enclave runs and answers",
		Long: `Say whether the enclave runs, in which mode, and whether it answers a challenge.
Its answer is not verified here: keyhold attest does that.

Exit codes: 0 it runs, not in debug mode, and answers; 1 otherwise.`,
		Example: `  keyhold-parent enclave status
  keyhold-parent enclave status --json`,
	}, func(cmd *cobra.Command) error { return o.status(cmd) })
	cmd.Flags().BoolVar(&o.json, "json", false, "print JSON")
	return cmd
}

func (o *enclaveOptions) status(cmd *cobra.Command) error {
	ctx := cmd.Context()
	s := enclaveState{CID: o.cid, State: "absent"}
	list, err := watch.NitroCLI{Path: o.cli}.Describe(ctx)
	for _, e := range list {
		if e.Name != watch.Name(uint32(o.cid)) { //nolint:gosec // G115: with bounds it
			continue
		}
		s.ID, s.State, s.Debug, s.MemoryMiB, s.CPUs, s.PCR0 = e.ID, e.State, e.Flags != watch.FlagsNone, e.MemoryMiB, e.CPUs, e.Measurements.PCR0
	}
	if s.State == watch.StateRunning {
		pulse := &watch.Pulse{Dial: dialEnclave(uint32(o.cid)), Logger: slog.New(slog.DiscardHandler)} //nolint:gosec // G115: with bounds it
		probed := pulse.Probe(ctx)
		pulse.Close()
		s.Answers = probed == nil
		err = errors.Join(err, probed)
	}
	if err != nil {
		s.Error = err.Error()
	}
	if err := o.print(cmd, s); err != nil {
		return err
	}
	switch {
	case s.State != watch.StateRunning:
		return errors.Join(refusal.EnclaveGone, err)
	case s.Debug:
		return refusal.EnclaveState
	case !s.Answers:
		return errors.Join(refusal.EnclaveWedged, err)
	}
	return nil
}

func (o *enclaveOptions) print(cmd *cobra.Command, s enclaveState) error {
	if o.json {
		if err := json.NewEncoder(cmd.OutOrStdout()).Encode(s); err != nil {
			return fmt.Errorf("print: %w", err)
		}
		return nil
	}
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
	answers := "no"
	if s.Answers {
		answers = "yes"
	}
	mode := "normal"
	if s.Debug {
		mode = "DEBUG: this host reads its memory"
	}
	_, err := fmt.Fprintf(w, "enclave\tCID %d\t%s\nstate\t%s\nmode\t%s\nmemory\t%d MiB\nvCPUs\t%d\nPCR0\t%s\nanswers\t%s\n", s.CID, s.ID, s.State, mode, s.MemoryMiB, s.CPUs, s.PCR0, answers)
	if err = errors.Join(err, w.Flush()); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

func enclaveStop() *cobra.Command {
	o := &enclaveOptions{}
	return o.with(&cobra.Command{
		Use: "stop", Short: "Terminate the enclave",
		Long: `Terminate the enclave with nitro-cli, and wait until it is gone. Where
keyhold-enclave.service runs it, use systemctl stop keyhold-enclave instead, which
lets the parent finish its batches first.`,
		Example: "  keyhold-parent enclave stop --enclave-cid 17",
	}, func(cmd *cobra.Command) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
		defer cancel()
		return watch.Stop(ctx, watch.NitroCLI{Path: o.cli}, uint32(o.cid)) //nolint:gosec // G115: with bounds it
	})
}
