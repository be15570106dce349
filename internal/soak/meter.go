package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/keyhold/keyhold/internal/e2e/local"
)

// quantity is something that must not grow while work goes on as before. The median of the last third of
// the samples may exceed that of the third before it by a part and by slack, no more.
type quantity struct {
	name  string
	unit  string
	scale float64 // of the unit
	slack float64 // in units: what a garbage collector, a killed peer or a short soak moves
	read  func(ctx context.Context, st *stack) (float64, error)
}

const allowed = 0.25 // part by which a median may grow

const (
	mib     = 1 << 20
	parent  = "parent-0"
	enclave = "enclave-0"
)

var quantities = []quantity{
	{"parent heap", "MiB", mib, 16, metric("go_memstats_heap_inuse_bytes")},
	{"parent memory", "MiB", mib, 24, proc(parent, "status", "VmRSS:", 1<<10)},
	{"parent goroutines", "", 1, 30, metric("go_goroutines")},
	{"parent descriptors", "", 1, 20, descriptors(parent)},
	{"enclave memory", "MiB", mib, 24, proc(enclave, "status", "VmRSS:", 1<<10)},
	{"enclave threads", "", 1, 10, proc(enclave, "status", "Threads:", 1)},
	{"enclave descriptors", "", 1, 20, descriptors(enclave)},
	{"tables per record", "KiB", 1 << 10, 0.1, tables},
}

// meter takes samples.
type meter struct {
	stack   *stack
	began   time.Time
	ended   time.Time
	samples [][]float64 // one line each, in the order of quantities
	failed  int         // samples in which something did not answer
}

// work samples until ctx ends.
func (m *meter) work(ctx context.Context) {
	m.began = time.Now()
	for local.Pause(ctx, sampleEvery) == nil {
		line := make([]float64, len(quantities))
		var errs []error
		for i, q := range quantities {
			v, err := q.read(ctx, m.stack)
			line[i], errs = v/q.scale, append(errs, err)
		}
		if ctx.Err() == nil && errors.Join(errs...) != nil {
			m.failed++
			continue
		}
		if ctx.Err() == nil {
			m.samples = append(m.samples, line)
		}
	}
	m.ended = time.Now()
}

func (m *meter) lasted() time.Duration { return m.ended.Sub(m.began) }

// judge returns the figures, and what grew.
func (m *meter) judge() (figures string, grew error) {
	third := len(m.samples) / 3
	if third < 3 || m.failed > third {
		return "", fmt.Errorf("%d samples were taken and %d failed: too few to tell growth", len(m.samples), m.failed)
	}
	var text []string
	var errs []error
	for i, q := range quantities {
		before, after := median(m.samples[third:2*third], i), median(m.samples[2*third:], i)
		text = append(text, strings.TrimSpace(fmt.Sprintf("%s %.1f to %.1f %s", q.name, before, after, q.unit)))
		if after > before*(1+allowed)+q.slack {
			errs = append(errs, fmt.Errorf("%s grew from %.1f to %.1f %s", q.name, before, after, q.unit))
		}
	}
	return strings.Join(text, ", "), errors.Join(errs...)
}

func median(lines [][]float64, column int) float64 {
	values := make([]float64, len(lines))
	for i, l := range lines {
		values[i] = l[column]
	}
	slices.Sort(values)
	return values[len(values)/2]
}

// metric reads one of the first parent's.
func metric(name string) func(context.Context, *stack) (float64, error) {
	return func(ctx context.Context, st *stack) (float64, error) {
		addr, err := os.ReadFile(filepath.Join(st.dir, "run", parent+".http"))
		if err != nil {
			return 0, fmt.Errorf("find the metrics: %w", err)
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+strings.TrimSpace(string(addr))+"/metrics", nil)
		if err != nil {
			return 0, fmt.Errorf("read the metrics: %w", err)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return 0, fmt.Errorf("read the metrics: %w", err)
		}
		v, err := value(res.Body, name, 1)
		return v, errors.Join(err, res.Body.Close())
	}
}

// proc reads a number from a file that the kernel keeps of a process.
func proc(process, file, name string, factor float64) func(context.Context, *stack) (float64, error) {
	return func(_ context.Context, st *stack) (float64, error) {
		f, err := os.Open(filepath.Join("/proc", strconv.Itoa(st.run.PID(process)), file))
		if err != nil {
			return 0, fmt.Errorf("look at %s: %w", process, err)
		}
		v, err := value(f, name, factor)
		return v, errors.Join(err, f.Close())
	}
}

// value finds the line that begins with a name and returns the number behind it.
func value(r io.Reader, name string, factor float64) (float64, error) {
	for lines := bufio.NewScanner(r); lines.Scan(); {
		if f := strings.Fields(lines.Text()); len(f) > 1 && f[0] == name {
			v, err := strconv.ParseFloat(f[1], 64)
			if err != nil {
				return 0, fmt.Errorf("read %s: %w", name, err)
			}
			return v * factor, nil
		}
	}
	return 0, fmt.Errorf("read %s: it is not there", name)
}

func descriptors(process string) func(context.Context, *stack) (float64, error) {
	return func(_ context.Context, st *stack) (float64, error) {
		entries, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(st.run.PID(process)), "fd"))
		if err != nil {
			return 0, fmt.Errorf("look at %s: %w", process, err)
		}
		return float64(len(entries)), nil
	}
}

// tables is the size of the database's files by the records that were brought in.
func tables(_ context.Context, st *stack) (float64, error) {
	size := int64(0)
	for _, name := range []string{"dynamodb.db", "dynamodb.db-wal"} {
		info, err := os.Stat(filepath.Join(st.dir, name))
		if err == nil {
			size += info.Size()
		} else if !errors.Is(err, os.ErrNotExist) || name == "dynamodb.db" {
			return 0, fmt.Errorf("look at the tables: %w", err)
		}
	}
	return float64(size) / float64(st.count()), nil
}
