package watch_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/parent/watch"
)

const (
	goodPCR  = "a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90"
	otherPCR = "ffb2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90"
)

// script plays nitro-cli. Its folder holds what it is to do: `fail-<command>`
// has one line per call that fails, with the codes that it prints; `enclaves` is
// the JSON that describe-enclaves prints. It writes its calls to `calls`. The
// texts are those of nitro-cli 1.4, the lines that no program reads left out.
const script = `#!/bin/sh
set -eu
cd "$(dirname "$0")"
echo "$*" >>calls
fail() {
	[ -s "fail-$1" ] || return 0
	codes=$(head -n 1 "fail-$1")
	sed -i 1d "fail-$1"
	[ "$codes" != ok ] || return 0
	[ ! -e "partial-$1" ] || cat "partial-$1"
	for code in $codes; do
		printf '[ %s ] Enclave boot failure. Such error appears when attempting to receive the ready signal.\n' "$code" >&2
	done
	echo 'If you open a support ticket, please provide the error log found at "/var/log/nitro_enclaves/err.log"' >&2
	exit 36
}
fail "$1"
case "$1" in
describe-eif)
	cat eif.json ;;
run-enclave)
	echo 'Start allocating memory...' >&2
	echo 'Started enclave with enclave-cid: 16, memory: 1024 MiB, cpu-ids: [1, 3]' >&2
	case " $* " in *' --debug-mode '*) flags=DEBUG_MODE ;; *) flags=NONE ;; esac
	sed "s/@FLAGS@/$flags/" started >enclaves
	if [ -e holds-pipes ]; then
		sleep 30 &
		echo $! >>daemons
	fi
	cat enclaves ;;
describe-enclaves)
	cat enclaves ;;
terminate-enclave)
	[ ! -e keep ] || exit 0
	echo '[]' >enclaves ;;
--version)
	echo 'Nitro CLI 1.4.2' ;;
esac
`

// fake is a nitro-cli in a folder of its own.
type fake struct {
	t   *testing.T
	dir string
}

func newFake(t *testing.T) *fake {
	t.Helper()
	f := &fake{t: t, dir: t.TempDir()}
	f.write("enclaves", "[]")
	f.write("eif.json", `{"EifVersion":4,"Measurements":{"HashAlgorithm":"Sha384 { ... }","PCR0":"`+goodPCR+`","PCR1":"`+goodPCR+`","PCR2":"`+goodPCR+`"},"IsSigned":false}`)
	f.write("started", enclaveJSON("keyhold-16", 16, "RUNNING", "@FLAGS@", goodPCR))
	f.write("image.eif", "an image")
	if err := os.WriteFile(filepath.Join(f.dir, "nitro-cli"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.endDaemons)
	return f
}

// endDaemons ends what the script left running, by its own process ids.
func (f *fake) endDaemons() {
	for _, pid := range strings.Fields(f.read("daemons")) {
		var n int
		if _, err := fmt.Sscan(pid, &n); err != nil {
			continue
		}
		if p, err := os.FindProcess(n); err == nil {
			_ = p.Kill() // it may have ended
		}
	}
}

func (f *fake) write(name, text string) {
	f.t.Helper()
	if err := os.WriteFile(filepath.Join(f.dir, name), []byte(text), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fake) read(name string) string {
	f.t.Helper()
	b, err := os.ReadFile(filepath.Join(f.dir, name))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		f.t.Fatal(err)
	}
	return string(b)
}

// calls of one command.
func (f *fake) calls(command string) (list []string) {
	for line := range strings.Lines(f.read("calls")) {
		if strings.HasPrefix(line, command) {
			list = append(list, strings.TrimSpace(line))
		}
	}
	return list
}

func enclaveJSON(name string, cid int, state, flags, pcr string) string {
	list := []map[string]any{{
		"EnclaveName": name, "EnclaveID": "i-0abc-enc1", "ProcessID": 1234, "EnclaveCID": cid, "NumberOfCPUs": 2,
		"CPUIDs": []int{1, 3}, "MemoryMiB": 1024, "State": state, "Flags": flags,
		"Measurements": map[string]string{"HashAlgorithm": "Sha384 { ... }", "PCR0": pcr, "PCR1": pcr, "PCR2": pcr},
	}}
	b, err := json.MarshalIndent(list, "", "  ")
	if err != nil {
		panic(err)
	}
	return string(b)
}

// host is a Config whose enclave answers until it is told to hang.
type host struct {
	watch.Config
	*fake
	hangs atomic.Bool

	mu     sync.Mutex
	events []watch.Event
	log    strings.Builder
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{fake: newFake(t)}
	h.Config = watch.Config{
		EIF: filepath.Join(h.dir, "image.eif"), Images: []eif.Measurements{{PCR0: goodPCR}},
		CLI: watch.NitroCLI{Path: filepath.Join(h.dir, "nitro-cli")}, Probe: h.probe, Notify: h.notify,
		RetryFirst: time.Millisecond, Every: 2 * time.Millisecond, Patience: 100 * time.Millisecond, Boot: 20 * time.Second,
		Logger: slog.New(slog.NewTextHandler(h, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	return h
}

var errHangs = errors.New("no answer")

func (h *host) probe(ctx context.Context) error {
	if h.hangs.Load() {
		return errHangs
	}
	return ctx.Err()
}

func (h *host) notify(e watch.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.events = append(h.events, e)
}

func (h *host) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.log.Write(p)
}

func (h *host) logged() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.log.String()
}

func (h *host) heard() []watch.Event {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]watch.Event(nil), h.events...)
}
