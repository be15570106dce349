package hostile_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"testing"

	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

func read(t *testing.T, signed []byte) *receipt.Receipt {
	t.Helper()
	s, err := receipt.Decode[receipt.Signed](signed)
	must(t, err)
	r, err := receipt.Decode[receipt.Receipt](s.Body)
	must(t, err)
	return r
}

// request is one valid message.
type request struct {
	typ  wire.Type
	body any
}

// every is one valid message of every type. What they touch is not the honest
// parent's key.
func every(t *testing.T, v *victim) []request {
	t.Helper()
	return []request{
		{wire.TypeHello, &wire.Hello{}},
		{wire.TypeConfigure, &wire.Configure{Config: v.s.Config()}},
		{wire.TypeCreateKeyring, &wire.CreateKeyring{}},
		{wire.TypeLoad, &wire.Load{Header: v.header, Keys: v.entries[1:3]}},
		{wire.TypeAddKeys, &wire.AddKeys{Algorithm: record.Ed25519, Policy: "narrow", Count: 1}},
		{wire.TypeTicket, &wire.GetTicket{}},
		{wire.TypeSign, v.signing(v.ticket(t), 3, 1)},
		{wire.TypeCancel, &wire.Cancel{KeyID: v.keys[4].KeyID, KeyFence: 1}},
		{wire.TypeFence, &wire.Fence{KeyID: v.keys[4].KeyID, Fence: 1}},
		{wire.TypeReceipts, &wire.Receipts{Ack: []wire.LaneSeq{}}},
		{wire.TypeAttest, &wire.Attest{Nonce: bytes.Repeat([]byte{7}, 32)}},
		{wire.TypeStatus, &wire.GetStatus{}},
	}
}

func wireAttacks() []attack {
	return []attack{
		{
			"flips every byte of every message", "H2",
			[]outcome{
				answered, code(refusal.BadMessage), code(refusal.BadVersion), code(refusal.BadFrame), code(refusal.UnknownType), refusedAlone,
				code(refusal.ConfigConflict), code(refusal.KeyringConflict), code(refusal.CreateDenied),
				code(refusal.KeyUnknown), code(refusal.TicketInvalid), code(refusal.FenceConflict), code(refusal.PayloadInvalid),
			},
			flipEverything,
		},
		{"cuts every message short at every offset", "H2", []outcome{closed, code(refusal.BadFrame)}, cutEverything},
		{"lies about the length of a frame", "H2", []outcome{code(refusal.BadFrame)}, lieAboutLengths},
		{"sends every message as every other type", "H2", []outcome{answered, code(refusal.BadMessage)}, mixTypes},
		{"replays every message a hundred times", "H2", []outcome{answered}, replay},
		{"sends every message before hello", "H2", []outcome{answered, code(refusal.BadMessage)}, beforeHello},
		{"sends the messages in 300 random orders on one connection", "H2", []outcome{answered, code(refusal.FenceStale)}, reorder},
		{"interleaves the bytes of two streams", "H2", []outcome{code(refusal.BadMessage), code(refusal.BadFrame)}, interleave},
		{"sends the enclave's own answers back to it", "H2", []outcome{code(refusal.BadMessage), code(refusal.UnknownType)}, reflect},
	}
}

func flipEverything(t *testing.T, got *tally) {
	v := start(t, nil)
	for _, m := range every(t, v) {
		whole := frame(t, m.typ, m.body)
		for i := range whole {
			bits := []int{0, 1, 2, 3, 4, 5, 6, 7}
			if testing.Short() || len(whole) > 64 {
				bits = bits[i%8 : i%8+1] // the long ones would take half a minute
			}
			for _, bit := range bits {
				bad := bytes.Clone(whole)
				bad[i] ^= 1 << bit
				v.tell(t, got, bad)
			}
		}
	}
	v.honest(t)
}

func cutEverything(t *testing.T, got *tally) {
	v := start(t, nil)
	for _, m := range every(t, v) {
		whole := frame(t, m.typ, m.body)
		for n := range whole {
			v.tell(t, got, whole[:n])
		}
	}
	v.honest(t)
}

func lieAboutLengths(t *testing.T, got *tally) {
	v := start(t, nil)
	body := frame(t, wire.TypeTicket, &wire.GetTicket{})[4:]
	for _, n := range []uint32{0, uint32(len(body)) + 1, wire.MaxFrame, wire.MaxFrame + 1, 1 << 31, 0xffffffff} {
		v.tell(t, got, append(binary.BigEndian.AppendUint32(nil, n), body...))
	}
	v.honest(t)
}

