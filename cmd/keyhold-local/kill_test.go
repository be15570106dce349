package main_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/dynamo"
)

// rounds is how often a command is given again until it succeeds. One is enough where nothing but the
// supervisor is killed; the others may end a run that was making keys or importing.
const rounds = 8

// seeded returns the moments of a test that kills, and says how to have them again.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(1)
	if text := os.Getenv(seedEnv); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%s=%d", seedEnv, seed)
	h := uint64(14695981039346656037) // FNV-1a: tests of one seed differ
	for _, c := range []byte(t.Name()) {
		h = (h ^ uint64(c)) * 1099511628211
	}
	return rand.New(rand.NewPCG(seed, h))
}

// signs reports whether parent i has committed something.
func (r *running) signs(i int) bool {
	addr, err := os.ReadFile(filepath.Join(r.dir, "run", fmt.Sprintf("parent-%d.http", i)))
	if err != nil {
		return false
	}
	body, code := get(r.t, "http://"+strings.TrimSpace(string(addr))+"/metrics")
	if code != http.StatusOK {
		return false
	}
	for lines := bufio.NewScanner(strings.NewReader(body)); lines.Scan(); {
		if n, found := strings.CutPrefix(lines.Text(), `keyhold_batches_total{end="committed"} `); found {
			return n != "0"
		}
	}
	return false
}

// soon bounds the wait for each kill: keys, import and signing take at least that long together.
const soon = 1500 * time.Millisecond

func TestWhateverIsKilledEveryRecordIsSignedOnce(t *testing.T) {
	whole(t)
	t.Parallel()
	for _, tc := range []struct {
		victims []string
		kills   int
	}{
		{[]string{"enclave-0", "enclave-1"}, 3},
		{[]string{"parent-0", "parent-1"}, 2},
		{[]string{"dynamodb"}, 4},
		{[]string{"supervisor"}, 3},
		{[]string{"enclave-0", "parent-1", "dynamodb", "supervisor"}, 4},
	} {
		t.Run(strings.Join(tc.victims, " "), func(t *testing.T) {
			t.Parallel()
			killing(t, tc.victims, tc.kills)
		})
	}
}

// killing gives one command again and again, kills the victims in turn meanwhile, and checks what is
// there in the end.
func killing(t *testing.T, victims []string, kills int) {
	t.Helper()
	w := newWork(t, 8_000, 30, 40)
	w.parents, w.enclaves = 2, 2
	dice := seeded(t)
	killed := 0
	for round := 1; ; round++ {
		if round > rounds {
			t.Fatalf("no success in %d rounds", rounds)
		}
		r := w.start(t)
		bySupervisor := false
		for killed < kills && !r.over() {
			nap(t, time.Duration(dice.Int64N(int64(soon))))
			victim := victims[killed%len(victims)]
			if r.signal(victim, syscall.SIGKILL) == 0 {
				continue
			}
			killed++
			if bySupervisor = victim == "supervisor"; bySupervisor {
				break
			}
		}
		code := r.wait()
		r.nothingIsLeft()
		if code == 0 {
			if killed < kills {
				t.Logf("%d of %d kills came before the end", killed, kills)
			}
			w.holds(t, r.report())
			w.exported(t)
			w.samples(t)
			break
		}
		if !bySupervisor {
			hasCode(t, code, r.stderr.String())
		}
	}
	if killed == 0 {
		t.Error("nothing was killed")
	}
}

