package parent_test

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent"
)

// journal is a log that is read while others write it.
type journal struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.b.Write(p)
}

// said is what enclaves said, a line each.
type said struct {
	Level, Msg, Enclave, Event string
	BootID                     string `json:"boot_id"`
	Seq                        uint64
	Attrs                      map[string]string
}

func (j *journal) said(t *testing.T) (lines []said) {
	t.Helper()
	j.mu.Lock()
	defer j.mu.Unlock()
	for line := range strings.Lines(j.b.String()) {
		var s said
		if err := json.Unmarshal([]byte(line), &s); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		if s.Msg == "enclave says" {
			lines = append(lines, s)
		}
	}
	return lines
}

func TestTheParentLogsWhatItsEnclaveLogs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		j := &journal{}
		w.cfg.Logger = slog.New(slog.NewJSONHandler(j, nil))
		w.provision()
		w.start()
		w.await("ready", "")
		<-time.After(parent.DefaultStatusEvery + time.Second)
		first := w.enclave.BootID().String()
		w.enclave.Crash()
		if err := w.enclave.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.await("ready", "")
		<-time.After(3 * parent.DefaultStatusEvery)
		w.wantMetric(`keyhold_inside_keys{enclave="one"} 3`)
		w.wantMetric(`keyhold_inside_panics_total{enclave="one"} 0`)
		w.end()

		events := map[string]map[string]said{} // boot, event
		last := map[string]uint64{}
		for _, s := range j.said(t) {
			if s.Enclave != "one" || s.Seq != last[s.BootID]+1 {
				t.Errorf("line %d of %s after %d: %+v", s.Seq, s.BootID, last[s.BootID], s)
			}
			last[s.BootID] = s.Seq
			if events[s.BootID] == nil {
				events[s.BootID] = map[string]said{}
			}
			events[s.BootID][s.Event] = s
		}
		if len(events) != 2 {
			t.Errorf("lines of %d boots, want 2", len(events))
		}
		for id, lines := range events {
			if lines["config measured"].Attrs["keyring"] != "test" || lines["keyring open"].Level != "INFO" {
				t.Errorf("boot %s (the first is %s) said %+v", id, first, lines)
			}
		}
	})
}

// liar answers hello as an enclave and status as it likes.
type liar struct {
	t      *testing.T
	status func(*wire.GetStatus) *wire.StatusReply
	asked  chan wire.GetStatus
}

func (l *liar) dial(context.Context) (net.Conn, error) {
	near, far := net.Pipe()
	go l.serve(far)
	return near, nil
}

func (l *liar) serve(conn net.Conn) {
	defer conn.Close()
	for {
		frame, err := wire.ReadFrame(conn)
		if err != nil {
			return
		}
		m, err := wire.Decode(frame)
		if err != nil {
			return
		}
		var body any
		if m.Type == wire.TypeHello {
			body = &wire.HelloReply{BootID: record.BootID{1}, State: wire.StateWaiting, ConfigHash: []byte{}, Document: []byte{}, Statement: []byte{}, Ticket: make(wire.Ticket, wire.TicketLen)}
		} else {
			var req wire.GetStatus
			if m.Type != wire.TypeStatus || wire.DecodeBody(m, &req) != nil {
				return
			}
			body = l.status(&req)
			select {
			case l.asked <- req:
			default:
			}
		}
		answer, err := wire.Encode(m.ID, m.Type, body)
		if err != nil || wire.WriteFrame(conn, answer) != nil {
			return
		}
	}
}

func line(seq uint64, event string) wire.LogLine {
	return wire.LogLine{Seq: seq, Level: "WARN", Event: event, Attrs: []wire.LogAttr{}}
}

func reply(newest, dropped uint64, lines ...wire.LogLine) *wire.StatusReply {
	if lines == nil {
		lines = []wire.LogLine{}
	}
	return &wire.StatusReply{
		State: wire.StateWaiting, Newest: newest, Dropped: dropped, Lines: lines,
		RecordRefusals:  []wire.CodeCount{{Code: "deadline", Count: 3}, {Code: "deadline", Count: 9}, {Code: "made\nup", Count: 1}},
		RequestRefusals: []wire.CodeCount{},
	}
}

func TestWhatAnEnclaveSaysIsTakenWithCare(t *testing.T) {
	for _, tt := range []struct {
		name   string
		status func(*wire.GetStatus) *wire.StatusReply
		want   []string // events that are logged
		metric string
	}{
		{"more lines than one answer holds", func(r *wire.GetStatus) *wire.StatusReply {
			if r.After >= 3 {
				return reply(3, 0)
			}
			return reply(3, 0, line(r.After+1, "event"))
		}, []string{"event", "event", "event"}, ""},
		{"lines that are lost", func(r *wire.GetStatus) *wire.StatusReply {
			if r.After >= 8 {
				return reply(8, 0)
			}
			return reply(8, 7, line(8, "event"))
		}, []string{"event"}, `keyhold_inside_lost_log_lines_total{enclave="liar"} 7`},
		{"an old line again", func(*wire.GetStatus) *wire.StatusReply { return reply(2, 0, line(1, "event"), line(1, "again")) }, []string{"event"}, ""},
		{"a line that is too long", func(*wire.GetStatus) *wire.StatusReply { return reply(1, 0, line(1, strings.Repeat("x", 5000))) }, nil, ""},
		{"codes of nobody, and one twice", func(*wire.GetStatus) *wire.StatusReply { return reply(0, 0) }, nil, `keyhold_inside_refused_records_total{code="deadline",enclave="liar"} 3`},
		{"more to come for ever", func(r *wire.GetStatus) *wire.StatusReply { return reply(1<<60, 0) }, nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				j := &journal{}
				l := &liar{t: t, status: tt.status, asked: make(chan wire.GetStatus, 1)}
				w.cfg.Logger = slog.New(slog.NewJSONHandler(j, nil))
				w.cfg.Enclaves = []parent.Enclave{{Name: "liar", Dial: l.dial}}
				w.start()
				if first := <-l.asked; first.After != 0 || first.Lines != wire.MaxLogLines {
					t.Errorf("first asked for %+v", first)
				}
				synctest.Wait()
				if tt.metric != "" {
					w.wantMetric(tt.metric)
				}
				w.end()
				var got []string
				for _, s := range j.said(t) {
					got = append(got, s.Event)
				}
				if strings.Join(got, ",") != strings.Join(tt.want, ",") {
					t.Errorf("logged %q, want %q", got, tt.want)
				}
			})
		})
	}
}
