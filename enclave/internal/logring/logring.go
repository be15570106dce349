// Package logring keeps the newest log lines of an enclave for a parent to fetch.
// It takes messages, numbers and a few named texts, and drops every other value:
// whoever reads these lines is root on the parent instance.
package logring

import (
	"context"
	"log/slog"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

// Bounds of a ring. A line takes a few hundred bytes, a panic's stack up to 1 KiB.
const (
	maxLines = 1024
	maxBytes = 128 << 10 // of all texts together
	maxEvent = 128       // bytes of a message
	maxText  = 128       // bytes of a value
	maxStack = 1 << 10   // bytes of a stack of functions and lines
	maxAttrs = 16        // of one line
)

// keyStack is the one text that may be long.
const keyStack = "stack"

// texts are the attributes whose text is kept: what the parent knows anyway, words
// of our own tables, and where in the program something happened. A new attribute
// of any other name is dropped until it is named here, and thought about.
//
//nolint:gochecknoglobals // a list that is never written
var texts = []string{
	"algorithm", "batch_id", "boot_id", "code", "key_arn", "key_id", "keyring", "mode", "operation", "phase", "reason", "state", keyStack, "step", "type",
}

// plain is what a kept text may be made of: ids, ARNs, words, and functions with
// their lines.
var plain = regexp.MustCompile(`^[A-Za-z0-9 _.,:;'/@()*\[\]{}+-]*$`)

// Ring holds the newest lines. The zero value is of no use: see New.
type Ring struct {
	uptime func() time.Duration

	mu    sync.Mutex
	lines []wire.LogLine // oldest first
	sizes []int
	bytes int
	next  uint64 // seq of the next line; the first is 1
}

// New returns an empty ring. uptime is the time since boot.
func New(uptime func() time.Duration) *Ring { return &Ring{uptime: uptime, next: 1} }

// Handler returns a handler that hands everything on to next, and keeps lines of
// level Info and above.
func (r *Ring) Handler(next slog.Handler) slog.Handler { return &handler{ring: r, next: next} }

// After returns up to limit lines that follow seq, oldest first, the seq of the
// newest line that there is, and how many lines after seq are lost.
func (r *Ring) After(seq uint64, limit int) (lines []wire.LogLine, newest, dropped uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	first := r.next - uint64(len(r.lines))
	if seq < first-1 { // first is 1 at least
		dropped = first - 1 - seq
	}
	begin := 0
	if seq >= first {
		begin = int(min(seq-first, uint64(len(r.lines)))) //nolint:gosec // G115: at most maxLines
		begin = min(begin+1, len(r.lines))
	}
	end := min(len(r.lines), begin+max(0, limit))
	return slices.Clone(r.lines[begin:end:end]), r.next - 1, dropped
}

// add appends a line and drops the oldest ones beyond the bounds.
func (r *Ring) add(l wire.LogLine) {
	size := len(l.Event) + len(l.Level)
	for _, a := range l.Attrs {
		size += len(a.Key) + len(a.Value)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	l.Seq = r.next
	r.next++
	r.lines, r.sizes, r.bytes = append(r.lines, l), append(r.sizes, size), r.bytes+size
	over := 0
	for len(r.lines)-over > maxLines || r.bytes > maxBytes {
		r.bytes -= r.sizes[over]
		over++
	}
	r.lines, r.sizes = slices.Delete(r.lines, 0, over), slices.Delete(r.sizes, 0, over)
}

// handler is a slog.Handler that also fills a ring.
type handler struct {
	ring  *Ring
	next  slog.Handler
	attrs []wire.LogAttr // of With
	lost  int            // attributes of With that were dropped
	group string         // "a.b." before the keys that follow
}

// Enabled implements slog.Handler: the ring takes Info whatever the console takes.
func (h *handler) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelInfo || h.next.Enabled(ctx, level)
}

// Handle implements slog.Handler.
func (h *handler) Handle(ctx context.Context, rec slog.Record) error {
	if rec.Level >= slog.LevelInfo {
		c := collector{attrs: slices.Clone(h.attrs), dropped: h.lost}
		rec.Attrs(func(a slog.Attr) bool {
			c.add(h.group, a)
			return true
		})
		h.ring.add(c.line(rec, h.ring.uptime()))
	}
	if !h.next.Enabled(ctx, rec.Level) {
		return nil
	}
	return h.next.Handle(ctx, rec) //nolint:wrapcheck // a handler's own error is what slog looks at
}

// WithAttrs implements slog.Handler.
func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := collector{attrs: slices.Clone(h.attrs), dropped: h.lost}
	for _, a := range attrs {
		c.add(h.group, a)
	}
	return &handler{ring: h.ring, next: h.next.WithAttrs(attrs), attrs: c.attrs, lost: c.dropped, group: h.group}
}

