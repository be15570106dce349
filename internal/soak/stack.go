package main

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/keyhold/keyhold/internal/checker"
	"github.com/keyhold/keyhold/internal/e2e/local"
)

// stack is a running keyhold-local with the tool that works it.
type stack struct {
	dir, folder   string
	program, tool string
	run           *local.Run
	env           map[string]string // that points the tool at it
	imported      atomic.Int64      // records
}

func (st *stack) count() int { return int(st.imported.Load()) }

var exported = regexp.MustCompile(`(?m)^export (\w+)='(.*)'$`)

// up starts the stack and makes its keys.
func (st *stack) up(ctx context.Context, database string) (err error) {
	if err := local.Shorten(ctx, st.program, database, st.dir); err != nil {
		return err
	}
	st.run, err = local.Start(st.program, database, st.dir, "up", "--parents", strconv.Itoa(parents),
		"--enclaves", strconv.Itoa(enclaves), "--workers", strconv.Itoa(workers))
	if err != nil {
		return err
	}
	st.env = map[string]string{}
	for st.env["KEYHOLD_TEST_ROOT"] == "" {
		for _, m := range exported.FindAllStringSubmatch(st.run.Stdout.String(), -1) {
			st.env[m[1]] = m[2]
		}
		select {
		case <-st.run.Ended():
			return fmt.Errorf("keyhold-local up ended: %s", st.run.Stderr.String())
		default:
		}
		if err := local.Pause(ctx, 50*time.Millisecond); err != nil {
			return fmt.Errorf("start: %w", err)
		}
	}
	return st.again(ctx, "keyring", "create", "--algorithm", "secp256k1", "--policy", "default", "--pool", "main", "--keys", strconv.Itoa(keys))
}

// keyhold runs the operator's tool and returns what it printed.
func (st *stack) keyhold(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, st.tool, args...) //nolint:gosec // this module's own program
	cmd.Env = os.Environ()
	for k, v := range st.env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	out, err := cmd.Output()
	if failed, ok := errors.AsType[*exec.ExitError](err); ok {
		err = fmt.Errorf("%w: %s", err, failed.Stderr)
	}
	return out, err
}

// again gives a command until it succeeds: the database may have been killed in the middle of it, and
// every command may be given again.
func (st *stack) again(ctx context.Context, args ...string) error {
	const tries = 50
	for try := 1; ; try++ {
		_, err := st.keyhold(ctx, args...)
		if err == nil {
			return nil
		}
		if try == tries || ctx.Err() != nil {
			return fmt.Errorf("keyhold %s: %w", args[0], err)
		}
		if err := local.Pause(ctx, 200*time.Millisecond); err != nil {
			return fmt.Errorf("keyhold %s: %w", args[0], err)
		}
	}
}

// open counts the batches that are not signed yet; -1 where the database does not answer at the moment.
func (st *stack) open(ctx context.Context) int {
	raw, err := st.keyhold(ctx, "records", "status", "--json")
	var status struct {
		Open       int `json:"batches_open"`
		Unfinished int `json:"imports_unfinished"`
	}
	if err != nil || json.Unmarshal(raw, &status) != nil {
		return -1
	}
	return status.Open + status.Unfinished
}

// bring imports the next records.
func (st *stack) bring(ctx context.Context, n int) error {
	number := strconv.Itoa(st.count())
	file := filepath.Join(st.folder, "records.jsonl")
	if err := st.again(ctx, "records", "generate", "--records", strconv.Itoa(n), "--seed", number, "--output", file); err != nil {
		return err
	}
	err := st.again(ctx, "records", "import", file, "--pool", "main", "--import-id", "soak-"+number, "--batch-size", strconv.Itoa(batchSize))
	if err == nil {
		st.imported.Add(int64(n))
	}
	return err
}

// work brings records in, kills and measures until time or records are over, and waits for the last
// signature.
func (st *stack) work(ctx context.Context, s settings, k *local.Killer, m *meter, out io.Writer) error {
	began := time.Now()
	over := func() bool { return st.count() >= s.records || s.lasts > 0 && time.Since(began) >= s.lasts }
	if err := st.bring(ctx, min(chunk, s.records)); err != nil {
		return err
	}
	side, stop := context.WithCancel(ctx)
	defer stop()
	killed, measured := make(chan struct{}), make(chan struct{})
	killing, noMore := context.WithCancel(side)
	defer noMore()
	go func() { defer close(killed); k.Work(killing, st.run, 1<<30) }()
	go func() { defer close(measured); m.work(side) }()
	for said := began; !over(); {
		if open := st.open(ctx); open >= 0 && open < ahead*chunk/batchSize {
			if err := st.bring(ctx, min(chunk, s.records-st.count())); err != nil {
				return err
			}
		} else if err := local.Pause(ctx, 200*time.Millisecond); err != nil {
			return fmt.Errorf("soak: %w", err)
		}
		if time.Since(said) > 10*time.Second {
			said = time.Now()
			say(out, "%s: %d records imported", time.Since(began).Round(time.Second), st.count())
		}
	}
	noMore()
	<-killed
	deadline := time.Now().Add(patience)
	for st.open(ctx) != 0 {
		if time.Now().After(deadline) {
			return errors.New("records are still open long after the last kill")
		}
		if err := local.Pause(ctx, 200*time.Millisecond); err != nil {
			return fmt.Errorf("soak: %w", err)
		}
	}
	stop()
	<-measured
	return nil
}

// options of the checker for this stack.
func (st *stack) options(endpoint string) (o checker.Options, err error) {
	o = checker.Options{Endpoint: endpoint, Prefix: st.env["KEYHOLD_TABLE_PREFIX"], InFlight: parents * enclaves * workers * 2}
	if o.PCR0, err = hex.DecodeString(st.env["KEYHOLD_PCR0"]); err != nil {
		return o, fmt.Errorf("read the wanted image: %w", err)
	}
	if o.Config, err = os.ReadFile(st.env["KEYHOLD_CONFIG"]); err != nil {
		return o, fmt.Errorf("read the config: %w", err)
	}
	raw, err := os.ReadFile(st.env["KEYHOLD_TEST_ROOT"])
	if err != nil {
		return o, fmt.Errorf("read the root: %w", err)
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		return o, errors.New("read the root: no certificate")
	}
	if o.Root, err = x509.ParseCertificate(block.Bytes); err != nil {
		return o, fmt.Errorf("read the root: %w", err)
	}
	return o, nil
}
