package sign_test

import (
	"encoding/binary"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

func TestRequestsAreRefusedByRule(t *testing.T) {
	other := record.KeyID{1}
	for _, tc := range []struct {
		name   string
		change func(*wire.Sign)
		want   refusal.Code
	}{
		{"nothing wrong", func(*wire.Sign) {}, ""},
		{"unknown key", func(m *wire.Sign) { m.KeyID = other }, refusal.KeyUnknown},
		{"no key fence", func(m *wire.Sign) { m.KeyFence = 0 }, refusal.BadMessage},
		{"no batch fence", func(m *wire.Sign) { m.BatchFence = 0 }, refusal.BadMessage},
		{"highest fence", func(m *wire.Sign) { m.KeyFence = math.MaxUint64 }, ""},
		{"batch of another import", func(m *wire.Sign) { m.ImportID = "other" }, refusal.BadMessage},
		{"no batch id", func(m *wire.Sign) { m.BatchID = "" }, refusal.BadMessage},
		{"unknown kind", func(m *wire.Sign) { m.Kind = "transaction" }, refusal.BadMessage},
		{"kind that the policy does not grant", func(m *wire.Sign) { m.Kind = record.Raw }, refusal.PolicyDenied},
		{"payload cut off", func(m *wire.Sign) { m.Payload = m.Payload[:len(m.Payload)-1] }, refusal.PayloadInvalid},
		{"payload with more behind it", func(m *wire.Sign) { m.Payload = append(m.Payload, 0) }, refusal.PayloadInvalid},
		{"no payload", func(m *wire.Sign) { m.Payload = nil }, refusal.PayloadInvalid},
		{"record without number", func(m *wire.Sign) { m.Refuse = []uint32{2} }, refusal.BadMessage},
		{"records to refuse not ascending", func(m *wire.Sign) { m.Refuse = []uint32{1, 0} }, refusal.BadMessage},
		{"record to refuse twice", func(m *wire.Sign) { m.Refuse = []uint32{1, 1} }, refusal.BadMessage},
		{"probe of no record", func(m *wire.Sign) { m.Probe = 2 }, refusal.BadMessage},
		{"probe below none", func(m *wire.Sign) { m.Probe = -2 }, refusal.BadMessage},
		{"acknowledges what was never issued", func(m *wire.Sign) { m.Ack = 1 }, refusal.BadMessage},
		{"no ticket", func(m *wire.Sign) { m.Ticket = nil }, refusal.TicketInvalid},
		{"ticket cut off", func(m *wire.Sign) { m.Ticket = m.Ticket[:71] }, refusal.TicketInvalid},
		{"ticket moved into the future", func(m *wire.Sign) { binary.BigEndian.PutUint64(m.Ticket[32:], 1<<40) }, refusal.TicketInvalid},
		{"ticket of another boot", func(m *wire.Sign) { m.Ticket[0] ^= 1 }, refusal.TicketInvalid},
		{"ticket with another seal", func(m *wire.Sign) { m.Ticket[71] ^= 1 }, refusal.TicketInvalid},
		{"lease not longer than the margin", func(m *wire.Sign) { m.LeaseMS = margin }, refusal.Deadline},
		{"lease a little longer than the margin", func(m *wire.Sign) { m.LeaseMS = margin + 1 }, ""},
		{"no lease", func(m *wire.Sign) { m.LeaseMS = 0 }, refusal.Deadline},
		{"negative lease", func(m *wire.Sign) { m.LeaseMS = math.MinInt64 }, refusal.Deadline},
		{"lease beyond the config's", func(m *wire.Sign) { m.LeaseMS = math.MaxInt64 }, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := ready(t, 1)
			_, err := f.engine.Sign(t.Context(), f.lane(t), f.request(tc.change))
			want(t, err, tc.want)
		})
	}
}

