// Command bench prints the figures of docs/performance.md, each as a ratio of
// two things measured in one run, with the raw figures beside it. It ends with
// exit code 1 where a ratio passes its limit.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"text/tabwriter"
)

// row is one figure. atMost and atLeast are limits, 0 where there is none.
type row struct {
	name    string
	value   float64
	unit    string // "x" for ratios
	atMost  float64
	atLeast float64
	raw     string // what the value was made of
}

func (r row) holds() bool {
	return (r.atMost == 0 || r.value <= r.atMost) && (r.atLeast == 0 || r.value >= r.atLeast)
}

func (r row) limit() string {
	switch {
	case r.atMost != 0:
		return fmt.Sprintf("<= %g", r.atMost)
	case r.atLeast != 0:
		return fmt.Sprintf(">= %g", r.atLeast)
	}
	return ""
}

// measures in the order in which they are printed.
//
//nolint:gochecknoglobals // a table
var measures = []struct {
	name string
	run  func(context.Context, options) ([]row, error)
}{
	{"enclave", enclaveCPU},
	{"open", openKeyring},
	{"wire", wireShare},
	{"units", writeUnits},
	{"pick", keyPick},
	{"run", wholeRun},
}

// options of a run of bench.
type options struct {
	local string // path of keyhold-local
	small int    // records of the run that is compared with the bare loop
	large int    // records of the long run
	pool  int    // keys of the large pool
	log   io.Writer
}

// say tells whoever waits what is being measured.
func (o options) say(format string, args ...any) { _, _ = fmt.Fprintf(o.log, format+"\n", args...) }

var errLimit = errors.New("a figure passes its limit")

func main() {
	var o options
	only := flag.String("only", "", "comma-separated names of the measures to run: enclave, open, wire, units, pick, run")
	flag.StringVar(&o.local, "local", "bin/keyhold-local", "path of keyhold-local")
	flag.IntVar(&o.small, "records", 100_000, "records of the compared run")
	flag.IntVar(&o.large, "large", 1_000_000, "records of the long run; 0 leaves it out")
	flag.IntVar(&o.pool, "pool", 1_000_000, "keys of the large pool")
	flag.Parse()
	o.log = os.Stderr
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, o, *only, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options, only string, w io.Writer) error {
	var failed []string
	var lines bytes.Buffer
	table := tabwriter.NewWriter(&lines, 0, 0, 2, ' ', 0)
	put := func(format string, args ...any) { _, _ = fmt.Fprintf(table, format, args...) } // a buffer takes everything
	put("figure\tvalue\tlimit\t\tmeasured\n")
	for _, m := range measures {
		if only != "" && !strings.Contains(","+only+",", ","+m.name+",") {
			continue
		}
		o.say("measuring %s", m.name)
		rows, err := m.run(ctx, o)
		if err != nil {
			return fmt.Errorf("measure %s: %w", m.name, err)
		}
		for _, r := range rows {
			verdict := "ok"
			if !r.holds() {
				verdict = "PASSED"
				failed = append(failed, r.name)
			}
			if r.limit() == "" {
				verdict = ""
			}
			put("%s\t%.4g %s\t%s\t%s\t%s\n", r.name, r.value, r.unit, r.limit(), verdict, r.raw)
		}
	}
	if err := table.Flush(); err != nil {
		return fmt.Errorf("print the figures: %w", err)
	}
	if _, err := w.Write(lines.Bytes()); err != nil {
		return fmt.Errorf("print the figures: %w", err)
	}
	if len(failed) > 0 {
		return fmt.Errorf("%w: %s", errLimit, strings.Join(failed, ", "))
	}
	return nil
}