// samples has a few signatures of the export verified independently: all would take too long.
func (w *work) samples(t *testing.T) {
	t.Helper()
	lines := strings.SplitAfter(string(w.exported(t)), "\n")
	var some strings.Builder
	n := 0
	for i := 0; i < len(lines)-1; i += 97 {
		some.WriteString(lines[i])
		n++
	}
	file := filepath.Join(t.TempDir(), "samples.jsonl")
	if err := os.WriteFile(file, []byte(some.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, out := verifyExport(t, file); code != 0 || !strings.Contains(out, fmt.Sprintf(`"verified":%d,"failed":0,`, n)) {
		t.Errorf("exit code %d, %s", code, out)
	}
}

// hasCode: a run that failed says why, with a code of the table.
func hasCode(t *testing.T, exit int, stderr string) {
	t.Helper()
	if exit != 1 {
		t.Errorf("exit code %d, want 1", exit)
	}
	for _, e := range refusal.Table() {
		if e.Code != refusal.Internal && strings.Contains(stderr, string(e.Code)+": ") {
			t.Logf("a run ended with %s", e.Code)
			return
		}
	}
	t.Errorf("a failed run names no code:\n%s", stderr)
}

func TestCtrlCStopsWithinALeaseAndTheSameCommandGoesOn(t *testing.T) {
	whole(t)
	t.Parallel()
	w := newWork(t, 15_000, 20, 40)
	r := w.start(t)
	r.until("it signs", func() bool { return r.signs(0) })
	began := time.Now()
	r.signal("supervisor", syscall.SIGINT)
	r.mustEnd(1, "the same command goes on where this one ended")
	if took := time.Since(began); took > leaseFor {
		t.Errorf("it took %s to stop, want a lease, %s, at most", took, leaseFor)
	}
	got := w.finish(t)
	w.holds(t, got)
	if got.RecordsPerSecond == 0 {
		t.Error("the first run had signed everything: it was stopped too late to tell")
	}
}

func TestAParentThatWasStoppedForLongerThanItsLeaseCommitsNothing(t *testing.T) {
	whole(t)
	t.Parallel()
	w := newWork(t, 15_000, 20, 40)
	w.parents, w.enclaves = 2, 1
	r := w.start(t)
	stopped := 0 // whichever is the first to sign: on a busy machine the other may come late
	r.until("a parent signs", func() bool {
		for stopped = range w.parents {
			if r.signs(stopped) {
				return true
			}
		}
		return false
	})
	victim := fmt.Sprintf("parent-%d", stopped)
	s := tables(map[string]string{
		"KEYHOLD_DYNAMODB_ENDPOINT": "http://127.0.0.1:" + portOf(t, r.signal("dynamodb", 0)),
		"KEYHOLD_TABLE_PREFIX":      "keyhold-", "AWS_REGION": "us-east-1",
	})
	var held map[string]store.Batch
	r.until("the parent is stopped with batches in its hands", func() bool {
		r.signal("enclave-0", syscall.SIGSTOP) // whoever asks it to sign has a batch in its hands
		nap(t, leaseFor/20)
		alive := r.signal(victim, syscall.SIGSTOP) != 0
		if alive {
			held = r.held(s, stopped)
		}
		r.signal("enclave-0", syscall.SIGCONT)
		if len(held) == 0 {
			r.signal(victim, syscall.SIGCONT)
			nap(t, look)
		}
		return len(held) > 0
	})
	r.until("somebody else has them", func() bool {
		for id, was := range held {
			if now, err := s.Batch(t.Context(), record.BatchID(id)); err != nil || now.Fence == was.Fence {
				return false
			}
		}
		return true
	})
	if r.signal(victim, syscall.SIGCONT) == 0 {
		t.Fatal("the stopped parent is gone, and was to go on")
	}
	r.mustEnd(0, "")
	for _, b := range w.holds(t, r.report()) {
		was, ok := held[b.BatchID]
		if ok && (b.KeyFence == uint64(was.KeyFence) || len(b.Attempts) < 2 || b.KeyID != was.KeyID.String()) {
			t.Errorf("batch %s was held under fence %d of key %s, and ended as %+v", b.BatchID, was.KeyFence, was.KeyID, b)
		}
	}
	t.Logf("%d batches were taken over", len(held))
}

// held lists the batches that parent i has claimed.
func (r *running) held(s *dynamo.Store, i int) map[string]store.Batch {
	r.t.Helper()
	raw, err := os.ReadFile(filepath.Join(r.dir, "logs", fmt.Sprintf("parent-%d.log", i)))
	if err != nil {
		r.t.Fatal(err)
	}
	owner := ""
	for line := range strings.Lines(string(raw)) {
		var said struct{ Msg, Owner string }
		if json.Unmarshal([]byte(line), &said) == nil && said.Msg == "parent started" {
			owner = said.Owner // the last one is the one that runs
		}
	}
	out := map[string]store.Batch{}
	for shard := range store.ReadyShards {
		page, err := s.Ready(r.t.Context(), shard, time.Now().Add(time.Hour), 1000, "")
		if err != nil {
			r.t.Fatal(err)
		}
		for _, id := range page.Batches {
			b, err := s.Batch(r.t.Context(), id)
			if err != nil {
				r.t.Fatal(err)
			}
			if b.State == record.Claimed && b.Owner == owner {
				out[string(id)] = b
			}
		}
	}
	return out
}

func TestAPortThatIsTakenMeanwhileIsWaitedFor(t *testing.T) {
	whole(t)
	t.Parallel()
	w := newWork(t, 6_000, 10, 30)
	r := w.start(t)
	r.until("it signs", func() bool { return r.signs(0) })
	r.signal("supervisor", syscall.SIGSTOP) // or it would be quicker
	pid := r.signal("dynamodb", 0)
	port := portOf(t, pid)
	r.signal("dynamodb", syscall.SIGKILL)
	r.until("the database is gone", func() bool { state, _ := stat(pid); return state == "Z" || state == "" })
	var l net.Listener
	r.until("its port is free", func() (free bool) { // its threads end after the first of them
		var err error
		l, err = (&net.ListenConfig{}).Listen(t.Context(), "tcp", net.JoinHostPort("127.0.0.1", port))
		return err == nil
	})
	defer l.Close()
	r.signal("supervisor", syscall.SIGCONT)
	r.until("the supervisor noticed", func() bool {
		raw, err := os.ReadFile(filepath.Join(w.dir, "logs", "supervisor.log"))
		return err == nil && strings.Contains(string(raw), "port")
	})
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	r.mustEnd(0, "")
	w.holds(t, r.report())
}

// portOf reads the port from the command line of a database.
func portOf(t *testing.T, pid int) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	if err != nil {
		t.Fatal(err)
	}
	args := strings.Split(string(raw), "\x00")
	for i, a := range args[:len(args)-1] {
		if a == "--port" {
			return args[i+1]
		}
	}
	t.Fatalf("no port in %q", args)
	return ""
}