func mixTypes(t *testing.T, got *tally) {
	v := start(t, nil)
	all := every(t, v)
	for _, a := range all {
		for _, b := range all {
			if a.typ != b.typ {
				v.tell(t, got, frame(t, b.typ, a.body)) // some have the same, empty form
			}
		}
	}
	v.honest(t)
}

func replay(t *testing.T, got *tally) {
	v := start(t, nil)
	for _, m := range every(t, v) {
		if m.typ == wire.TypeAddKeys {
			continue // which makes others each time, up to the measured limit: tried below
		}
		raw := frame(t, m.typ, m.body)
		var first []byte
		for range 100 {
			all := v.say(t, raw)
			if len(all) != 1 {
				t.Fatalf("%s: %d answers", m.typ, len(all))
			}
			got.got(outcomeOf(t, all[0]))
			if m.typ == wire.TypeSign {
				var r wire.SignReply
				must(t, wire.DecodeBody(all[0], &r))
				if first == nil {
					first = r.Result
				}
				if !slices.Equal(first, r.Result) {
					t.Error("a payload has two values")
				}
				v.store(t, all)
			}
		}
	}
	v.honest(t)
}

func beforeHello(t *testing.T, got *tally) {
	v := start(t, nil)
	for _, m := range every(t, v) {
		c := v.open(t)
		all := v.exchange(t, c, frame(t, m.typ, m.body))
		must(t, c.Close())
		if len(all) != 1 {
			t.Fatalf("%s: %d answers", m.typ, len(all))
		}
		got.got(outcomeOf(t, all[0]))
		if ok := outcomeOf(t, all[0]) == answered; ok != (m.typ == wire.TypeHello) {
			t.Errorf("%s before hello: %s", m.typ, outcomeOf(t, all[0]))
		}
	}
	v.honest(t)
}

func reorder(t *testing.T, got *tally) {
	v := start(t, nil)
	all := every(t, v)
	all = slices.DeleteFunc(all, func(m request) bool { return m.typ == wire.TypeAddKeys }) // its lane would be full
	rounds := 300
	if testing.Short() {
		rounds = 50
	}
	for n := range rounds {
		var raw []byte
		order := permutation(n, len(all))
		for _, i := range order {
			if s, ok := all[i].body.(*wire.Sign); ok {
				s.KeyFence = record.Fence(1 + n*7%rounds)
			}
			raw = append(raw, frame(t, all[i].typ, all[i].body)...)
		}
		answers := v.say(t, raw)
		if len(answers) != len(all) {
			t.Fatalf("%d answers to %d requests", len(answers), len(all))
		}
		for i, m := range answers {
			got.got(outcomeOf(t, m))
			if m.Type != all[order[i]].typ && m.Type != wire.TypeError {
				t.Errorf("answer %d is to another request", i)
			}
		}
		v.store(t, answers)
	}
	v.honest(t)
}

// permutation orders n things by hash, so that round r is the same each time.
func permutation(r, n int) []int {
	order := make([]int, n)
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int {
		x, y := hash(fmt.Append(nil, r, a)), hash(fmt.Append(nil, r, b))
		return bytes.Compare(x[:], y[:])
	})
	return order
}

func interleave(t *testing.T, got *tally) {
	v := start(t, nil)
	all := every(t, v)
	for _, a := range all {
		for _, b := range all {
			x, y := frame(t, a.typ, a.body), frame(t, b.typ, b.body)
			var mixed []byte
			for i := range max(len(x), len(y)) {
				mixed = append(mixed, x[min(i, len(x)):min(i+1, len(x))]...)
				mixed = append(mixed, y[min(i, len(y)):min(i+1, len(y))]...)
			}
			v.tell(t, got, mixed)
			// One message in the middle of another, behind its head.
			v.tell(t, got, slices.Concat(x[:4+(len(x)-4)/2], y, x[4+(len(x)-4)/2:]))
		}
	}
	v.honest(t)
}

func reflect(t *testing.T, got *tally) {
	v := start(t, nil)
	for _, m := range every(t, v) {
		for _, reply := range v.say(t, frame(t, m.typ, m.body)) {
			v.tell(t, got, frame(t, reply.Type, reply.Body))
		}
	}
	e := refusal.Busy
	v.tell(t, got, frame(t, wire.TypeError, &wire.Error{Code: string(e), Ticket: make(wire.Ticket, wire.TicketLen)}))
	c := v.dial(t)
	defer func() { must(t, c.Close()) }()
	v.drain(t, c)
	if _, err := enclavetest.Ask[wire.StatusReply](c, wire.TypeStatus, &wire.GetStatus{}); err != nil {
		t.Error(err)
	}
	v.honest(t)
}
