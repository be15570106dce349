package sign_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/enclave/internal/sign"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

func (f *fixture) sign(t *testing.T, l *sign.Lane) *receipt.Receipt {
	t.Helper()
	reply, err := f.engine.Sign(t.Context(), l, f.request())
	if err != nil {
		t.Fatal(err)
	}
	return f.receipt(t, reply.Receipt)
}

// waiting returns lane and seq of what Receipts delivers to own.
func (f *fixture) waiting(t *testing.T, own *sign.Lane, ack ...wire.LaneSeq) []wire.LaneSeq {
	t.Helper()
	reply, err := f.engine.Receipts(own, &wire.Receipts{Ack: ack})
	if err != nil {
		t.Fatal(err)
	}
	var out []wire.LaneSeq
	for _, b := range reply.Receipts {
		r := f.receipt(t, b)
		out = append(out, wire.LaneSeq{Lane: r.Lane, Seq: r.Seq})
	}
	return out
}

func TestAFullLaneSignsNothing(t *testing.T) {
	signed := 0
	f := newFixture(t, hook(func([]byte) { signed++ }))
	f.open(t, 1, config.Create{Algorithm: record.Secp256k1, Policy: "messages"})
	l := f.lane(t)
	for range wire.MaxUnacked {
		f.sign(t, l)
	}
	before := signed
	_, err := f.engine.Sign(t.Context(), l, f.request())
	want(t, err, refusal.LaneFull)
	_, err = f.engine.AddKeys(t.Context(), l, &wire.AddKeys{Algorithm: record.Secp256k1, Policy: "messages", Count: 1})
	want(t, err, refusal.LaneFull)
	if signed != before {
		t.Errorf("%d records signed on a full lane", signed-before)
	}
	_, err = f.engine.Sign(t.Context(), f.lane(t), f.request())
	want(t, err, "") // another lane is not concerned
	_, err = f.engine.Sign(t.Context(), l, f.request(func(m *wire.Sign) { m.Ack = 1 }))
	want(t, err, "")
	_, err = f.engine.AddKeys(t.Context(), l, &wire.AddKeys{Algorithm: record.Secp256k1, Policy: "messages", Count: 1, Ack: 2})
	want(t, err, "")
}

func TestReceiptsOfALaneAreOneChain(t *testing.T) {
	f := ready(t, 1)
	l := f.lane(t)
	var prev [32]byte
	for seq := uint64(1); seq <= 5; seq++ {
		reply, err := f.engine.Sign(t.Context(), l, f.request(func(m *wire.Sign) { m.Ack = seq - 1 }))
		want(t, err, "")
		r := f.receipt(t, reply.Receipt)
		if r.Seq != seq || r.Prev != prev {
			t.Fatalf("receipt %d has seq %d and another predecessor", seq, r.Seq)
		}
		prev = receipt.ChainHash(reply.Receipt)
	}
	nonce := []byte("nonce")
	signed, err := f.engine.Heads(nonce)
	want(t, err, "")
	heads, err := receipt.OpenHeads(f.engine.ReceiptKey(), nonce, signed)
	want(t, err, "")
	if diff := cmp.Diff([]receipt.Head{{Lane: l.Number(), Seq: 5, Hash: prev}}, heads.Lanes); diff != "" {
		t.Errorf("heads (-want +got):\n%s", diff)
	}
}

func TestWhatFailsLeavesNoGapInTheLane(t *testing.T) {
	f := ready(t, 1)
	l := f.lane(t)
	for _, change := range []func(*wire.Sign){
		func(m *wire.Sign) { m.LeaseMS = 1 },
		func(m *wire.Sign) { m.Payload = nil },
		func(m *wire.Sign) { m.KeyID = record.KeyID{1} },
	} {
		if _, err := f.engine.Sign(t.Context(), l, f.request(change)); err == nil {
			t.Fatal("a bad request was signed")
		}
	}
	if seq := f.sign(t, l).Seq; seq != 1 {
		t.Errorf("the first receipt has seq %d", seq)
	}
}

