// Command soak keeps a whole Keyhold on this machine at work for a time, or for a number of records, kills
// processes of it all the while, and measures what must not grow. In the end the independent checker judges
// the tables. The last line says `soak: pass`, or what grew or was wrong, and then the exit code is 1.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyhold/keyhold/internal/checker"
	"github.com/keyhold/keyhold/internal/e2e/local"
)

// recordsEnv is how many records are signed at most.
const recordsEnv = "KEYHOLD_SOAK_RECORDS"

const (
	parents, enclaves = 4, 2
	workers           = 2 // connections of each parent to each enclave
	keys              = 100
	batchSize         = 50
	chunk             = 5_000 // records of one import
	ahead             = 2     // imports that may be open when the next one comes
	killEvery         = time.Second
	sampleEvery       = 2 * time.Second
	patience          = 10 * time.Minute // for the last records to be signed
)

// settings of a soak.
type settings struct {
	lasts   time.Duration // 0: until all records are signed
	records int
	seed    uint64
	root    string // of the module
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	err := command(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil {
		say(os.Stdout, "soak: FAIL: %s", strings.ReplaceAll(err.Error(), "\n", "; "))
		os.Exit(1) //nolint:forbidigo // it is main
	}
}

// say prints a line. That nobody reads is no reason to stop: the exit code remains.
func say(out io.Writer, format string, args ...any) { _, _ = fmt.Fprintf(out, format+"\n", args...) }

func command(ctx context.Context, args []string, out io.Writer) error {
	s := settings{records: 1_000_000}
	flags := flag.NewFlagSet("soak", flag.ContinueOnError)
	flags.DurationVar(&s.lasts, "time", 0, "how long records are brought in; 0: until there are as many as "+recordsEnv+" says")
	flags.Uint64Var(&s.seed, "seed", 1, "of what is killed when")
	flags.StringVar(&s.root, "root", ".", "folder of the module")
	if err := flags.Parse(args); err != nil {
		return fmt.Errorf("read the flags: %w", err)
	}
	if text := os.Getenv(recordsEnv); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 {
			return fmt.Errorf("%s must be a number of records", recordsEnv)
		}
		s.records = n
	}
	folder, err := os.MkdirTemp("", "keyhold-soak-")
	if err != nil {
		return fmt.Errorf("make a folder: %w", err)
	}
	err = soak(ctx, s, folder, out)
	if err != nil {
		say(out, "the run's folder is kept: %s", folder)
		return err
	}
	return os.RemoveAll(folder)
}

// soak runs the stack, works it, and judges it.
func soak(ctx context.Context, s settings, folder string, out io.Writer) error {
	database, err := local.FindDatabase()
	if err != nil {
		return err
	}
	st := &stack{dir: filepath.Join(folder, "run"), folder: folder}
	if st.program, err = local.Build(ctx, s.root, folder, "keyhold-local"); err != nil {
		return err
	}
	if st.tool, err = local.Build(ctx, s.root, folder, "keyhold"); err != nil {
		return err
	}
	if err := st.up(ctx, database); err != nil {
		return err
	}
	defer st.run.End()
	killer := &local.Killer{
		Dice: rand.New(rand.NewPCG(s.seed, 0)), Every: killEvery, //nolint:gosec // moments, not secrets
		// The first parent and the first enclave live through it all: in them growth would show.
		Victims: []string{"parent-1", "parent-2", "parent-3", "enclave-1", "dynamodb"},
	}
	m := &meter{stack: st}
	err = st.work(ctx, s, killer, m, out)
	if err != nil {
		return err
	}
	st.run.Signal(local.Supervisor, unix.SIGINT)
	if code := st.run.ExitCode(); code != 0 {
		return fmt.Errorf("keyhold-local up ended with %d", code)
	}
	say(out, "the stack has stopped after %d kills; now the checker reads %d records", killer.Total, st.count())
	report, err := st.judge(ctx, database)
	if err != nil {
		return err
	}
	say(out, "%d kills: %v", killer.Total, killer.Killed)
	say(out, "checked: %d records, %d signed, %d refused, %d quarantined; %d batches, %d receipts, %d boots; at most %d older idle keys overtaken",
		report.Records, report.Signed, report.Refused, report.Quarantined, report.Batches, report.Receipts, report.Boots, report.Overtaken)
	figures, grew := m.judge()
	if report.Wrong > 0 {
		grew = errors.Join(fmt.Errorf("the checker found %d faults: %s", report.Wrong, strings.Join(report.Findings, ", ")), grew)
	}
	if report.Records != st.count() {
		grew = errors.Join(fmt.Errorf("%d records were imported, and %d are there", st.count(), report.Records), grew)
	}
	if killer.Total == 0 {
		grew = errors.Join(errors.New("nothing was killed"), grew)
	}
	if grew != nil {
		say(out, "%s", figures)
		return grew
	}
	say(out, "soak: pass: %s, %d records, %d kills; %s", m.lasted().Round(time.Second), report.Records, killer.Total, figures)
	return nil
}

// judge has the tables read by the checker, from a database of its own on the same file.
func (st *stack) judge(ctx context.Context, database string) (checker.Report, error) {
	endpoint, end, err := local.Serve(ctx, database, st.dir)
	if err != nil {
		return checker.Report{}, err
	}
	o, err := st.options(endpoint)
	if err != nil {
		return checker.Report{}, errors.Join(err, end())
	}
	report, err := checker.Run(ctx, o)
	return report, errors.Join(err, end())
}
