package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/aws/smithy-go"
	"github.com/mdlayher/vsock"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/doctor"
	"github.com/keyhold/keyhold/parent/egress"
	"github.com/keyhold/keyhold/parent/signclient"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/watch"
)

// envFiles are those that the units read.
var envFiles = []string{"/etc/keyhold/enclave.env", "/etc/keyhold/parent.env"} //nolint:gochecknoglobals // never written

const supervisor = "keyhold-enclave" // user of keyhold-enclave.service

const doctorLong = `Look at this host and say what is missing and what to do next. Nothing is changed.

The settings are those of the services: /etc/keyhold/enclave.env and
/etc/keyhold/parent.env, where they are there; the environment wins over them, and
flags over both. So on an installed host it needs none. Run it as root: some checks
read what others may not.

Each check has an id and ends with ok, warn (look at it), fail, or skip (it could
not be made; the text says why).

Exit codes: 0 nothing failed, 1 something did, 2 wrong usage.`

// doctorOptions are the flags of doctor.
type doctorOptions struct {
	options
	enclaveOptions
	only     []string
	envFiles []string
}

func doctorCommand() *cobra.Command {
	o := &doctorOptions{}
	cmd := &cobra.Command{
		Use: "doctor", Short: "Find what this host lacks", Long: doctorLong, Args: noArguments,
		Example: `  keyhold-parent doctor
  keyhold-parent doctor --json
  keyhold-parent doctor --only image_file,image_memory --eif keyhold.eif --measurements measurements.json
The checks: ` + strings.Join(doctor.IDs(), " "),
		RunE: func(cmd *cobra.Command, _ []string) error {
			lookup, err := fromFiles(o.files(cmd), os.LookupEnv)
			if err != nil {
				return err
			}
			if err := fromEnvironment(cmd.Flags(), lookup); err != nil {
				return err
			}
			return o.examine(cmd)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringSliceVar(&o.only, "only", nil, "`ids` of the checks to make (default: all)")
	f.BoolVar(&o.json, "json", false, "print JSON")
	f.StringSliceVar(&o.envFiles, "env-file", nil, "settings `file`; repeat for several (default: the two of the services)")
	f.StringVar(&o.config, "config", "", "the measured config `file`")
	f.StringVar(&o.eif, "eif", "", "image `file`")
	f.StringSliceVar(&o.options.measurements, "measurements", nil, "wanted image: JSON `file` of its build; repeat while rolling")
	f.StringSliceVar(&o.pcr0, "pcr0", nil, "wanted image: its PCR0 in `hex`; repeat while rolling")
	f.UintVar(&o.cid, "enclave-cid", watch.DefaultCID, "vsock `CID` of the enclave")
	f.IntVar(&o.memoryMiB, "memory-mib", watch.DefaultMemoryMiB, "memory of the enclave in `MiB`")
	f.IntVar(&o.cpus, "cpu-count", watch.DefaultCPUs, "vCPUs of the enclave")
	f.StringVar(&o.region, "region", "", "AWS `region` of the tables (default: as the parent has it)")
	f.StringVar(&o.tablePrefix, "table-prefix", "keyhold-", "start of all table names")
	f.StringVar(&o.listen, "listen", defaultListen, "loopback `address` of the parent's HTTP; empty for none")
	f.StringVar(&o.cli, "nitro-cli", "nitro-cli", "nitro-cli `program`")
	return cmd
}

// files are the settings files to read: those that were named, else those of the
// services that are there.
func (o *doctorOptions) files(cmd *cobra.Command) []string {
	if cmd.Flags().Changed("env-file") {
		return o.envFiles
	}
	var found []string
	for _, path := range envFiles {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			found = append(found, path)
		}
	}
	return found
}

// setting is a line of an environment file as our units have them: no quotes, no
// continued lines.
var setting = regexp.MustCompile(`^([A-Z][A-Z0-9_]*)=([^"'\\]*)$`)

// fromFiles looks a variable up in the environment, then in files.
func fromFiles(paths []string, env func(string) (string, bool)) (func(string) (string, bool), error) {
	values := map[string]string{}
	for _, path := range paths {
		raw, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("settings: %w: %w", err, refusal.UsageWrong)
		}
		lines := bufio.NewScanner(bytes.NewReader(raw))
		for n := 1; lines.Scan(); n++ {
			line := strings.TrimSpace(lines.Text())
			if line == "" || line[0] == '#' || line[0] == ';' {
				continue
			}
			m := setting.FindStringSubmatch(line)
			if m == nil {
				return nil, fmt.Errorf("settings: line %d of %s is not NAME=value without quotes: %w", n, path, refusal.UsageWrong)
			}
			values[m[1]] = m[2]
		}
		if err := lines.Err(); err != nil {
			return nil, fmt.Errorf("settings: %s: %w: %w", path, err, refusal.UsageWrong)
		}
	}
	return func(name string) (string, bool) {
		if value, ok := env(name); ok {
			return value, true
		}
		value, ok := values[name]
		return value, ok
	}, nil
}

