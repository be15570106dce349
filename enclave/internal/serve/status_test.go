package serve_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

func TestStatusTellsWhatHappenedInside(t *testing.T) {
	s := start(t, enclavetest.Options{Keys: 1, Algorithm: record.Ed25519})
	conn, h := hello(t, s)
	if _, err := enclavetest.Ask[wire.SignReply](conn, wire.TypeSign, signRequest(s, make(wire.Ticket, wire.TicketLen), "one")); err == nil {
		t.Fatal("a ticket of nobody was taken")
	}
	if _, err := enclavetest.Ask[wire.SignReply](conn, wire.TypeSign, signRequest(s, h.Ticket, "one", "two")); err != nil {
		t.Fatal(err)
	}
	st, err := enclavetest.Ask[wire.StatusReply](conn, wire.TypeStatus, &wire.GetStatus{Lines: wire.MaxLogLines})
	if err != nil {
		t.Fatal(err)
	}
	wantEvents(t, st.Lines)
	if st.Signed != 2 || st.Batches != 1 || st.HeapBytes == 0 || st.Dropped != 0 {
		t.Errorf("%+v", st)
	}
	if len(st.RequestRefusals) != 1 || st.RequestRefusals[0] != (wire.CodeCount{Code: string(refusal.TicketInvalid), Count: 1}) {
		t.Errorf("refusals of requests: %+v", st.RequestRefusals)
	}
}

// wantEvents looks for what the test above lets happen.
func wantEvents(t *testing.T, lines []wire.LogLine) {
	t.Helper()
	events := map[string]wire.LogLine{}
	for _, l := range lines {
		events[l.Event] = l
	}
	for _, want := range []string{"config measured", "keyring open", "keys created", "request refused"} {
		if _, ok := events[want]; !ok {
			t.Errorf("nothing tells of %q: %+v", want, lines)
		}
	}
	if got := fmt.Sprint(events["request refused"].Attrs); !strings.Contains(got, "ticket_invalid") || !strings.Contains(got, "sign") {
		t.Errorf("the refusal is told as %s", got)
	}
}

func TestStatusGoesOnAfterTheCursor(t *testing.T) {
	s := start(t, enclavetest.Options{})
	conn, _ := hello(t, s)
	st, err := enclavetest.Ask[wire.StatusReply](conn, wire.TypeStatus, &wire.GetStatus{Lines: wire.MaxLogLines})
	if err != nil || len(st.Lines) == 0 {
		t.Fatalf("%v, %+v", err, st)
	}
	again, err := enclavetest.Ask[wire.StatusReply](conn, wire.TypeStatus, &wire.GetStatus{After: st.Newest, Lines: 10})
	if err != nil || len(again.Lines) != 0 || again.Newest != st.Newest {
		t.Errorf("%v, %+v", err, again)
	}
	none, err := enclavetest.Ask[wire.StatusReply](conn, wire.TypeStatus, &wire.GetStatus{})
	if err != nil || len(none.Lines) != 0 || none.Newest == 0 {
		t.Errorf("lines came unasked: %v, %+v", err, none)
	}
}

func TestRefusedRecordsAreCountedByCode(t *testing.T) {
	s := start(t, enclavetest.Options{Keys: 1, Algorithm: record.Ed25519})
	conn, h := hello(t, s)
	req := signRequest(s, h.Ticket, "one", "two", "three")
	req.Refuse = []uint32{1}
	if _, err := enclavetest.Ask[wire.SignReply](conn, wire.TypeSign, req); err != nil {
		t.Fatal(err)
	}
	st, err := enclavetest.Ask[wire.StatusReply](conn, wire.TypeStatus, &wire.GetStatus{})
	if err != nil {
		t.Fatal(err)
	}
	if len(st.RecordRefusals) != 1 || st.RecordRefusals[0] != (wire.CodeCount{Code: string(refusal.EnclaveCrash), Count: 1}) || st.Refused != 1 {
		t.Errorf("%+v", st)
	}
}

// Whatever is signed, refused or panics over, no byte of it is in the log that
// everybody on the parent reads.
func TestNoPayloadReachesTheLogThatParentsRead(t *testing.T) {
	const planted = "Marker7f3aPlanted"
	s := start(t, enclavetest.Options{Keys: 1, Algorithm: record.Ed25519, Panic: func(p []byte) bool { return strings.Contains(string(p), "panic") }})
	conn, h := hello(t, s)
	for i, payload := range []string{planted, planted + " panic"} {
		req := signRequest(s, h.Ticket, payload)
		req.BatchID, req.KeyFence = record.BatchID(fmt.Sprintf("imp-b000000%d", i)), record.Fence(i+1)
		_, err := enclavetest.Ask[wire.SignReply](conn, wire.TypeSign, req)
		if (err != nil) != (i == 1) {
			t.Fatalf("batch %d: %v", i, err)
		}
	}
	if _, err := enclavetest.Ask[wire.ConfigureReply](conn, wire.TypeConfigure, &wire.Configure{Config: []byte(planted)}); err == nil {
		t.Fatal("another config was taken")
	}
	if _, err := enclavetest.Ask[wire.LoadReply](conn, wire.TypeLoad, &wire.Load{Header: []byte(planted), Keys: [][]byte{[]byte(planted)}}); err == nil {
		t.Fatal("another keyring was taken")
	}
	st, err := enclavetest.Ask[wire.StatusReply](conn, wire.TypeStatus, &wire.GetStatus{Lines: wire.MaxLogLines})
	if err != nil {
		t.Fatal(err)
	}
	if text := fmt.Sprintf("%+v", st); strings.Contains(text, planted) || !strings.Contains(text, "request panicked") {
		t.Errorf("%s", text)
	}
}
