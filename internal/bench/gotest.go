package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
)

// Benchmarks of packages under enclave/internal can only run there. They report
// their figures as metrics, which are read here.

// enclaveCPU compares the engine with the bare loop.
func enclaveCPU(ctx context.Context, _ options) ([]row, error) {
	got, err := goBench(ctx, "./enclave/internal/sign", "BenchmarkAgainstBareLoop", 3)
	if err != nil {
		return nil, err
	}
	var rows []row
	for _, name := range []string{"sign", "sign_and_verify"} {
		m := got["BenchmarkAgainstBareLoop/"+name]
		rows = append(rows, row{
			name: "enclave CPU per record, " + strings.ReplaceAll(name, "_", " ") + ", against the bare loop", value: m["ratio"], unit: "x", atMost: 1.12,
			raw: fmt.Sprintf("%.0f ns against %.0f ns, batches of 500", m["engine-ns/record"], m["bare-ns/record"]),
		})
	}
	return rows, nil
}

// openKeyring measures opening sealed keys with everything derived again.
func openKeyring(ctx context.Context, _ options) ([]row, error) {
	got, err := goBench(ctx, "./enclave/internal/keyring", "BenchmarkOpen", 3)
	if err != nil {
		return nil, err
	}
	rate := got["BenchmarkOpen"]["keys/s"]
	return []row{{
		name: "opening a keyring, keys per second and core, against 25,000", value: rate / 25_000, unit: "x", atLeast: 1,
		raw: fmt.Sprintf("%.0f keys/s", rate),
	}}, nil
}

// goBench runs benchmarks of a package and returns the median of each metric.
func goBench(ctx context.Context, pkg, pattern string, count int) (map[string]map[string]float64, error) {
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "^"+pattern+"$", "-benchtime", "2s", //nolint:gosec // fixed words
		"-cpu", "1", "-count", strconv.Itoa(count), pkg)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("go test -bench %s: %w\n%s", pattern, err, out)
	}
	all := map[string]map[string][]float64{}
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if len(f) < 4 || !strings.HasPrefix(f[0], "Benchmark") {
			continue
		}
		if all[f[0]] == nil {
			all[f[0]] = map[string][]float64{}
		}
		for i := 2; i+1 < len(f); i += 2 {
			v, err := strconv.ParseFloat(f[i], 64)
			if err != nil {
				return nil, fmt.Errorf("read the figures of %s: %w", f[0], err)
			}
			all[f[0]][f[i+1]] = append(all[f[0]][f[i+1]], v)
		}
	}
	medians := map[string]map[string]float64{}
	for name, metrics := range all {
		medians[name] = map[string]float64{}
		for unit, values := range metrics {
			slices.Sort(values)
			medians[name][unit] = values[len(values)/2]
		}
	}
	if len(medians) == 0 {
		return nil, fmt.Errorf("go test -bench %s printed no figures", pattern)
	}
	return medians, nil
}
