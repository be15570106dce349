package cli_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/aws/smithy-go"
	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/store"
)

// tool is a command tree whose one command ends with err.
func tool(stderr io.Writer, err error, args ...string) *cobra.Command {
	root := &cobra.Command{Use: "tool"}
	noun := &cobra.Command{Use: "noun"}
	verb := &cobra.Command{Use: "verb", Args: cobra.NoArgs, RunE: func(*cobra.Command, []string) error { return err }}
	verb.Flags().Int("number", 0, "")
	verb.Flags().Int("needed", 0, "")
	if err := verb.MarkFlagRequired("needed"); err != nil {
		panic(err)
	}
	noun.AddCommand(verb)
	root.AddCommand(noun)
	root.SetArgs(args)
	root.SetErr(stderr)
	root.SetOut(io.Discard)
	return root
}

func TestACommandEndsWithTheCodeOfItsError(t *testing.T) {
	run := []string{"noun", "verb", "--needed", "1"}
	for _, tc := range []struct {
		name string
		err  error
		args []string
		exit int
		says string
	}{
		{name: "done", args: run},
		{name: "help is no error", args: []string{"noun", "verb", "--help"}},
		{name: "an error of no code", err: errors.New("broken"), args: run, exit: 1, says: "tool: broken\n"},
		{name: "a code of the table", err: fmt.Errorf("do it: %w", refusal.DirBusy), args: run, exit: 1, says: "wait for it or stop it"},
		{name: "some refused", err: fmt.Errorf("run: %w", refusal.SomeRefused), args: run, exit: 3, says: "some records were refused"},
		{name: "a code with a text of its own", err: cli.Errorf(refusal.SomeRefused, "two of them"), args: run, exit: 3, says: "tool: two of them\n"},
		{name: "usage, found by the command", err: cli.Usagef("--a and --b"), args: run, exit: 2, says: "tool: --a and --b\nRun 'tool noun verb --help'"},
		{name: "unknown flag", args: append(run, "--bogus"), exit: 2, says: "unknown flag: --bogus"},
		{name: "flag of another type", args: append(run, "--number", "x"), exit: 2, says: "invalid argument"},
		{name: "missing flag", args: run[:2], exit: 2, says: `"needed" not set`},
		{name: "argument too many", args: append(run, "x"), exit: 2, says: "unknown command \"x\" for \"tool noun verb\""},
		{name: "unknown command", args: []string{"nuon"}, exit: 2, says: "unknown command"},
		{name: "unknown subcommand", args: []string{"noun", "vreb"}, exit: 2, says: `unknown command "vreb" for "tool noun"`},
		{name: "group alone", args: []string{"noun"}, exit: 2, says: "tool noun: want one of verb"},
		{name: "tables missing", err: fmt.Errorf("read: %w", store.ErrNoTables), args: run, exit: 1, says: "run keyhold tables create"},
		{name: "throttled", err: fmt.Errorf("read: %w", store.ErrThrottled), args: run, exit: 1, says: "store_unreachable"},
		{name: "a 500 of the database", err: fmt.Errorf("read: %w", &smithy.GenericAPIError{Code: "InternalServerError", Fault: smithy.FaultServer}), args: run, exit: 1, says: "store_unreachable"},
		{name: "expired credentials", err: fmt.Errorf("read: %w", &smithy.GenericAPIError{Code: "ExpiredTokenException", Fault: smithy.FaultClient}), args: run, exit: 1, says: "store_denied"},
		{name: "full disk", err: &os.PathError{Op: "write", Path: "f", Err: syscall.ENOSPC}, args: run, exit: 1, says: "disk_full"},
		{name: "port in use", err: &net.OpError{Op: "listen", Err: os.NewSyscallError("bind", syscall.EADDRINUSE)}, args: run, exit: 1, says: "port_in_use"},
		{name: "stopped", err: fmt.Errorf("sign: %w", context.Canceled), args: run, exit: 1, says: "tool: stopped by a signal"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var stderr bytes.Buffer
			if got := cli.Run(t.Context(), tool(&stderr, tc.err, tc.args...)); got != tc.exit {
				t.Errorf("exit code %d, want %d", got, tc.exit)
			}
			if !strings.Contains(stderr.String(), tc.says) {
				t.Errorf("said %q, want %q", stderr.String(), tc.says)
			}
			if tc.exit == 0 && stderr.Len() > 0 {
				t.Errorf("said %q on stderr", stderr.String())
			}
			if n := strings.Count(stderr.String(), "tool: "); tc.exit != 0 && n != 1 && tc.name != "group alone" {
				t.Errorf("said it %d times: %q", n, stderr.String())
			}
		})
	}
}