func TestDeadlineCountsFromTheTicket(t *testing.T) {
	for _, tc := range []struct {
		name  string
		lease int64
		sleep time.Duration
		want  refusal.Code
	}{
		{"in time", lease, 8999 * time.Millisecond, ""},
		{"at the margin", lease, 9000 * time.Millisecond, refusal.Deadline},
		{"a longer lease than the config's is cut", 10 * lease, 9000 * time.Millisecond, refusal.Deadline},
		{"a shorter lease counts", 2000, 1000 * time.Millisecond, refusal.Deadline},
		{"long past", lease, time.Hour, refusal.Deadline},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := ready(t, 1)
			m := f.request(func(m *wire.Sign) { m.LeaseMS = tc.lease })
			f.sleep(tc.sleep)
			_, err := f.engine.Sign(t.Context(), f.lane(t), m)
			want(t, err, tc.want)
		})
	}
}

func TestFencesByRule(t *testing.T) {
	key := func(f *fixture) record.KeyID { return f.keys[0].KeyID }
	sign := func(code refusal.Code, change ...func(*wire.Sign)) func(*testing.T, *fixture) {
		return func(t *testing.T, f *fixture) {
			t.Helper()
			l := f.lane(t)
			defer f.engine.Disconnect(l)
			_, err := f.stored(t, l, f.request(change...))
			want(t, err, code)
		}
	}
	cancel := func(n record.Fence) func(*testing.T, *fixture) {
		return func(t *testing.T, f *fixture) {
			t.Helper()
			_, err := f.engine.Cancel(&wire.Cancel{KeyID: key(f), KeyFence: n})
			want(t, err, "")
		}
	}
	fence := func(n record.Fence, code refusal.Code) func(*testing.T, *fixture) {
		return func(t *testing.T, f *fixture) {
			t.Helper()
			_, err := f.engine.Fence(&wire.Fence{KeyID: key(f), Fence: n})
			want(t, err, code)
		}
	}
	at := func(n record.Fence) func(*wire.Sign) { return func(m *wire.Sign) { m.KeyFence = n } }
	for _, tc := range []struct {
		name  string
		steps []func(*testing.T, *fixture)
	}{
		{"the same batch is answered again", []func(*testing.T, *fixture){sign("", at(5)), sign("", at(5))}},
		{"a newer fence takes over", []func(*testing.T, *fixture){sign("", at(5)), sign("", at(6)), sign(refusal.FenceStale, at(5))}},
		{"another batch under the same fence", []func(*testing.T, *fixture){sign("", at(5)), sign(refusal.FenceConflict, at(5), func(m *wire.Sign) { m.BatchID = "imp-b0000001" })}},
		{"another payload under the same fence", []func(*testing.T, *fixture){sign("", at(5)), sign(refusal.FenceConflict, at(5), func(m *wire.Sign) {
			m.Payload = record.EncodePayload(records("one", "TWO"))
		})}},
		{"another kind under the same fence", []func(*testing.T, *fixture){
			func(t *testing.T, f *fixture) {
				t.Helper()
				f.keys = f.keys[1:] // one that may sign every kind
			},
			sign("", at(5)), sign(refusal.FenceConflict, at(5), func(m *wire.Sign) { m.Kind = record.Raw }),
		}},
		{"another batch fence under the same fence", []func(*testing.T, *fixture){sign("", at(5)), sign(refusal.FenceConflict, at(5), func(m *wire.Sign) { m.BatchFence = 2 })}},
		{"other records to refuse under the same fence", []func(*testing.T, *fixture){sign("", at(5)), sign("", at(5), func(m *wire.Sign) { m.Refuse = []uint32{0} })}},
		{"cancelled before it came", []func(*testing.T, *fixture){cancel(5), sign(refusal.FenceStale, at(5)), sign("", at(6))}},
		{"cancelled after it was answered", []func(*testing.T, *fixture){sign("", at(5)), cancel(5), sign(refusal.FenceStale, at(5))}},
		{"an old cancel changes nothing", []func(*testing.T, *fixture){sign("", at(5)), cancel(4), sign("", at(5))}},
		{"the highest fence can be cancelled", []func(*testing.T, *fixture){cancel(math.MaxUint64), sign(refusal.FenceStale, at(math.MaxUint64))}},
		{"fenced off", []func(*testing.T, *fixture){fence(6, ""), sign(refusal.FenceStale, at(5)), sign("", at(6))}},
		{"fence zero is none", []func(*testing.T, *fixture){fence(0, refusal.BadMessage), sign("", at(1))}},
		{"fence one revokes nothing", []func(*testing.T, *fixture){fence(1, ""), sign("", at(1))}},
		{"a newer fence that was refused for its form revokes nothing", []func(*testing.T, *fixture){
			sign("", at(5)), sign(refusal.PolicyDenied, at(6), func(m *wire.Sign) { m.Kind = record.Raw }), sign("", at(5)),
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFixture(t, nil)
			f.open(t, 1, config.Create{Algorithm: record.Secp256k1, Policy: "messages"}, config.Create{Algorithm: record.Ed25519, Policy: "open"})
			for _, step := range tc.steps {
				step(t, f)
			}
		})
	}
}

