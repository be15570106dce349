package logring_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/enclave/internal/logring"
	"github.com/keyhold/keyhold/enclave/internal/secret"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

// marker stands for whatever must not leave an enclave.
const marker = "Marker7f3aPlanted"

func newRing(t *testing.T) (*logring.Ring, *slog.Logger, *bytes.Buffer) {
	t.Helper()
	ring := logring.New(func() time.Duration { return 1500 * time.Millisecond })
	console := &bytes.Buffer{}
	return ring, slog.New(ring.Handler(slog.NewJSONHandler(console, nil))), console
}

func all(r *logring.Ring) []wire.LogLine {
	lines, _, _ := r.After(0, 10_000)
	return lines
}

func TestALineHasItsEventItsNumbersAndTheTextsThatAreNamed(t *testing.T) {
	ring, log, console := newRing(t)
	log.With(slog.String("keyring", "main")).WithGroup("kms").InfoContext(t.Context(), "data key received from KMS",
		slog.String("operation", "Decrypt"), slog.Int("attempts", 2), slog.Bool("again", true), slog.Duration("took", time.Second),
		slog.Any("error", fmt.Errorf("%s: %w", marker, refusal.KMSThrottled)))
	want := []wire.LogLine{{
		Seq: 1, UptimeMS: 1500, Level: "INFO", Event: "data key received from KMS", Attrs: []wire.LogAttr{
			{Key: "keyring", Value: "main"},
			{Key: "kms.operation", Value: "Decrypt"},
			{Key: "kms.attempts", Value: "2"},
			{Key: "kms.again", Value: "true"},
			{Key: "kms.took", Value: "1s"},
			{Key: "kms.code", Value: "kms_throttled"},
		},
	}}
	if diff := cmp.Diff(want, all(ring)); diff != "" {
		t.Error(diff)
	}
	if !strings.Contains(console.String(), marker) {
		t.Error("the console lost what the ring does not keep")
	}
}

// talkative prints its secret however it is asked.
type talkative struct{}

func (talkative) String() string               { return marker }
func (talkative) Error() string                { return marker }
func (talkative) LogValue() slog.Value         { return slog.StringValue(marker) }
func (talkative) MarshalText() ([]byte, error) { return []byte(marker), nil }

type silent struct{ Field string }

func TestNothingElseIsKept(t *testing.T) {
	held := secret.New([]byte(marker))
	for _, tt := range []struct {
		name string
		attr slog.Attr
	}{
		{"a text of no name", slog.String("note", marker)},
		{"a text of another name", slog.String("body", marker)},
		{"bytes", slog.Any("code", []byte(marker))},
		{"a struct", slog.Any("code", silent{marker})},
		{"a pointer", slog.Any("code", &silent{marker})},
		{"a secret", slog.Any("code", held)},
		{"a map", slog.Any("code", map[string]string{marker: marker})},
		{"something that logs itself", slog.Any("code", talkative{})},
		{"an error of unknown text", slog.Any("error", errors.New(marker))},
		{"an error that is an unknown code", slog.Any("error", refusal.Code(marker))},
		{"an error that wraps one with a code", slog.Any("error", fmt.Errorf("%w: %s", refusal.NSMFailed, marker))},
		{"a named text with a line break", slog.String("code", "x\n"+marker)},
		{"a named text with control bytes", slog.String("code", "\x1b[2J"+marker)},
		{"a named text that is long", slog.String("code", strings.Repeat(marker, 20))},
		{"a group", slog.Group("inner", slog.String("note", marker), slog.Any("x", silent{marker}))},
		{"a named text in a group of another name", slog.Group(marker+"\n", slog.Int("n", 1))},
		{"a key that is no word", slog.Int(marker+"\x00", 1)},
		{"a time", slog.Time("at", time.Now())},
		{"a float", slog.Float64("share", 0.5)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ring, log, _ := newRing(t)
			log.LogAttrs(t.Context(), slog.LevelWarn, "event", tt.attr)
			slog.New(log.Handler().WithAttrs([]slog.Attr{tt.attr})).LogAttrs(t.Context(), slog.LevelError, "event")
			lines := all(ring)
			if len(lines) != 2 {
				t.Fatalf("%d lines", len(lines))
			}
			if strings.Contains(fmt.Sprintf("%+v", lines), marker) {
				t.Errorf("kept: %+v", lines)
			}
			for _, l := range lines {
				if len(l.Attrs) == 0 {
					t.Errorf("nothing says that something was dropped: %+v", l)
				}
			}
		})
	}
}

