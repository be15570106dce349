package sign_test

import (
	"errors"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/keyhold/keyhold/enclave/internal/sign"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

// model is what the rules of design section 5 say, without any of the code.
type model struct {
	*fixture
	tb      testing.TB
	lanes   []*sign.Lane
	seq     []uint64 // of each lane
	acked   []uint64
	keys    []modelKey
	tickets []modelTicket
}

type modelKey struct {
	revoked, fence record.Fence
	batch          int
	released       record.Fence // the newest fence under which something was released
}

type modelTicket struct {
	ticket wire.Ticket
	at     time.Duration
}

func (m *model) now() time.Duration { return time.Duration(m.fixture.now.Load()) }

// predict is the code that the rules give, in the order in which they are looked at.
func (m *model) predict(k *modelKey, lane int, tk modelTicket, leaseMS int64, fence record.Fence, batch int) refusal.Code {
	switch {
	case m.now() >= tk.at+time.Duration(min(leaseMS, lease)-margin)*time.Millisecond:
		return refusal.Deadline
	case m.seq[lane]-m.acked[lane] >= wire.MaxUnacked:
		return refusal.LaneFull
	case fence <= k.revoked || fence < k.fence:
		return refusal.FenceStale
	case fence == k.fence && batch != k.batch:
		return refusal.FenceConflict
	}
	return ""
}

func (m *model) sign(t *rapid.T) {
	i := rapid.IntRange(0, len(m.keys)-1).Draw(t, "key")
	lane := rapid.IntRange(0, len(m.lanes)-1).Draw(t, "lane")
	tk := rapid.SampledFrom(m.tickets).Draw(t, "ticket")
	leaseMS := rapid.SampledFrom([]int64{1500, 5000, lease, 3 * lease}).Draw(t, "lease")
	fence := record.Fence(rapid.IntRange(1, 12).Draw(t, "fence"))
	batch := rapid.IntRange(0, 2).Draw(t, "batch")
	probe := rapid.SampledFrom([]int{wire.NoProbe, wire.NoProbe, 0}).Draw(t, "probe")

	k := &m.keys[i]
	code := m.predict(k, lane, tk, leaseMS, fence, batch)
	reply, err := m.engine.Sign(t.Context(), m.lanes[lane], m.request(func(r *wire.Sign) {
		r.Ticket, r.KeyID, r.KeyFence, r.LeaseMS, r.Probe = tk.ticket, m.fixture.keys[i].KeyID, fence, leaseMS, probe
		r.BatchID = record.MakeBatchID("imp", batch)
	}))
	if code == "" && err != nil || code != "" && !errors.Is(err, code) {
		t.Fatalf("sign: got %v, want %q", err, code)
	}
	if code != "" {
		return
	}
	k.fence, k.batch, k.revoked = fence, batch, max(k.revoked, fence-1)
	if probe != wire.NoProbe {
		return
	}
	m.seq[lane]++
	if r := m.receipt(m.tb, reply.Receipt); r.Seq != m.seq[lane] || r.KeyFence != fence || r.BatchID != record.MakeBatchID("imp", batch) {
		t.Fatalf("receipt %+v, want seq %d", r, m.seq[lane])
	}
	if fence < k.released {
		t.Fatalf("released under fence %d after %d", fence, k.released)
	}
	k.released = fence
}

func (m *model) cancel(t *rapid.T) {
	i := rapid.IntRange(0, len(m.keys)-1).Draw(t, "key")
	fence := record.Fence(rapid.IntRange(1, 12).Draw(t, "fence"))
	if _, err := m.engine.Cancel(&wire.Cancel{KeyID: m.fixture.keys[i].KeyID, KeyFence: fence}); err != nil {
		t.Fatal(err)
	}
	m.keys[i].revoked = max(m.keys[i].revoked, fence)
}

func (m *model) fence(t *rapid.T) {
	i := rapid.IntRange(0, len(m.keys)-1).Draw(t, "key")
	fence := record.Fence(rapid.IntRange(1, 12).Draw(t, "fence"))
	if _, err := m.engine.Fence(&wire.Fence{KeyID: m.fixture.keys[i].KeyID, Fence: fence}); err != nil {
		t.Fatal(err)
	}
	m.keys[i].revoked = max(m.keys[i].revoked, fence-1)
}

func (m *model) ack(t *rapid.T) {
	lane := rapid.IntRange(0, len(m.lanes)-1).Draw(t, "lane")
	seq := rapid.Uint64Range(0, m.seq[lane]).Draw(t, "seq")
	if _, err := m.engine.Receipts(m.lanes[lane], &wire.Receipts{Ack: []wire.LaneSeq{{Lane: m.lanes[lane].Number(), Seq: seq}}}); err != nil {
		t.Fatal(err)
	}
	m.acked[lane] = max(m.acked[lane], seq)
}

func TestSignFollowsTheRulesInAnyOrder(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		m := &model{tb: t, fixture: newFixture(t, nil), keys: make([]modelKey, 2), seq: make([]uint64, 2), acked: make([]uint64, 2)}
		m.open(t, 2, config.Create{Algorithm: record.Ed25519, Policy: "open"})
		m.lanes = []*sign.Lane{m.lane(t), m.lane(t)}
		m.tickets = []modelTicket{{m.engine.Ticket(), 0}}
		rt.Repeat(map[string]func(*rapid.T){
			"sign": m.sign, "cancel": m.cancel, "fence": m.fence, "ack": m.ack,
			"sleep": func(t *rapid.T) {
				m.sleep(time.Duration(rapid.Int64Range(1, 4000).Draw(t, "ms")) * time.Millisecond)
			},
			"ticket": func(*rapid.T) { m.tickets = append(m.tickets, modelTicket{m.engine.Ticket(), m.now()}) },
		})
	})
}
