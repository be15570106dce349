package enclavetest

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/internal/wire"
)

// prepare takes the enclave to ready, with all keys, as a parent would.
func (s *Server) prepare(ctx context.Context, l *life) error {
	if _, err := l.boot.Configure(ctx, &wire.Configure{Config: s.raw}); err != nil {
		return err
	}
	if len(s.ring.Header) == 0 {
		made, err := l.boot.CreateKeyring(ctx)
		if err != nil {
			return err
		}
		entries, err := s.makeKeys(ctx, l)
		if err != nil {
			return err
		}
		s.ring = Sealed{Header: made.Header, Entries: entries}
	} else if err := s.load(ctx, l); err != nil {
		return err
	}
	return s.note()
}

func (s *Server) makeKeys(ctx context.Context, l *life) (entries [][]byte, err error) {
	policy := ""
	for _, c := range s.opt.Config.Create {
		if c.Algorithm == s.opt.Algorithm {
			policy = c.Policy
			break
		}
	}
	engine := l.boot.Engine()
	lane, err := engine.Connect()
	if err != nil {
		return nil, err
	}
	defer engine.Disconnect(lane)
	var receipts uint64 // all taken as stored, so the lane is empty afterwards
	for len(entries) < s.opt.Keys {
		n := min(s.opt.Keys-len(entries), wire.MaxAddKeys)
		reply, err := engine.AddKeys(ctx, lane, &wire.AddKeys{
			Algorithm: s.opt.Algorithm, Policy: policy, Count: uint32(n), Ack: receipts, //nolint:gosec // up to MaxAddKeys
		})
		if err != nil {
			return nil, err
		}
		entries = append(entries, reply.Keys...)
		receipts++
	}
	_, err = engine.Receipts(lane, &wire.Receipts{Ack: []wire.LaneSeq{{Lane: lane.Number(), Seq: receipts}}})
	return entries, err
}

func (s *Server) load(ctx context.Context, l *life) error {
	chunks := slices.Collect(slices.Chunk(s.ring.Entries, wire.MaxLoadKeys))
	if len(chunks) == 0 {
		chunks = [][][]byte{{}} // the keyring itself is to be opened all the same
	}
	for _, keys := range chunks {
		reply, err := l.boot.Load(ctx, &wire.Load{Header: s.ring.Header, Keys: keys})
		if err != nil {
			return err
		}
		if len(reply.Refused) > 0 {
			return fmt.Errorf("%d sealed keys: %w", len(reply.Refused), refusal.SealedInvalid)
		}
	}
	return nil
}

// note reads the public parts of the keys.
func (s *Server) note() error {
	keys := make([]sealed.Public, 0, len(s.ring.Entries))
	for _, raw := range s.ring.Entries {
		e, err := sealed.DecodeEntry(raw)
		if err != nil {
			return errors.Join(refusal.SealedInvalid, err)
		}
		keys = append(keys, e.Public)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys = keys
	return nil
}