func TestFencesOfUnknownKeysAreNotRemembered(t *testing.T) {
	f := ready(t, 1)
	for i := range 100 {
		_, err := f.engine.Cancel(&wire.Cancel{KeyID: record.KeyID{byte(i), 1}, KeyFence: 1})
		want(t, err, refusal.KeyUnknown)
		_, err = f.engine.Fence(&wire.Fence{KeyID: record.KeyID{byte(i), 1}, Fence: 1})
		want(t, err, refusal.KeyUnknown)
	}
	if keys, _ := f.engine.TestingOnlyGates(); keys != 0 {
		t.Errorf("%d keys remembered, want none", keys)
	}
}

func TestNothingIsSignedWithoutKeyring(t *testing.T) {
	f := newFixture(t, nil)
	l := f.lane(t)
	_, err := f.engine.Sign(t.Context(), l, &wire.Sign{Ticket: f.engine.Ticket()})
	want(t, err, refusal.NoKeyring)
	_, err = f.engine.AddKeys(t.Context(), l, &wire.AddKeys{Count: 1})
	want(t, err, refusal.NoKeyring)
	_, err = f.engine.Load(t.Context(), nil)
	want(t, err, refusal.NoKeyring)
	_, err = f.engine.Cancel(&wire.Cancel{})
	want(t, err, refusal.NoKeyring)
}

func TestSigningAgainGivesTheSameBytes(t *testing.T) {
	for _, a := range record.Algorithms() {
		t.Run(string(a), func(t *testing.T) {
			f := newFixture(t, nil)
			f.open(t, 1, config.Create{Algorithm: a, Policy: "open"})
			l := f.lane(t)
			first, err := f.stored(t, l, f.request())
			want(t, err, "")
			second, err := f.stored(t, l, f.request())
			want(t, err, "")
			if diff := cmp.Diff(first.Result, second.Result); diff != "" {
				t.Errorf("another result (-first +second):\n%s", diff)
			}
		})
	}
}

func TestABadRecordIsRefusedAlone(t *testing.T) {
	f := newFixture(t, nil)
	f.open(t, 1, config.Create{Algorithm: record.Secp256k1, Policy: "open"})
	reply, err := f.engine.Sign(t.Context(), f.lane(t), f.request(func(m *wire.Sign) {
		m.Kind = record.Digest
		m.Payload = record.EncodePayload(records(strings.Repeat("d", 32), "short", strings.Repeat("e", 32), "crash"))
		m.Refuse = []uint32{3}
	}))
	want(t, err, "")
	out := outcomes(t, reply)
	got := []string{out[0].Refusal, out[1].Refusal, out[2].Refusal, out[3].Refusal}
	if diff := cmp.Diff([]string{"", "digest_length", "", "enclave_crash"}, got); diff != "" {
		t.Errorf("refusals (-want +got):\n%s", diff)
	}
	if r := f.receipt(t, reply.Receipt); r.Count != 4 || r.ResultRoot != receipt.ResultRoot(out) {
		t.Errorf("receipt: %+v", r)
	}
	if st := f.engine.Status(); st.Signed != 2 || st.Refused != 2 || st.Batches != 1 {
		t.Errorf("status: %+v", st)
	}
}