func (o *doctorOptions) examine(cmd *cobra.Command) error {
	if o.cid < firstCID || o.cid >= cidAny {
		return fmt.Errorf("--enclave-cid must be between %d and %d: %w", firstCID, uint32(cidAny-1), refusal.UsageWrong)
	}
	s := doctor.Settings{
		PCR0: o.pcr0, CID: uint32(o.cid), MemoryMiB: o.memoryMiB, CPUs: o.cpus, Listen: o.listen, User: supervisor,
	}
	var errs []error
	for from, to := range map[string]*string{o.config: &s.Config, o.eif: &s.EIF} {
		errs = append(errs, absolute(from, to))
	}
	for _, path := range o.options.measurements {
		s.Measurements = append(s.Measurements, "")
		errs = append(errs, absolute(path, &s.Measurements[len(s.Measurements)-1]))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	report, err := doctor.Run(cmd.Context(), o.host(), s, o.only)
	if err != nil {
		return err
	}
	printed := report.Print
	if o.json {
		printed = report.JSON
	}
	if err := printed(cmd.OutOrStdout()); err != nil {
		return err
	}
	return report.Err()
}

func absolute(from string, to *string) error {
	if from == "" {
		return nil
	}
	path, err := filepath.Abs(from)
	if err != nil {
		return fmt.Errorf("find %s: %w", from, err)
	}
	*to = path
	return nil
}

// host is this machine.
func (o *doctorOptions) host() doctor.Host {
	quiet := slog.New(slog.DiscardHandler)
	cli := watch.NitroCLI{Path: o.cli}
	metadata := &http.Client{
		Transport:     &http.Transport{DialContext: (&net.Dialer{Timeout: 2 * time.Second}).DialContext, DisableKeepAlives: true},
		Timeout:       5 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	told := reporter{listen: o.listen, log: quiet}
	return doctor.Host{
		Files: os.DirFS("/"), NitroVersion: cli.Version, Enclaves: cli.Describe, Measure: measureEIF,
		LocalCID: vsock.ContextID, Probe: o.probe, HTTP: metadata.Do, Credentials: expiry,
		Tables: o.checkTables, TLS: handshake,
		Listen: func(ctx context.Context, address string) error {
			var lc net.ListenConfig
			ln, err := lc.Listen(ctx, "tcp", address)
			if err != nil {
				return fmt.Errorf("listen: %w", err)
			}
			return ln.Close()
		},
		Ready: func(ctx context.Context, _ string) (string, error) { return told.ask(ctx) },
		Disk:  freeBytes, OpenFiles: hardLimit,
	}
}

// measureEIF reads and measures an image file with Keyhold's own code: the
// supervisor asks nitro-cli, so two programs look at it.
func measureEIF(_ context.Context, path string) (eif.Measurements, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return eif.Measurements{}, fmt.Errorf("image: %w", err)
	}
	img, err := eif.Parse(raw)
	if err != nil {
		return eif.Measurements{}, fmt.Errorf("image: %w", err)
	}
	m, err := img.Measure()
	if err != nil {
		return eif.Measurements{}, fmt.Errorf("image: %w", err)
	}
	return m, nil
}

// probe challenges the enclave and reads its clock.
func (o *doctorOptions) probe(ctx context.Context) (time.Time, error) {
	dial := dialEnclave(uint32(o.cid)) //nolint:gosec // G115: examine checked it
	pulse := &watch.Pulse{Dial: dial, Logger: slog.New(slog.DiscardHandler)}
	defer pulse.Close()
	if err := pulse.Probe(ctx); err != nil {
		return time.Time{}, err
	}
	c, err := signclient.Connect(ctx, dial, signclient.Options{})
	if err != nil {
		return time.Time{}, nil // it answers, and has no connection to spare
	}
	defer c.Close()
	status, err := c.Status(ctx)
	if err != nil {
		return time.Time{}, err
	}
	if status.State == wire.StateWaiting {
		return time.Time{}, nil // its clock comes from its first document
	}
	return time.UnixMilli(status.TimeMS), nil
}

func expiry(ctx context.Context) (time.Time, error) {
	return egress.InstanceRole("", nil).Expires(ctx)
}

// checkTables asks for the tables as the parent does.
func (o *doctorOptions) checkTables(ctx context.Context) error {
	parsed := &config.Config{}
	if raw, err := os.ReadFile(o.config); err == nil {
		if p, err := config.Parse(raw); err == nil {
			parsed = p
		}
	}
	client, err := o.connect(ctx, parsed)
	if err != nil {
		return err
	}
	err = client.CheckTables(ctx)
	var api smithy.APIError
	switch {
	case errors.Is(err, store.ErrNoTables):
		return fmt.Errorf("%w: %w", refusal.TablesMissing, err)
	case errors.As(err, &api) && strings.Contains(api.ErrorCode(), "AccessDenied"):
		return fmt.Errorf("%w: %w", refusal.StoreDenied, err)
	}
	return err
}

// handshake makes a TLS connection that the enclave would make as well, with the
// roots of this host.
func handshake(ctx context.Context, host string) error {
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: 5 * time.Second}, Config: &tls.Config{MinVersion: tls.VersionTLS12, ServerName: host}}
	conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort(host, "443"))
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	return conn.Close()
}

func freeBytes(path string) (uint64, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(path, &s); err != nil {
		return 0, fmt.Errorf("statfs: %w", err)
	}
	return s.Bavail * uint64(s.Bsize), nil //nolint:gosec // G115: a block size
}

func hardLimit() (uint64, error) {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 0, fmt.Errorf("getrlimit: %w", err)
	}
	return l.Max, nil
}
