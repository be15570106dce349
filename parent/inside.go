package parent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/signclient"
)

const (
	maxLineBytes = 4 << 10 // of one log line: an enclave of ours sends less
	pullRounds   = 8       // requests in a row for lines that piled up
)

// errLine says that an enclave sent log lines as ours send none.
var errLine = errors.New("log lines out of order or too long")

// follower reads counters and log lines of one enclave, over a connection of its
// own: on the unit's, an answer could wait behind a load for minutes. It listens
// before the enclave is verified too, since that is when there is most to hear;
// nothing is decided by what it hears.
type follower struct {
	u      *unit
	boot   record.BootID
	cursor uint64 // newest line of boot that was logged
}

// follow goes on until ctx ends.
func (u *unit) follow(ctx context.Context) error {
	f := &follower{u: u}
	for {
		err := f.session(ctx)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // being told to stop is how this ends well
		}
		u.p.inside.forget(u.name)
		u.log.DebugContext(ctx, "enclave's counters not read", slog.Any("error", err))
		if pause(ctx, u.p.cfg.StatusEvery) != nil {
			return nil //nolint:nilerr // being told to stop is how this ends well
		}
	}
}

// session is the life of one connection.
func (f *follower) session(ctx context.Context) error {
	// Its end is told by the unit's own connection.
	c, err := signclient.Connect(ctx, f.u.dial, signclient.Options{})
	if err != nil {
		return err
	}
	defer c.Close()
	if id := c.BootID(); id != f.boot {
		f.boot, f.cursor = id, 0
	}
	tick := time.NewTicker(f.u.p.cfg.StatusEvery)
	defer tick.Stop()
	for {
		if err := f.pull(ctx, c); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-c.Done():
			return signclient.ErrLost
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// pull asks once, and again where more lines wait than fit one answer.
func (f *follower) pull(ctx context.Context, c *signclient.Client) error {
	for range pullRounds {
		r, err := c.Log(ctx, &wire.GetStatus{After: f.cursor, Lines: wire.MaxLogLines})
		if err != nil {
			return err
		}
		if err := f.tell(ctx, r); err != nil {
			return err
		}
		f.u.p.inside.keep(f.u.name, r)
		if len(r.Lines) == 0 || f.cursor >= r.Newest {
			return nil
		}
	}
	return nil
}

// tell logs the lines of an answer.
func (f *follower) tell(ctx context.Context, r *wire.StatusReply) error {
	if r.Dropped > 0 {
		f.u.log.WarnContext(ctx, "log lines of the enclave are lost", slog.Uint64("lines", r.Dropped))
		f.u.p.inside.lost(f.u.name, r.Dropped)
	}
	for i := range r.Lines {
		l := &r.Lines[i]
		size := len(l.Event) + len(l.Level)
		attrs := make([]slog.Attr, 0, len(l.Attrs))
		for _, a := range l.Attrs {
			size += len(a.Key) + len(a.Value)
			attrs = append(attrs, slog.String(a.Key, a.Value))
		}
		if l.Seq <= f.cursor || size > maxLineBytes {
			return fmt.Errorf("line %d: %w", i, errLine)
		}
		f.cursor = l.Seq
		var level slog.Level
		if level.UnmarshalText([]byte(l.Level)) != nil {
			level = slog.LevelInfo
		}
		f.u.log.LogAttrs(ctx, level, "enclave says", slog.String("event", l.Event), slog.String("boot_id", f.boot.String()),
			slog.Uint64("seq", l.Seq), slog.Int64("uptime_ms", l.UptimeMS), slog.Attr{Key: "attrs", Value: slog.GroupValue(attrs...)})
	}
	return nil
}

// inside exports what enclaves count, as they told last. An enclave that does not
// answer has no values, and one that was restarted begins at 0: rate() knows that.
type inside struct {
	mu       sync.Mutex
	enclaves map[string]*wire.StatusReply
	dropped  map[string]uint64
	numbers  []number
	records  *prometheus.Desc // enclave, code
	requests *prometheus.Desc // enclave, code
	lines    *prometheus.Desc // enclave
}

// number is one value of a status.
type number struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	of   func(*wire.StatusReply) float64
}

func newInside() *inside {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("keyhold_inside_"+name, help, append([]string{"enclave"}, labels...), nil)
	}
	const counter, gauge = prometheus.CounterValue, prometheus.GaugeValue
	return &inside{
		enclaves: map[string]*wire.StatusReply{}, dropped: map[string]uint64{},
		numbers: []number{
			{desc("signed_records_total", "Records that the enclave signed since it booted."), counter, func(r *wire.StatusReply) float64 { return float64(r.Signed) }},
			{desc("batches_total", "Batches that the enclave released since it booted."), counter, func(r *wire.StatusReply) float64 { return float64(r.Batches) }},
			{desc("panics_total", "Requests that ended in a panic since it booted."), counter, func(r *wire.StatusReply) float64 { return float64(r.Panics) }},
			{desc("keys", "Keys that the enclave holds."), gauge, func(r *wire.StatusReply) float64 { return float64(r.Keys) }},
			{desc("connections", "Connections that the enclave has."), gauge, func(r *wire.StatusReply) float64 { return float64(r.Connections) }},
			{desc("lanes", "Lanes that the enclave has given out."), gauge, func(r *wire.StatusReply) float64 { return float64(r.Lanes) }},
			{desc("heap_bytes", "Bytes of the enclave's heap."), gauge, func(r *wire.StatusReply) float64 { return float64(r.HeapBytes) }},
			{desc("uptime_seconds", "Time since the enclave booted."), gauge, func(r *wire.StatusReply) float64 { return float64(r.UptimeMS) / 1000 }},
			{desc("key_policy_proofs_total", "Times that the enclave proved its key policy since it booted."), counter, func(r *wire.StatusReply) float64 { return float64(r.Proofs) }},
			{desc("key_policy_proof_age_seconds", "Time since the enclave last proved its key policy, or since it booted."), gauge, func(r *wire.StatusReply) float64 { return float64(r.UptimeMS-r.ProvedMS) / 1000 }},
		},
		records:  desc("refused_records_total", "Records that the enclave refused since it booted, by code.", "code"),
		requests: desc("refused_requests_total", "Requests that the enclave refused since it booted, by code.", "code"),
		lines:    desc("lost_log_lines_total", "Log lines that the enclave had dropped before they were fetched."),
	}
}