func TestAMessageThatIsNoConstantIsNotKept(t *testing.T) {
	for _, message := range []string{"a\nb " + marker, "x=\"" + marker + "\"", strings.Repeat(marker, 10)} {
		ring, log, _ := newRing(t)
		log.LogAttrs(t.Context(), slog.LevelInfo, message) //nolint:sloglint // what lint forbids is what is tested
		if lines := all(ring); len(lines) != 1 || strings.Contains(lines[0].Event, marker) {
			t.Errorf("kept: %+v", lines)
		}
	}
}

func TestACodeThatIsSaidAlreadyIsNotSaidAgain(t *testing.T) {
	ring, log, _ := newRing(t)
	log.LogAttrs(t.Context(), slog.LevelInfo, "event", slog.String("code", "busy"), slog.Any("error", refusal.Busy))
	if attrs := all(ring)[0].Attrs; len(attrs) != 1 || attrs[0].Value != "busy" {
		t.Errorf("%+v", attrs)
	}
}

func TestAStackKeepsItsBeginning(t *testing.T) {
	ring, log, _ := newRing(t)
	log.LogAttrs(t.Context(), slog.LevelError, "request panicked", slog.String("stack", strings.Repeat("main.(*x).f:12 ", 200)))
	if a := all(ring)[0].Attrs; len(a) != 1 || len(a[0].Value) != 1024 {
		t.Errorf("%+v", a)
	}
}

func TestDebugLinesGoToTheConsoleAlone(t *testing.T) {
	ring := logring.New(func() time.Duration { return 0 })
	console := &bytes.Buffer{}
	log := slog.New(ring.Handler(slog.NewTextHandler(console, &slog.HandlerOptions{Level: slog.LevelDebug})))
	log.LogAttrs(t.Context(), slog.LevelDebug, "batch signed")
	if len(all(ring)) != 0 || !strings.Contains(console.String(), "batch signed") {
		t.Errorf("ring %v, console %q", all(ring), console)
	}
	quiet := slog.New(ring.Handler(slog.DiscardHandler))
	quiet.LogAttrs(t.Context(), slog.LevelInfo, "config measured")
	if len(all(ring)) != 1 {
		t.Error("a console that takes nothing takes the ring's lines away")
	}
}

func TestACursorSeesEveryLineOnceOrThatItIsLost(t *testing.T) {
	ring, log, _ := newRing(t)
	for range 3000 {
		log.LogAttrs(t.Context(), slog.LevelInfo, "event")
	}
	lines, newest, dropped := ring.After(0, 10)
	if len(lines) != 10 || newest != 3000 || lines[0].Seq != dropped+1 || dropped < 1000 {
		t.Fatalf("%d lines from %d, newest %d, dropped %d", len(lines), lines[0].Seq, newest, dropped)
	}
	seen, cursor := 0, dropped
	for {
		lines, _, lost := ring.After(cursor, 100)
		if len(lines) == 0 {
			break
		}
		if lost != 0 || lines[0].Seq != cursor+1 {
			t.Fatalf("after %d came %d, %d lost", cursor, lines[0].Seq, lost)
		}
		cursor = lines[len(lines)-1].Seq
		seen += len(lines)
	}
	if cursor != newest || seen != int(newest-dropped) {
		t.Errorf("ended at %d with %d lines", cursor, seen)
	}
}