// WithGroup implements slog.Handler.
func (h *handler) WithGroup(name string) slog.Handler {
	group := h.group
	if name != "" {
		group += name + "."
	}
	return &handler{ring: h.ring, next: h.next.WithGroup(name), attrs: h.attrs, lost: h.lost, group: group}
}

// collector turns attributes into what may leave the enclave.
type collector struct {
	attrs   []wire.LogAttr
	dropped int
}

func (c *collector) line(rec slog.Record, uptime time.Duration) wire.LogLine {
	attrs := c.attrs
	if attrs == nil {
		attrs = []wire.LogAttr{} // the encoding of none is an empty list
	}
	event := rec.Message
	if len(event) > maxEvent || !plain.MatchString(event) {
		event = "event without a fixed name" // messages are constants: this one is not, so it may hold anything
	}
	if c.dropped > 0 && len(attrs) < maxAttrs {
		attrs = append(attrs, wire.LogAttr{Key: "dropped", Value: strconv.Itoa(c.dropped)})
	}
	return wire.LogLine{UptimeMS: uptime.Milliseconds(), Level: rec.Level.String(), Event: event, Attrs: attrs}
}

func (c *collector) add(group string, a slog.Attr) {
	if a.Value.Kind() == slog.KindGroup {
		for _, inner := range a.Value.Group() {
			name := group
			if a.Key != "" {
				name += a.Key + "."
			}
			c.add(name, inner)
		}
		return
	}
	value, ok := c.value(a)
	key := group + a.Key
	if !ok || len(c.attrs) >= maxAttrs-1 || len(key) > maxText || !plain.MatchString(key) {
		c.dropped++
		return
	}
	if _, isErr := a.Value.Any().(error); isErr {
		key = group + "code"
		if slices.ContainsFunc(c.attrs, func(has wire.LogAttr) bool { return has.Key == key }) {
			return // it is said already
		}
	}
	c.attrs = append(c.attrs, wire.LogAttr{Key: key, Value: value})
}

// value returns the text of an attribute that may be kept. An error becomes its
// code: its text can come from the kernel, from KMS or from the parent. A
// LogValuer is not asked, it is dropped.
func (c *collector) value(a slog.Attr) (text string, ok bool) {
	switch a.Value.Kind() {
	case slog.KindBool:
		return strconv.FormatBool(a.Value.Bool()), true
	case slog.KindInt64:
		return strconv.FormatInt(a.Value.Int64(), 10), true
	case slog.KindUint64:
		return strconv.FormatUint(a.Value.Uint64(), 10), true
	case slog.KindDuration:
		return a.Value.Duration().String(), true
	case slog.KindString:
		text = a.Value.String()
		limit := maxText
		if a.Key == keyStack {
			limit = maxStack
			text = text[:min(len(text), limit)]
		}
		return text, slices.Contains(texts, a.Key) && len(text) <= limit && plain.MatchString(text)
	case slog.KindAny:
		err, isErr := a.Value.Any().(error)
		if !isErr {
			return "", false
		}
		code := refusal.Of(err)
		if _, known := refusal.Lookup(code); !known {
			code = refusal.Internal
		}
		return string(code), true
	case slog.KindFloat64, slog.KindTime, slog.KindGroup, slog.KindLogValuer:
		return "", false
	}
	return "", false
}
