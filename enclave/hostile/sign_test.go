package hostile_test

import (
	"bytes"
	"errors"
	"math"
	"testing"
	"time"

	"github.com/ethereum/go-ethereum/crypto"

	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/payload"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

func signAttacks() []attack {
	return []attack{
		{"asks every key for every kind", "H2", []outcome{answered, code(refusal.PolicyDenied), code(refusal.BadMessage)}, everyKind},
		{"has a transaction and typed data signed as a message", "H2", []outcome{answered}, disguise},
		{"reads a signature out of a probe", "H2", []outcome{answered, code(refusal.BadMessage)}, probe},
		{"flips every bit of a ticket, cuts it and makes its own", "G3", []outcome{code(refusal.TicketInvalid)}, forgeTickets},
		{"signs with tickets of another boot and of another enclave", "G3", []outcome{code(refusal.TicketInvalid)}, foreignTickets},
		{"turns fences back", "G3", []outcome{answered, code(refusal.FenceStale)}, turnBack},
		{"uses one fence for another batch, payload, kind, order or batch fence", "G3", []outcome{answered, code(refusal.FenceConflict)}, equalFences},
		{"asks for leases of 292 million years, of nothing and of less", "G3", []outcome{code(refusal.Deadline), answered}, hugeLeases},
		{"lets the lease run out while the batch is signed", "G3", []outcome{code(refusal.Deadline)}, lateRelease},
		{"fences the key and signs under the next fence while the batch is signed", "G3", []outcome{code(refusal.FenceStale)}, fencedRelease},
		{"keeps receipts back, acknowledges what never was and what is another's", "H3", []outcome{answered, code(refusal.LaneFull), code(refusal.BadMessage)}, hoardReceipts},
		{"malforms batches: ids, places, counts, segments", "H2", []outcome{code(refusal.BadMessage), code(refusal.PayloadInvalid), code(refusal.KeyUnknown), code(refusal.DigestLength)}, malform},
	}
}

// sign asks on a connection of its own and takes the receipt as stored.
func (v *victim) sign(t *testing.T, req *wire.Sign) (*wire.SignReply, error) {
	t.Helper()
	c := v.dial(t)
	defer func() { must(t, c.Close()) }()
	v.drain(t, c)
	reply, err := enclavetest.Ask[wire.SignReply](c, wire.TypeSign, req)
	v.drain(t, c)
	return reply, err
}

func everyKind(t *testing.T, got *tally) {
	v := start(t, nil)
	ticket := v.ticket(t)
	for i, key := range v.keys[1:] {
		for n, kind := range append(record.Kinds(), "", "MESSAGE", "message ") {
			req := v.signing(ticket, i+1, record.Fence(n+1))
			req.Kind, req.Payload = kind, record.EncodePayload([]record.Record{{Payload: make([]byte, 32)}})
			_, err := v.sign(t, req)
			got.gotErr(err)
			if err == nil && key.Policy == "narrow" && kind != record.Message {
				t.Errorf("%s was signed under the narrow policy", kind)
			}
		}
	}
	v.honest(t)
}

// disguise has what would move money signed by keys that sign messages: the
// signature must not be one of the transaction.
func disguise(t *testing.T, got *tally) {
	v := start(t, nil)
	ticket := v.ticket(t)
	transaction := append([]byte{0x02}, bytes.Repeat([]byte{0xc0}, 40)...) // EIP-1559's form
	typed := append([]byte{0x19, 0x01}, make([]byte, 64)...)               // EIP-712's
	digest := crypto.Keccak256(transaction)
	eip191 := []byte("\x19Ethereum Signed Message:\n32" + string(digest))
	fence := record.Fence(0)
	for key, p := range v.keys {
		if p.Policy != "narrow" || key == 0 {
			continue
		}
		for _, content := range [][]byte{transaction, typed, digest, eip191} {
			fence++
			req := v.signing(ticket, key, fence)
			req.Payload = record.EncodePayload([]record.Record{{Payload: content}})
			reply, err := v.sign(t, req)
			got.gotErr(err)
			must(t, err)
			_, out, err := record.DecodeResult(reply.Result)
			must(t, err)
			for _, kind := range record.Kinds() {
				if kind == record.Message {
					continue
				}
				for _, as := range [][]byte{content, digest, crypto.Keccak256(typed)} {
					if payload.Verify(p.Algorithm, p.PublicKey, kind, as, out[0].Signature) == nil {
						t.Errorf("a message's signature is one of a %s", kind)
					}
				}
			}
		}
	}
	v.honest(t)
}

func probe(t *testing.T, got *tally) {
	v := start(t, nil)
	ticket := v.ticket(t)
	for _, at := range []int{0, 1, 2, -2, math.MaxInt32, math.MinInt32} {
		req := v.signing(ticket, 1, 1)
		req.Probe = at
		reply, err := v.sign(t, req)
		got.gotErr(err)
		if err == nil && (len(reply.Result) != 0 || len(reply.Receipt) != 0) {
			t.Error("a probe released a result")
		}
	}
	v.honest(t)
}

func forgeTickets(t *testing.T, got *tally) {
	v := start(t, nil)
	good := v.ticket(t)
	var forged []wire.Ticket
	for i := range good {
		for bit := range 8 {
			bad := bytes.Clone(good)
			bad[i] ^= 1 << bit
			forged = append(forged, bad)
		}
		forged = append(forged, good[:i])
	}
	forged = append(forged, append(bytes.Clone(good), 0), make(wire.Ticket, wire.TicketLen), bytes.Repeat([]byte{0xff}, wire.TicketLen))
	for _, bad := range forged {
		_, err := v.sign(t, v.signing(bad, 1, 1))
		got.gotErr(err)
	}
	v.honest(t)
}

func foreignTickets(t *testing.T, got *tally) {
	v, other := start(t, nil), start(t, nil)
	before := v.ticket(t)
	theirs := other.ticket(t)
	v.reboot(t)
	_, err := try[wire.LoadReply](t, v, wire.TypeLoad, &wire.Load{Header: v.header, Keys: v.entries})
	must(t, err)
	mine := v.ticket(t)
	for _, bad := range []wire.Ticket{
		before, theirs,
		append(bytes.Clone(mine[:32]), before[32:]...), append(bytes.Clone(before[:32]), mine[32:]...), append(bytes.Clone(mine[:40]), theirs[40:]...),
	} {
		_, err := v.sign(t, v.signing(bad, 1, 1))
		got.gotErr(err)
	}
	v.honest(t)
}

func turnBack(t *testing.T, got *tally) {
	v := start(t, nil)
	ticket := v.ticket(t)
	key := v.keys[1].KeyID
	stale := func(req *wire.Sign) {
		t.Helper()
		_, err := v.sign(t, req)
		got.gotErr(err)
		if !errors.Is(err, refusal.FenceStale) {
			t.Errorf("fence %d: %v", req.KeyFence, err)
		}
	}
	_, err := v.sign(t, v.signing(ticket, 1, 100))
	got.gotErr(err)
	for fence := range record.Fence(99) {
		stale(v.signing(ticket, 1, fence+1))
	}
	// Lower fences by cancel and fence turn nothing back.
	for _, low := range []record.Fence{1, 50, 99} {
		_, err := try[wire.FenceReply](t, v, wire.TypeFence, &wire.Fence{KeyID: key, Fence: low})
		got.gotErr(err)
		_, err = try[wire.FenceReply](t, v, wire.TypeCancel, &wire.Cancel{KeyID: key, KeyFence: low})
		got.gotErr(err)
		stale(v.signing(ticket, 1, low))
	}
	_, err = try[wire.FenceReply](t, v, wire.TypeFence, &wire.Fence{KeyID: key, Fence: 101})
	got.gotErr(err)
	stale(v.signing(ticket, 1, 100))
	// Neither does loading the key again.
	_, err = try[wire.LoadReply](t, v, wire.TypeLoad, &wire.Load{Header: v.header, Keys: v.entries})
	got.gotErr(err)
	stale(v.signing(ticket, 1, 100))
	_, err = v.sign(t, v.signing(ticket, 1, math.MaxUint64))
	got.gotErr(err)
	stale(v.signing(ticket, 1, math.MaxUint64-1))
	v.honest(t)
}

func equalFences(t *testing.T, got *tally) {
	v := start(t, nil)
	ticket := v.ticket(t)
	const wide = 4
	_, err := v.sign(t, v.signing(ticket, wide, 7))
	got.gotErr(err)
	for name, change := range map[string]func(*wire.Sign){
		"batch":         func(s *wire.Sign) { s.BatchID = "imp-b0000001" },
		"import":        func(s *wire.Sign) { s.BatchID, s.ImportID = "imq-b0000000", "imq" },
		"payload":       func(s *wire.Sign) { s.Payload = records("one", "three") },
		"order":         func(s *wire.Sign) { s.Payload = records("two", "one") },
		"fewer records": func(s *wire.Sign) { s.Payload = records("one") },
		"record id": func(s *wire.Sign) {
			s.Payload = record.EncodePayload([]record.Record{{ID: "a", Payload: []byte("one")}, {Payload: []byte("two")}})
		},
		"kind":                func(s *wire.Sign) { s.Kind = record.Raw },
		"batch fence":         func(s *wire.Sign) { s.BatchFence = 2 },
		"a probe of another":  func(s *wire.Sign) { s.Payload, s.Probe = records("three"), 0 },
		"another, and alone":  func(s *wire.Sign) { s.Payload, s.Alone = records("three"), true },
		"another, all refuse": func(s *wire.Sign) { s.Payload, s.Refuse = records("three"), []uint32{0} },
	} {
		req := v.signing(ticket, wide, 7)
		change(req)
		_, err := v.sign(t, req)
		got.gotErr(err)
		if !errors.Is(err, refusal.FenceConflict) {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err = v.sign(t, v.signing(ticket, wide, 7)) // the same is answered again
	got.gotErr(err)
	v.honest(t)
}

func hugeLeases(t *testing.T, got *tally) {
	v := start(t, nil)
	ticket := v.ticket(t)
	longest := time.Duration(v.cfg.Lease.MaxMS-v.cfg.Lease.MarginMS) * time.Millisecond
	asks := []int64{math.MaxInt64, math.MaxInt64 / 1_000_000, v.cfg.Lease.MaxMS + 1, 0, -1, math.MinInt64, v.cfg.Lease.MarginMS}
	refuses := func(lease int64, key int) {
		req := v.signing(ticket, key, 2)
		req.LeaseMS = lease
		_, err := v.sign(t, req)
		got.gotErr(err)
		if !errors.Is(err, refusal.Deadline) {
			t.Errorf("a lease of %d ms at %v: %v", lease, time.Duration(v.mono.Load()), err)
		}
	}
	for _, lease := range asks[3:] {
		refuses(lease, 1)
	}
	v.mono.Store(int64(longest - time.Second)) // time enough to wait for the key
	req := v.signing(ticket, 2, 1)
	req.LeaseMS = math.MaxInt64
	_, err := v.sign(t, req) // the longest lease has not ended
	got.gotErr(err)
	for _, passed := range []time.Duration{longest, longest + 1, time.Hour, 1000 * time.Hour} {
		v.mono.Store(int64(passed))
		for _, lease := range asks {
			refuses(lease, 1)
		}
	}
	v.honest(t)
}

// whileSigning calls f once, when the first record is about to be signed.
func (v *victim) whileSigning(f func()) {
	done := false
	hook := func() {
		if !done {
			done = true
			f()
		}
	}
	v.during.Store(&hook)
}

func lateRelease(t *testing.T, got *tally) {
	v := start(t, nil)
	for range 10 {
		ticket := v.ticket(t)
		v.whileSigning(func() { v.mono.Add(int64(time.Duration(v.cfg.Lease.MaxMS) * time.Millisecond)) })
		_, err := v.sign(t, v.signing(ticket, 1, 1))
		got.gotErr(err)
	}
	v.during.Store(nil)
	v.honest(t)
}

func fencedRelease(t *testing.T, got *tally) {
	v := start(t, nil)
	ticket := v.ticket(t)
	key := v.keys[1].KeyID
	for n, revoke := range []func(fence record.Fence) error{
		func(f record.Fence) error {
			_, err := try[wire.FenceReply](t, v, wire.TypeFence, &wire.Fence{KeyID: key, Fence: f + 1})
			return err
		},
		func(f record.Fence) error {
			_, err := try[wire.FenceReply](t, v, wire.TypeCancel, &wire.Cancel{KeyID: key, KeyFence: f})
			return err
		},
	} {
		fence := record.Fence(n + 1)
		v.whileSigning(func() {
			if err := revoke(fence); err != nil {
				t.Error(err)
			}
		})
		_, err := v.sign(t, v.signing(ticket, 1, fence))
		got.gotErr(err)
	}
	v.during.Store(nil)
	v.honest(t)
}

func hoardReceipts(t *testing.T, got *tally) {
	v := start(t, nil)
	ticket := v.ticket(t)
	c := v.dial(t)
	for fence := range record.Fence(wire.MaxUnacked + 3) {
		_, err := enclavetest.Ask[wire.SignReply](c, wire.TypeSign, v.signing(ticket, 1, fence+1))
		got.gotErr(err)
		if full := fence >= wire.MaxUnacked; full != errors.Is(err, refusal.LaneFull) {
			t.Errorf("with %d receipts kept back: %v", fence, err)
		}
	}
	for _, seq := range []uint64{wire.MaxUnacked + 1, math.MaxUint64} { // receipts that never were
		req := v.signing(ticket, 1, 50)
		req.Ack = seq
		_, err := enclavetest.Ask[wire.SignReply](c, wire.TypeSign, req)
		got.gotErr(err)
	}
	// Another connection cannot acknowledge for this one.
	lane := ask[wire.HelloReply](t, c, wire.TypeHello, &wire.Hello{}).Lane
	_, err := try[wire.ReceiptsReply](t, v, wire.TypeReceipts, &wire.Receipts{Ack: []wire.LaneSeq{{Lane: lane, Seq: wire.MaxUnacked}}})
	got.gotErr(err)
	_, err = try[wire.ReceiptsReply](t, v, wire.TypeReceipts, &wire.Receipts{Ack: []wire.LaneSeq{{Lane: math.MaxUint32, Seq: 1}}})
	got.gotErr(err)
	kept := ask[wire.ReceiptsReply](t, c, wire.TypeReceipts, &wire.Receipts{Ack: []wire.LaneSeq{}})
	if len(kept.Receipts) != wire.MaxUnacked {
		t.Errorf("%d receipts are left, want %d", len(kept.Receipts), wire.MaxUnacked)
	}
	for i, raw := range kept.Receipts[1:] {
		if a, b := read(t, kept.Receipts[i]), read(t, raw); b.Seq != a.Seq+1 || b.Prev != receipt.ChainHash(kept.Receipts[i]) {
			t.Errorf("receipt %d does not follow receipt %d", b.Seq, a.Seq)
		}
	}
	must(t, c.Close())
	v.honest(t)
}

func malform(t *testing.T, got *tally) {
	v := start(t, nil)
	ticket := v.ticket(t)
	segment := records("one", "two")
	var changes []func(*wire.Sign)
	for _, id := range []record.BatchID{"", "imp", "imp-b", "imp-b1", "imp-b00000000", "imp-b-000001", "../imp-b0000000", "imp-b0000000\x00", "imq-b0000000"} {
		changes = append(changes, func(s *wire.Sign) { s.BatchID = id })
	}
	for _, places := range [][]uint32{{2}, {0, 0}, {1, 0}, {math.MaxUint32}} {
		changes = append(changes, func(s *wire.Sign) { s.Refuse = places })
	}
	for n := range segment {
		changes = append(changes, func(s *wire.Sign) { s.Payload = segment[:n] })
	}
	changes = append(
		changes,
		func(s *wire.Sign) { s.BatchFence = 0 }, func(s *wire.Sign) { s.KeyFence = 0 }, func(s *wire.Sign) { s.ImportID = "" },
		func(s *wire.Sign) { s.KeyID[0] ^= 1 }, func(s *wire.Sign) { s.KeyID = record.KeyID{} },
		func(s *wire.Sign) { s.Payload = append(bytes.Clone(segment), 0) },
		func(s *wire.Sign) { s.Payload = record.EncodePayload(make([]record.Record, 60_000)) },
	)
	for _, change := range changes {
		req := v.signing(ticket, 1, 1)
		change(req)
		_, err := v.sign(t, req)
		got.gotErr(err)
		if err == nil {
			t.Errorf("signed: batch %q, places %v, %d bytes", req.BatchID, req.Refuse, len(req.Payload))
		}
	}
	// A digest that is none is refused alone.
	req := v.signing(ticket, 4, 1)
	req.Kind, req.Payload = record.Digest, record.EncodePayload([]record.Record{{Payload: make([]byte, 31)}, {Payload: make([]byte, 33)}})
	reply, err := v.sign(t, req)
	must(t, err)
	_, out, err := record.DecodeResult(reply.Result)
	must(t, err)
	for _, o := range out {
		got.got(o.Refusal)
	}
	v.honest(t)
}
