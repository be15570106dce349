package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent"
)

const (
	envPrefix     = "KEYHOLD_"
	envEndpoint   = "KEYHOLD_DYNAMODB_ENDPOINT"
	defaultListen = "127.0.0.1:9464"
)

const long = `keyhold-parent runs on the EC2 host beside its enclaves. It claims batches of
records in DynamoDB, lets an enclave sign them, stores receipts and results, and
carries the enclave's TLS to KMS. It never sees a private key.

Before an enclave gets work it must attest to be one of the wanted images (PCR0)
with exactly this config file (PCR16). It is challenged again every minute.

Every flag can be given as an environment variable: --table-prefix is
KEYHOLD_TABLE_PREFIX, and so on; flags win. KEYHOLD_DYNAMODB_ENDPOINT points at
another DynamoDB than that of the region. AWS credentials come from the usual
places; enclaves get those of the instance role, from IMDSv2 only.

SIGTERM and Ctrl-C end it cleanly: batches in work are finished within a lease,
all others are given back. Started by systemd (Type=notify) it says when it
serves, and feeds the watchdog from its own /readyz.

Two more commands look after the host: "enclave" starts an enclave and watches
over it, "doctor" finds what a host lacks.

Exit codes: 0 ended cleanly, 1 failed, 2 wrong usage.`

const examples = `  # one enclave; the measurements are what nitro-cli build-enclave printed
  keyhold-parent --config keyhold.json --enclave-cid 16 --measurements eif.json

  # two enclaves while a new image is rolled out: both images are wanted
  keyhold-parent --config keyhold.json --enclave-cid 16 --enclave-cid 17 \
    --measurements old.json --measurements new.json

  # the image by its PCR0, tables with a prefix, shorter leases
  keyhold-parent --config keyhold.json --enclave-cid 16 --pcr0 6b1f...e0 \
    --table-prefix prod- --lease 5s

  # is it ready? what does it wait for?
  curl -s ` + defaultListen + `/readyz

  # start the enclave and stay with it, as keyhold-enclave.service does
  keyhold-parent enclave run --eif keyhold.eif --measurements measurements.json

  # what does this host lack?
  keyhold-parent doctor --config keyhold.json --eif keyhold.eif --measurements measurements.json`

// options are the flags.
type options struct {
	region       string
	tablePrefix  string
	config       string
	cids         []uint
	workers      int
	lease        time.Duration
	listen       string
	pcr0         []string
	measurements []string
}

// execute runs the command line and returns the exit code.
func execute(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	log := slog.New(slog.NewJSONHandler(stderr, nil))
	cmd := command(log) //nolint:contextcheck // cobra hands ctx on to RunE
	cmd.SetArgs(args)
	cmd.SetOut(stdout)
	cmd.SetErr(stderr)
	err := cmd.ExecuteContext(ctx)
	code := refusal.Exit(err)
	switch {
	case err == nil, errors.Is(err, refusal.HostUnfit): // the doctor has said it all
	case code == 2:
		// Where stderr is gone the exit code still tells.
		_, _ = fmt.Fprintf(stderr, "keyhold-parent: %v\nRun keyhold-parent --help for usage and examples.\n", err)
	default:
		log.ErrorContext(ctx, "parent failed", slog.String("code", string(refusal.Of(err))), slog.Any("error", err))
	}
	return code
}

func command(log *slog.Logger) *cobra.Command {
	o := &options{}
	cmd := &cobra.Command{
		Use:   "keyhold-parent --config FILE --enclave-cid CID (--pcr0 HEX | --measurements FILE)",
		Short: "Feed Keyhold's enclaves from DynamoDB", Long: long, Example: examples,
		SilenceUsage: true, SilenceErrors: true,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := fromEnvironment(cmd.Flags(), os.LookupEnv); err != nil {
				return err
			}
			if err := o.validate(); err != nil {
				return err
			}
			return run(cmd.Context(), o, log)
		},
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return fmt.Errorf("%w: %w", err, refusal.UsageWrong) })
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&o.config, "config", "", "the measured config `file`, handed to enclaves byte by byte")
	f.UintSliceVar(&o.cids, "enclave-cid", nil, "vsock `CID` of an enclave; repeat for several")
	f.StringSliceVar(&o.measurements, "measurements", nil, "wanted image: JSON `file` that nitro-cli build-enclave printed; repeat while rolling")
	f.StringSliceVar(&o.pcr0, "pcr0", nil, "wanted image: its PCR0 in `hex`; repeat while rolling")
	f.StringVar(&o.region, "region", "", "AWS `region` of the tables (default: that of the environment, else that of the KMS key)")
	f.StringVar(&o.tablePrefix, "table-prefix", "keyhold-", "start of all table names")
	f.IntVar(&o.workers, "workers", parent.DefaultWorkers, "connections to each enclave, two batches in flight on each")
	f.DurationVar(&o.lease, "lease", 0, "how long a claim holds (default: lease.max_ms of the config file)")
	f.StringVar(&o.listen, "listen", defaultListen, "loopback `address` of /metrics, /healthz and /readyz; empty for none")
	cmd.AddCommand(enclaveCommand(log), doctorCommand())
	cmd.CompletionOptions.DisableDefaultCmd = true
	return cmd
}

// noArguments refuses whatever stands behind a command that has flags alone.
func noArguments(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("unexpected argument: everything is a flag: %w", refusal.UsageWrong)
	}
	return nil
}

// fromEnvironment sets each flag that is not given from its variable.
func fromEnvironment(flags *pflag.FlagSet, lookup func(string) (string, bool)) error {
	var errs []error
	flags.VisitAll(func(f *pflag.Flag) {
		name := envPrefix + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		value, ok := lookup(name)
		if f.Changed || !ok || f.Name == "help" {
			return
		}
		if err := flags.Set(f.Name, value); err != nil {
			errs = append(errs, fmt.Errorf("environment variable %s: %w: %w", name, err, refusal.UsageWrong))
		}
	})
	return errors.Join(errs...)
}

// firstCID is the lowest that an enclave can have: 0 to 3 are the hypervisor,
// the machine itself, the host and the parent.
const firstCID = 4

func (o *options) validate() error {
	var errs []error
	bad := func(is bool, text string) {
		if is {
			errs = append(errs, fmt.Errorf("%s: %w", text, refusal.UsageWrong))
		}
	}
	bad(o.config == "", "--config is needed")
	bad(len(o.cids) == 0, "--enclave-cid is needed at least once")
	for i, cid := range o.cids {
		bad(cid < firstCID || cid >= cidAny, fmt.Sprintf("--enclave-cid must be between %d and %d", firstCID, cidAny-1))
		bad(slices.Contains(o.cids[:i], cid), "--enclave-cid names the same enclave twice")
	}
	bad(len(o.pcr0)+len(o.measurements) == 0, "--pcr0 or --measurements is needed: which image is wanted?")
	bad(o.workers < 1, "--workers must be at least 1")
	bad(o.lease < 0, "--lease must not be negative")
	bad(o.listen != "" && !onLoopback(o.listen), "--listen must be a loopback address with a port, as 127.0.0.1:9464: nobody is asked who he is")
	return errors.Join(errs...)
}

func onLoopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}
