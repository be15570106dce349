package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// figures are those of keyhold-local's last line that count here.
type figures struct {
	Signed           int     `json:"signed"`
	SecondsSign      float64 `json:"seconds_sign"`
	RecordsPerSecond float64 `json:"records_per_second"`

	memory map[string]int // highest resident memory in KiB: enclave, parent
}

// wholeRun compares the signing phase of keyhold-local with the bare loop on all
// cores, and a long run with a shorter one.
func wholeRun(ctx context.Context, o options) ([]row, error) {
	bare, err := bareLoop(o.small, cores())
	if err != nil {
		return nil, err
	}
	small, err := localRun(ctx, o, o.small)
	if err != nil {
		return nil, err
	}
	again, err := bareLoop(o.small, cores())
	if err != nil {
		return nil, err
	}
	bare = (bare + again) / 2
	rows := []row{{
		name: fmt.Sprintf("signing %d records, against the bare loop on all cores", o.small), value: small.SecondsSign / bare.Seconds(), unit: "x", atMost: 1.5,
		raw: fmt.Sprintf("%.2f s against %.2f s, %.0f records/s, 100 keys, batches of 500", small.SecondsSign, bare.Seconds(), small.RecordsPerSecond),
	}}
	if o.large == 0 {
		return rows, nil
	}
	large, err := localRun(ctx, o, o.large)
	if err != nil {
		return nil, err
	}
	rows = append(rows, row{
		name: fmt.Sprintf("rate at %d records against %d", o.large, o.small), value: large.RecordsPerSecond / small.RecordsPerSecond, unit: "x", atLeast: 0.9,
		raw: fmt.Sprintf("%.0f against %.0f records/s", large.RecordsPerSecond, small.RecordsPerSecond),
	})
	for _, who := range []string{"parent", "enclave"} {
		rows = append(rows, row{
			name:  fmt.Sprintf("resident memory of the %s, %d records against %d", who, o.large, o.small),
			value: float64(large.memory[who]) / float64(small.memory[who]), unit: "x", atMost: 1.25,
			raw: fmt.Sprintf("%d against %d MiB", large.memory[who]>>10, small.memory[who]>>10),
		})
	}
	return rows, nil
}

func localRun(ctx context.Context, o options, records int) (f figures, err error) {
	dir, err := os.MkdirTemp("", "keyhold-bench-")
	if err != nil {
		return f, fmt.Errorf("make a folder: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	o.say("signing %d records", records)
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, o.local, "run", "--dir", dir, "--records", strconv.Itoa(records), "--keys", "100", "--json") //nolint:gosec // the operator names it
	cmd.Stdout, cmd.Stderr = &out, o.log
	if err := cmd.Start(); err != nil {
		return f, fmt.Errorf("start keyhold-local: %w", err)
	}
	watch, stop := context.WithCancel(ctx)
	var watching sync.WaitGroup
	watching.Go(func() { f.memory = highest(watch, dir) })
	err = cmd.Wait()
	stop()
	watching.Wait()
	if err != nil {
		return f, fmt.Errorf("keyhold-local: %w", err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &f); err != nil {
		return f, fmt.Errorf("read the figures of keyhold-local: %w", err)
	}
	if f.Signed != records || f.memory["parent"] == 0 || f.memory["enclave"] == 0 {
		return f, fmt.Errorf("keyhold-local signed %d of %d records; memory seen: %v", f.Signed, records, f.memory)
	}
	return f, nil
}

// highest looks at VmHWM, the highest resident memory, of parent and enclave
// until ctx ends.
func highest(ctx context.Context, dir string) map[string]int {
	kib := map[string]int{}
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		for _, who := range []string{"parent", "enclave"} {
			kib[who] = max(kib[who], highWater(filepath.Join(dir, "run", who+"-0.pid")))
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return kib
		}
	}
}

// highWater is 0 where the process is not there.
func highWater(pidFile string) int {
	raw, err := os.ReadFile(pidFile)
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil {
		return 0
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			n, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")))
			if err == nil {
				return n
			}
		}
	}
	return 0
}