func TestProgressWritesFewPlainLines(t *testing.T) {
	now := time.Unix(0, 0)
	var out bytes.Buffer
	p := cli.TestingOnlyProgress(&out, "signing", 100, func() time.Time { return now })
	p.From(20)
	for done := 20; done <= 60; done += 10 {
		p.Set(done)
		now = now.Add(time.Second)
	}
	p.Set(50) // never back
	p.Finish()
	p.Finish()
	p.Set(100)
	want := "signing: 40 of 100 (40.0%), 10/s, 6s left\n" +
		"signing: 60 of 100 (60.0%), 10/s, 4s left\n" +
		"signing: 60 of 100 (60.0%), 8.0/s, took 5s\n"
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Error(diff)
	}
}

func TestProgressOfAnUnknownTotalCounts(t *testing.T) {
	now := time.Unix(0, 0)
	var out bytes.Buffer
	p := cli.TestingOnlyProgress(&out, "reading", 0, func() time.Time { return now })
	now = now.Add(4 * time.Second)
	p.Set(100)
	p.SetTotal(200)
	now = now.Add(4 * time.Second)
	p.Set(200)
	p.Finish()
	want := "reading: 100, 25/s\nreading: 200 of 200 (100.0%), 25/s\nreading: 200 of 200 (100.0%), 25/s, took 8s\n"
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Error(diff)
	}
}

func TestAnOutputFileAppearsWholeOrNotAtAll(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "out")
	failed := errors.New("half way")
	err := cli.WriteOutput(path, nil, func(w io.Writer) error {
		if _, err := io.WriteString(w, "half"); err != nil {
			return err
		}
		return failed
	})
	if !errors.Is(err, failed) {
		t.Errorf("got %v, want %v", err, failed)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left behind %v", left)
	}
	for _, text := range []string{"first", "second"} {
		err := cli.WriteOutput(path, nil, func(w io.Writer) error {
			_, err := io.WriteString(w, text)
			return err
		})
		got, rerr := os.ReadFile(path)
		if err != nil || rerr != nil || string(got) != text {
			t.Errorf("wrote %q, %v, %v; want %q", got, err, rerr, text)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left behind %v", left)
	}
}

func TestEnclaveAddresses(t *testing.T) {
	for _, tc := range []struct {
		address string
		good    bool
	}{
		{"vsock:16", true},
		{"vsock:4:5001", true},
		{"unix:/run/e.sock", true},
		{"unix:a:b", true},
		{"", false},
		{"unix:", false},
		{"vsock:", false},
		{"vsock:3", false},
		{"vsock:-1", false},
		{"vsock:4294967296", false},
		{"vsock:16:0", false},
		{"vsock:16:", false},
		{"vsock:16:1:2", false},
		{"tcp:h:1", false},
		{"16", false},
	} {
		dial, err := cli.ParseEnclave(tc.address)
		if (err == nil) != tc.good || (dial != nil) != tc.good {
			t.Errorf("%q: %v", tc.address, err)
		}
		if err != nil && refusal.Exit(err) != 2 {
			t.Errorf("%q: exit code %d, want that of wrong usage", tc.address, refusal.Exit(err))
		}
	}
}