func TestACursorFromBeyondTheEndGetsNothing(t *testing.T) {
	ring, log, _ := newRing(t)
	if lines, newest, dropped := ring.After(0, 10); len(lines) != 0 || newest != 0 || dropped != 0 {
		t.Errorf("an empty ring gave %d lines, newest %d, dropped %d", len(lines), newest, dropped)
	}
	for range 3000 {
		log.LogAttrs(t.Context(), slog.LevelInfo, "event")
	}
	for _, after := range []uint64{3000, 3001, 1 << 63, ^uint64(0)} {
		if lines, newest, dropped := ring.After(after, 10); len(lines) != 0 || newest != 3000 || dropped != 0 {
			t.Errorf("after %d: %d lines, newest %d, dropped %d", after, len(lines), newest, dropped)
		}
	}
	if lines, _, _ := ring.After(2990, 0); len(lines) != 0 {
		t.Error("lines came though none were asked for")
	}
}

func TestARingIsBoundedByBytesToo(t *testing.T) {
	ring, log, _ := newRing(t)
	for range 1000 {
		log.LogAttrs(t.Context(), slog.LevelError, "request panicked", slog.String("stack", strings.Repeat("x", 5000)))
	}
	total := 0
	for _, l := range all(ring) {
		total += len(l.Event) + len(l.Level) + len(l.Attrs[0].Key) + len(l.Attrs[0].Value)
	}
	if total > 128<<10 || total < 100<<10 {
		t.Errorf("%d bytes are kept", total)
	}
}

func TestManyAttributesAreCutOff(t *testing.T) {
	ring, log, _ := newRing(t)
	var attrs []slog.Attr
	for i := range 100 {
		attrs = append(attrs, slog.Int(fmt.Sprintf("n%d", i), i))
	}
	log.LogAttrs(t.Context(), slog.LevelInfo, "event", attrs...)
	got := all(ring)[0].Attrs
	if len(got) != 16 || got[15] != (wire.LogAttr{Key: "dropped", Value: "85"}) {
		t.Errorf("%d attributes, the last %+v", len(got), got[len(got)-1])
	}
}

// The largest answer to status must fit a frame.
func TestAFullAnswerFitsAFrame(t *testing.T) {
	ring, log, _ := newRing(t)
	var attrs []slog.Attr
	for i := range 20 {
		attrs = append(attrs, slog.String("stack", strings.Repeat("x", 5000)), slog.Int(strings.Repeat("k", 120)+fmt.Sprint(i), i))
	}
	for range 2 * wire.MaxLogLines {
		log.LogAttrs(t.Context(), slog.LevelInfo, strings.Repeat("e", 128), attrs...) //nolint:sloglint // the longest that is kept
	}
	lines, newest, dropped := ring.After(0, wire.MaxLogLines)
	if _, err := wire.Encode(1, wire.TypeStatus, &wire.StatusReply{Lines: lines, Newest: newest, Dropped: dropped}); err != nil {
		t.Error(err)
	}
}

func TestManyMayLogAndAsk(t *testing.T) {
	ring, log, _ := newRing(t)
	var tally logring.Tally
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				log.With(slog.Int("n", 1)).LogAttrs(context.Background(), slog.LevelInfo, "event")
				ring.After(0, 10)
				tally.Add(refusal.Busy)
				tally.Counts()
			}
		})
	}
	wg.Wait()
	if _, newest, _ := ring.After(0, 0); newest != 1600 {
		t.Errorf("newest is %d", newest)
	}
	if diff := cmp.Diff([]wire.CodeCount{{Code: "busy", Count: 1600}}, tally.Counts()); diff != "" {
		t.Error(diff)
	}
}

func TestATallyHoldsNoCodeButThoseOfTheTable(t *testing.T) {
	var tally logring.Tally
	if got := tally.Counts(); got == nil || len(got) != 0 {
		t.Errorf("a new tally has counted %v", got)
	}
	tally.Add(marker)
	tally.Add(refusal.Deadline)
	tally.Add(refusal.Deadline)
	want := []wire.CodeCount{{Code: "deadline", Count: 2}, {Code: "internal", Count: 1}}
	if diff := cmp.Diff(want, tally.Counts()); diff != "" {
		t.Error(diff)
	}
}
