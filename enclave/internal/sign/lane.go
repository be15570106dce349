package sign

import (
	"crypto/ed25519"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/keyhold/keyhold/enclave/internal/secret"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

// maxRedelivered bounds the receipts of one answer, below 1 KB each. Whoever
// acknowledges them and asks again gets the rest.
const maxRedelivered = 512

// Lane is a chain of receipts. One connection has it at a time.
type Lane struct {
	number    uint32
	connected bool
	seq       uint64   // of the newest receipt
	prev      [32]byte // ChainHash of the newest receipt
	unacked   [][]byte // encoded receipt.Signed, the newest last, at most wire.MaxUnacked
}

// Number names the lane in receipts.
func (l *Lane) Number() uint32 { return l.number }

// acked is the highest seq that is stored.
func (l *Lane) acked() uint64 { return l.seq - uint64(len(l.unacked)) }

func (l *Lane) ack(seq uint64) error {
	if seq > l.seq {
		return refusal.BadMessage
	}
	if a := l.acked(); seq > a {
		l.unacked = slices.Delete(l.unacked, 0, int(seq-a)) //nolint:gosec // up to wire.MaxUnacked
	}
	return nil
}

// lanes are those of one boot, and the receipt key. One lock is enough: it is
// held for one Ed25519 signature a batch.
type lanes struct {
	bootID record.BootID
	key    *secret.Bytes // ed25519.PrivateKey
	limit  int

	mu  sync.Mutex
	all []*Lane // by number
}

// Connect hands out a lane: one that has no connection and nothing
// unacknowledged, else a new one. Where there are Options.MaxLanes, it is one
// without a connection whose receipts the new owner delivers first. It refuses
// with busy where every lane has a connection.
func (e *Engine) Connect() (*Lane, error) { return e.lanes.connect() }

// Disconnect gives a lane back. What is not acknowledged stays and is delivered
// to any connection that asks.
func (e *Engine) Disconnect(l *Lane) { e.lanes.disconnect(l) }

func (s *lanes) connect() (*Lane, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.all, func(l *Lane) bool { return !l.connected && len(l.unacked) == 0 })
	if i < 0 && len(s.all) < s.limit {
		i = len(s.all)
		s.all = append(s.all, &Lane{number: uint32(i)}) //nolint:gosec // below limit
	}
	if i < 0 {
		i = slices.IndexFunc(s.all, func(l *Lane) bool { return !l.connected })
	}
	if i < 0 {
		return nil, refusal.Busy
	}
	s.all[i].connected = true
	return s.all[i], nil
}

func (s *lanes) disconnect(l *Lane) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l.connected = false
}

func (s *lanes) count() uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return uint32(len(s.all)) //nolint:gosec // up to limit
}

func (s *lanes) ackOwn(l *Lane, seq uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return l.ack(seq)
}

// full says whether the lane takes no more receipts, so nothing is signed that
// could not be released.
func (s *lanes) full(l *Lane) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(l.unacked) >= wire.MaxUnacked
}

// release makes the last check and then gives r its place in the lane, so a
// receipt exists exactly for what passed that check, without gaps. check says
// when it passed.
func (s *lanes) release(l *Lane, r *receipt.Receipt, check func() (time.Time, error)) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(l.unacked) >= wire.MaxUnacked {
		return nil, refusal.LaneFull
	}
	at, err := check()
	if err != nil {
		return nil, err
	}
	r.Domain, r.Version, r.BootID = receipt.ReceiptDomain, 1, s.bootID
	r.Lane, r.Seq, r.Prev = l.number, l.seq+1, l.prev
	r.TimeMS = at.UnixMilli()
	signed, err := s.sign(receipt.Encode(r))
	if err != nil {
		return nil, err
	}
	l.seq, l.prev = r.Seq, receipt.ChainHash(signed)
	l.unacked = append(l.unacked, signed)
	return signed, nil
}

func (s *lanes) sign(body []byte) (signed []byte, err error) {
	err = s.key.Use(func(key []byte) error {
		signed = receipt.Sign(ed25519.PrivateKey(key), body)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("sign receipt: %w", err)
	}
	return signed, nil
}

// Receipts takes acknowledgements for the caller's lane and for lanes without a
// connection, and returns what those lanes still wait for, in lane order.
// Acknowledgements for a lane that another connection has are left to it.
func (e *Engine) Receipts(own *Lane, m *wire.Receipts) (*wire.ReceiptsReply, error) {
	s := &e.lanes
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range m.Ack {
		if int64(a.Lane) >= int64(len(s.all)) {
			return nil, refusal.BadMessage
		}
		l := s.all[a.Lane]
		if l != own && l.connected {
			continue
		}
		if err := l.ack(a.Seq); err != nil {
			return nil, err
		}
	}
	out := [][]byte{}
	for _, l := range s.all {
		if l == own || !l.connected {
			out = append(out, l.unacked...)
		}
		if len(out) >= maxRedelivered {
			break
		}
	}
	return &wire.ReceiptsReply{Receipts: out, Ticket: e.Ticket()}, nil
}

// Heads returns the signed heads of all lanes that have a receipt, for a
// challenge's nonce.
func (e *Engine) Heads(nonce []byte) ([]byte, error) {
	s := &e.lanes
	s.mu.Lock()
	defer s.mu.Unlock()
	h := receipt.Heads{
		Domain: receipt.HeadsDomain, BootID: s.bootID, Nonce: nonce,
		TimeMS: e.clock.Wall().UnixMilli(), Lanes: []receipt.Head{},
	}
	for _, l := range s.all {
		if l.seq > 0 {
			h.Lanes = append(h.Lanes, receipt.Head{Lane: l.number, Seq: l.seq, Hash: l.prev})
		}
	}
	return s.sign(receipt.Encode(&h))
}