func TestAProbeReleasesNothing(t *testing.T) {
	f := ready(t, 1)
	l := f.lane(t)
	for i := range 2 {
		reply, err := f.engine.Sign(t.Context(), l, f.request(func(m *wire.Sign) { m.Probe = i }))
		want(t, err, "")
		if len(reply.Result) != 0 || len(reply.Receipt) != 0 || len(reply.Ticket) != wire.TicketLen {
			t.Errorf("a probe answered %d result and %d receipt bytes", len(reply.Result), len(reply.Receipt))
		}
	}
	if st := f.engine.Status(); st.Signed != 0 || st.Batches != 0 {
		t.Errorf("status: %+v", st)
	}
	// The batch follows under the same fence, another one does not.
	_, err := f.engine.Sign(t.Context(), l, f.request(func(m *wire.Sign) { m.BatchFence = 9 }))
	want(t, err, refusal.FenceConflict)
	reply, err := f.engine.Sign(t.Context(), l, f.request(func(m *wire.Sign) { m.Refuse = []uint32{1} }))
	want(t, err, "")
	if seq := f.receipt(t, reply.Receipt).Seq; seq != 1 {
		t.Errorf("the first receipt has seq %d", seq)
	}
}

func TestAProbeSignsOnlyItsRecord(t *testing.T) {
	var signed []string
	f := newFixture(t, hook(func(p []byte) { signed = append(signed, string(p)) }))
	f.open(t, 1, config.Create{Algorithm: record.Secp256k1, Policy: "messages"})
	_, err := f.engine.Sign(t.Context(), f.lane(t), f.request(func(m *wire.Sign) { m.Probe = 1 }))
	want(t, err, "")
	if diff := cmp.Diff([]string{"two"}, signed); diff != "" {
		t.Errorf("signed (-want +got):\n%s", diff)
	}
}

func TestASignatureThatDoesNotVerifyEndsTheBatch(t *testing.T) {
	f := ready(t, 1)
	l := f.lane(t)
	f.engine.TestingOnlyFailVerify(1)
	_, err := f.engine.Sign(t.Context(), l, f.request())
	want(t, err, refusal.VerifyFailed)
	reply, err := f.engine.Sign(t.Context(), l, f.request())
	want(t, err, "")
	if seq := f.receipt(t, reply.Receipt).Seq; seq != 1 {
		t.Errorf("the batch that failed left a gap: seq %d", seq)
	}
}

func TestAResultThatFitsNoItemIsRefusedBeforeSigning(t *testing.T) {
	signed := 0
	f := newFixture(t, hook(func([]byte) { signed++ }))
	f.open(t, 1, config.Create{Algorithm: record.RSA2048, Policy: "open"})
	rs := make([]record.Record, 1400) // x 256 bytes is just beyond the segment's limit
	_, err := f.engine.Sign(t.Context(), f.lane(t), f.request(func(m *wire.Sign) { m.Payload = record.EncodePayload(rs) }))
	want(t, err, refusal.TooLarge)
	if signed != 0 {
		t.Errorf("%d records signed", signed)
	}
}

func TestReceiptSaysWhatWasSigned(t *testing.T) {
	f := ready(t, 2)
	l := f.lane(t)
	f.sleep(5 * time.Second)
	rs := []record.Record{{ID: "a", Payload: []byte("x")}, {Payload: []byte("y")}}
	reply, err := f.engine.Sign(t.Context(), l, f.request(func(m *wire.Sign) {
		m.BatchID, m.BatchFence, m.KeyFence, m.KeyID = "imp-b0000007", 3, 8, f.keys[1].KeyID
		m.Payload = record.EncodePayload(rs)
	}))
	want(t, err, "")
	policy, _ := testConfig().Policy("messages")
	wantReceipt := &receipt.Receipt{
		Domain: receipt.ReceiptDomain, Version: 1, Subject: receipt.SubjectBatch, BootID: f.engine.BootID(),
		Lane: l.Number(), Seq: 1, BatchID: "imp-b0000007", ImportID: "imp", KeyID: f.keys[1].KeyID,
		Algorithm: record.Secp256k1, PublicKey: f.keys[1].PublicKey, PolicyHash: policy.Hash(),
		BatchFence: 3, KeyFence: 8, Count: 2, PayloadRoot: receipt.PayloadRoot(record.Message, rs),
		ResultRoot: receipt.ResultRoot(outcomes(t, reply)), TimeMS: startTime.Add(5 * time.Second).UnixMilli(),
	}
	if diff := cmp.Diff(wantReceipt, f.receipt(t, reply.Receipt)); diff != "" {
		t.Errorf("receipt (-want +got):\n%s", diff)
	}
}