func TestAUnixEnclaveIsReached(t *testing.T) {
	path := filepath.Join(t.TempDir(), "e.sock")
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	dial, err := cli.ParseEnclave("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
}

func TestVsockDialEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if conn, err := cli.DialVsock(1<<20, 5000)(ctx); err == nil {
		conn.Close()
		t.Error("reached an enclave that is not there")
	}
}

// measurements writes a file as nitro-cli prints it, edited.
func measurements(t *testing.T, old, repl string) (path string) {
	t.Helper()
	text := `{"EifVersion": 4, "IsSigned": true, "Measurements": {"HashAlgorithm": "Sha384 { ... }", "PCR0": "` + strings.Repeat("11", 48) +
		`", "PCR1": "` + strings.Repeat("22", 48) + `", "PCR2": "` + strings.Repeat("33", 48) + `", "PCR8": "` + strings.Repeat("88", 48) + `"}}`
	path = filepath.Join(t.TempDir(), "eif.json")
	if err := os.WriteFile(path, []byte(strings.Replace(text, old, repl, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestMeasurementsTakeTheRegistersThatNitroPrints(t *testing.T) {
	pcr := func(b byte) []byte { return bytes.Repeat([]byte{b}, 48) }
	o := cli.AttestOptions{PCR0: []string{strings.Repeat("22", 48)}, Measurements: measurements(t, "", "")}
	got, err := o.Images()
	if err != nil {
		t.Fatal(err)
	}
	want := []attestation.Image{
		{PCRs: map[int][]byte{0: pcr(0x22)}},
		{PCRs: map[int][]byte{0: pcr(0x11), 1: pcr(0x22), 2: pcr(0x33), 8: pcr(0x88)}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	unsigned := cli.AttestOptions{Measurements: measurements(t, `, "PCR8": "`+strings.Repeat("88", 48)+`"`, "")}
	if got, err = unsigned.Images(); err != nil || len(got) != 1 || got[0].PCRs[8] != nil || len(got[0].PCRs) != 3 {
		t.Errorf("of an image without signature: %v, %v", got, err)
	}
}

func TestMeasurementsOfAnotherFormAreRefused(t *testing.T) {
	for _, tc := range []struct{ name, old, repl string }{
		{"another hash", "Sha384 {", "Sha256 {"},
		{"an unknown register", "PCR8", "PCR9"},
		{"no PCR1", `"PCR1": "` + strings.Repeat("22", 48) + `", `, ""},
		{"a debug enclave's", strings.Repeat("11", 48), strings.Repeat("00", 48)},
	} {
		o := cli.AttestOptions{Measurements: measurements(t, tc.old, tc.repl)}
		if _, err := o.Images(); !errors.Is(err, refusal.UsageWrong) || !errors.Is(err, eif.BadMeasurements) {
			t.Errorf("%s: got %v", tc.name, err)
		}
	}
}

func TestWithoutATestRootOnlyAmazonIsTrusted(t *testing.T) {
	var warned bytes.Buffer
	o := cli.AttestOptions{}
	root, err := o.Root(&warned)
	if err != nil || root != attestation.AWSRoot() || warned.Len() > 0 {
		t.Errorf("root %v, %v, warned %q", root, err, warned.String())
	}
}

func TestASignalEndsACommandWithItsOwnWords(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("interrupt"))
	var stderr bytes.Buffer
	root := &cobra.Command{Use: "tool", RunE: func(c *cobra.Command, _ []string) error {
		return fmt.Errorf("wait: %w", context.Cause(c.Context()))
	}}
	root.SetErr(&stderr)
	root.SetArgs([]string{})
	if got := cli.Run(ctx, root); got != 1 || !strings.HasPrefix(stderr.String(), "tool: stopped by a signal") {
		t.Errorf("exit code %d, said %q", got, stderr.String())
	}
}