func TestReceiptsAreDeliveredAgainUntilStored(t *testing.T) {
	f := ready(t, 1)
	a, b := f.lane(t), f.lane(t)
	f.sign(t, a)
	f.sign(t, a)
	f.sign(t, b)
	lane := func(l *sign.Lane, seq uint64) wire.LaneSeq { return wire.LaneSeq{Lane: l.Number(), Seq: seq} }
	check := func(name string, got []wire.LaneSeq, want ...wire.LaneSeq) {
		t.Helper()
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	check("b sees its own, while a is connected", f.waiting(t, b), lane(b, 1))
	check("an acknowledgement for a is left to it", f.waiting(t, b, lane(a, 2)), lane(b, 1))
	f.engine.Disconnect(a)
	check("then those of a too, in lane order", f.waiting(t, b), lane(a, 1), lane(a, 2), lane(b, 1))
	check("what is stored is dropped", f.waiting(t, b, lane(a, 1), lane(b, 1)), lane(a, 2))
	check("an old acknowledgement changes nothing", f.waiting(t, b, lane(a, 1)), lane(a, 2))
	check("nothing is left", f.waiting(t, b, lane(a, 2)))
	for _, bad := range []wire.LaneSeq{lane(a, 3), {Lane: 99, Seq: 1}} {
		_, err := f.engine.Receipts(b, &wire.Receipts{Ack: []wire.LaneSeq{bad}})
		want(t, err, refusal.BadMessage)
	}
}

func TestLanesAreHandedOutAgainAndTheirChainGoesOn(t *testing.T) {
	f := ready(t, 1)
	a := f.lane(t)
	f.sign(t, a)
	f.engine.Disconnect(a)
	b := f.lane(t)
	if b.Number() == a.Number() {
		t.Fatal("a lane with a receipt that is not stored was handed out")
	}
	f.waiting(t, b, wire.LaneSeq{Lane: a.Number(), Seq: 1})
	c := f.lane(t)
	if c.Number() != a.Number() {
		t.Fatalf("lane %d, want %d again", c.Number(), a.Number())
	}
	if r := f.sign(t, c); r.Seq != 2 {
		t.Errorf("seq %d, want 2", r.Seq)
	}
}

// Lanes are bounded, and yet nobody who lost a connection can lock others out.
func TestLanesAreBounded(t *testing.T) {
	f := ready(t, 1)
	const limit = 4 // of newFixture
	for range 3 * limit {
		l := f.lane(t)
		if reply, err := f.engine.Sign(t.Context(), l, f.request()); err == nil {
			f.receipt(t, reply.Receipt)
		} else {
			want(t, err, refusal.LaneFull)
		}
		f.engine.Disconnect(l)
	}
	if n := f.engine.Status().Lanes; n != limit {
		t.Errorf("%d lanes, want %d", n, limit)
	}
	l := f.lane(t)
	if got := f.waiting(t, l); len(got) < limit {
		t.Errorf("%d receipts wait, want at least one a lane", len(got))
	}
	for range limit - 1 {
		f.lane(t)
	}
	_, err := f.engine.Connect()
	want(t, err, refusal.Busy)
}

func TestNewKeysHaveAReceipt(t *testing.T) {
	f := newFixture(t, nil)
	f.open(t, 0)
	l := f.lane(t)
	reply, err := f.engine.AddKeys(t.Context(), l, &wire.AddKeys{Algorithm: record.Secp256k1, Policy: "messages", Count: 2})
	want(t, err, "")
	policy, _ := testConfig().Policy("messages")
	wantReceipt := &receipt.Receipt{
		Domain: receipt.ReceiptDomain, Version: 1, Subject: receipt.SubjectKeys, BootID: f.engine.BootID(),
		Lane: l.Number(), Seq: 1, Algorithm: record.Secp256k1, PublicKey: []byte{}, PolicyHash: policy.Hash(),
		Count: 2, ResultRoot: receipt.KeysRoot(reply.Keys), TimeMS: startTime.UnixMilli(),
	}
	if diff := cmp.Diff(wantReceipt, f.receipt(t, reply.Receipt)); diff != "" {
		t.Errorf("receipt (-want +got):\n%s", diff)
	}
	for _, tc := range []struct {
		name string
		m    wire.AddKeys
		want refusal.Code
	}{
		{"none", wire.AddKeys{Algorithm: record.Secp256k1, Policy: "messages"}, refusal.TooLarge},
		{"too many at once", wire.AddKeys{Algorithm: record.Secp256k1, Policy: "messages", Count: wire.MaxAddKeys + 1}, refusal.TooLarge},
		{"more than the config permits", wire.AddKeys{Algorithm: record.Secp256k1, Policy: "messages", Count: 9}, refusal.CreateLimit},
		{"a pair that the config does not list", wire.AddKeys{Algorithm: record.Ed25519, Policy: "messages", Count: 1}, refusal.CreateDenied},
		{"a policy that there is not", wire.AddKeys{Algorithm: record.Ed25519, Policy: "none", Count: 1}, refusal.CreateDenied},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := f.engine.AddKeys(t.Context(), l, &tc.m)
			want(t, err, tc.want)
		})
	}
	refused, err := f.engine.Load(t.Context(), append(reply.Keys, []byte("no entry")))
	want(t, err, "")
	if diff := cmp.Diff([]uint32{2}, refused); diff != "" {
		t.Errorf("refused places (-want +got):\n%s", diff)
	}
}

// As many lanes as enclave.Config admits, all with receipts that wait: what is
// said about them must fit the forms that carry it.
func TestAnswersAboutAllLanesFit(t *testing.T) {
	const lanes = 900
	f := newFixture(t, func(o *sign.Options) { o.MaxLanes = lanes })
	f.open(t, 1, config.Create{Algorithm: record.RSA2048, Policy: "open"}) // the longest public key
	f.engine.TestingOnlySkipVerify()
	m := f.request(func(m *wire.Sign) { m.Payload = record.EncodePayload(records("")) })
	var last *sign.Lane
	for range lanes {
		last = f.lane(t)
		for range wire.MaxUnacked {
			_, err := f.engine.Sign(t.Context(), last, m)
			want(t, err, "")
		}
	}
	nonce := make([]byte, wire.MaxNonce)
	signed, err := f.engine.Heads(nonce)
	want(t, err, "")
	heads, err := receipt.OpenHeads(f.engine.ReceiptKey(), nonce, signed)
	if err != nil || len(heads.Lanes) != lanes {
		t.Errorf("%d bytes of heads: %v", len(signed), err)
	}
	for n := range uint32(lanes) {
		if n != last.Number() {
			f.engine.Disconnect(f.engine.TestingOnlyLane(n))
		}
	}
	waiting := lanes * wire.MaxUnacked
	for waiting > 0 { // whoever stores and acknowledges them gets the rest
		reply, err := f.engine.Receipts(last, &wire.Receipts{})
		want(t, err, "")
		if _, err := wire.Encode(1, wire.TypeReceipts, reply); err != nil || len(reply.Receipts) == 0 {
			t.Fatalf("%d receipts: %v", len(reply.Receipts), err)
		}
		var ack []wire.LaneSeq
		for _, b := range reply.Receipts {
			r := f.receipt(t, b)
			ack = append(ack, wire.LaneSeq{Lane: r.Lane, Seq: r.Seq})
		}
		waiting -= len(ack)
		_, err = f.engine.Receipts(last, &wire.Receipts{Ack: ack})
		want(t, err, "")
	}
}