func (in *inside) keep(enclave string, r *wire.StatusReply) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.enclaves[enclave] = r
}

func (in *inside) forget(enclave string) {
	in.mu.Lock()
	defer in.mu.Unlock()
	delete(in.enclaves, enclave)
}

func (in *inside) lost(enclave string, lines uint64) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.dropped[enclave] += lines
}

// Describe implements prometheus.Collector.
func (in *inside) Describe(ch chan<- *prometheus.Desc) {
	for _, n := range in.numbers {
		ch <- n.desc
	}
	ch <- in.records
	ch <- in.requests
	ch <- in.lines
}

// Collect implements prometheus.Collector.
func (in *inside) Collect(ch chan<- prometheus.Metric) {
	in.mu.Lock()
	defer in.mu.Unlock()
	for name, r := range in.enclaves {
		for _, n := range in.numbers {
			ch <- prometheus.MustNewConstMetric(n.desc, n.kind, n.of(r), name)
		}
		in.codes(ch, in.records, r.RecordRefusals, name)
		in.codes(ch, in.requests, r.RequestRefusals, name)
	}
	for name, n := range in.dropped {
		ch <- prometheus.MustNewConstMetric(in.lines, prometheus.CounterValue, float64(n), name)
	}
}

// codes exports counts by code. A code that this release does not know, or a
// second time the same, makes no series.
func (in *inside) codes(ch chan<- prometheus.Metric, desc *prometheus.Desc, counts []wire.CodeCount, enclave string) {
	seen := map[string]bool{}
	for _, c := range counts {
		if _, known := refusal.Lookup(refusal.Code(c.Code)); !known || seen[c.Code] {
			continue
		}
		seen[c.Code] = true
		ch <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(c.Count), enclave, c.Code)
	}
}
