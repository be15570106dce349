package parent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/signclient"
	"github.com/keyhold/keyhold/parent/store"
)

const (
	// loadBytes bounds the sealed keys of one load, with room for header and
	// framing below wire.MaxFrame.
	loadBytes = wire.MaxFrame - sealed.MaxHeaderLen - 16<<10
	// collectRounds bounds how often receipts are fetched in a row: each round
	// brings up to wire.MaxUnacked of a lane, and who is left waits for the next
	// challenge.
	collectRounds = 4
)

// errStore marks failures of the store while an enclave is brought up.
var errStore = errors.New("store")

// bringUp configures the enclave, opens the keyring there, and verifies and
// stores what the boot says of itself. Every step may have been made before, by
// this process or another. fresh tells that this call opened the keyring.
func (u *unit) bringUp(ctx context.Context, c *signclient.Client) (b boot, fresh bool, err error) {
	if err := u.configure(ctx, c); err != nil {
		return boot{}, false, err
	}
	raw, err := u.awaitKeyring(ctx, c)
	if err != nil {
		return boot{}, false, err
	}
	header, err := sealed.DecodeHeader(raw)
	if err != nil {
		return boot{}, false, fmt.Errorf("keyring of the store: %w: %w", refusal.KeyringInvalid, err)
	}
	opened, err := c.Load(ctx, &wire.Load{Header: raw})
	if err != nil {
		return boot{}, false, err
	}
	b, err = u.p.want.checkBoot(c.BootID(), opened.Document, opened.Statement, header)
	if err != nil {
		return boot{}, false, err
	}
	err = u.p.store.PutBoot(ctx, store.Boot{ID: b.id, Document: opened.Document, Statement: opened.Statement, SeenAt: u.p.cfg.Now()})
	if err != nil {
		return boot{}, false, fmt.Errorf("keep boot %s: %w: %w", b.id, errStore, err)
	}
	return b, !opened.Already, nil
}

func (u *unit) configure(ctx context.Context, c *signclient.Client) error {
	reply, err := c.Configure(ctx, &wire.Configure{Config: u.p.cfg.EnclaveConfig})
	if err != nil {
		return err
	}
	want := config.PCR16(u.p.cfg.EnclaveConfig)
	if !bytes.Equal(reply.PCR16, want[:]) { //nolint:forbidigo // public; what counts is the register in the document
		return fmt.Errorf("configure: %w", refusal.ConfigMeasure)
	}
	return nil
}

// awaitKeyring reads the keyring's header, and waits where nobody has made one.
func (u *unit) awaitKeyring(ctx context.Context, c *signclient.Client) ([]byte, error) {
	id := sealed.KeyringID(u.p.parsed.Keyring, u.p.parsed.SealEpoch)
	for told := false; ; {
		raw, err := u.p.store.Keyring(ctx, id)
		if err == nil {
			return raw, nil
		}
		if !errors.Is(err, store.ErrNotFound) {
			return nil, fmt.Errorf("read keyring %s: %w: %w", id, errStore, err)
		}
		if !told {
			u.set(phaseNoKeyring, string(refusal.NoKeyring), record.BootID{})
			u.log.WarnContext(ctx, "no keyring yet: create one with keyhold keyring create", slog.String("keyring", id))
			told = true
		}
		select {
		case <-c.Done():
			return nil, fmt.Errorf("wait for keyring %s: %w", id, signclient.ErrLost)
		default:
		}
		if err := pause(ctx, keyringPoll); err != nil {
			return nil, err
		}
	}
}

// leftOff reports whether this process began to load the keys of that boot and
// did not finish.
func (u *unit) leftOff(id record.BootID) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.unfinished == id
}

func (u *unit) setUnfinished(id record.BootID) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.unfinished = id
}

// loadAll streams every sealed key of the keyring into the enclave.
func (u *unit) loadAll(ctx context.Context, c *signclient.Client, id record.BootID) error {
	u.setUnfinished(id)
	ring := sealed.KeyringID(u.p.parsed.Keyring, u.p.parsed.SealEpoch)
	header, err := u.p.store.Keyring(ctx, ring)
	if err != nil {
		return fmt.Errorf("read keyring %s: %w: %w", ring, errStore, err)
	}
	l := &loader{c: c, header: header}
	err = u.p.store.Keys(ctx, ring, func(page []store.Key) error {
		for _, k := range page {
			if err := l.add(ctx, k.Sealed); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		err = l.flush(ctx)
	}
	if err != nil {
		return fmt.Errorf("load keyring %s: %w", ring, err)
	}
	u.setUnfinished(record.BootID{})
	if l.refused > 0 {
		u.p.metrics.keysRefused.WithLabelValues(u.name).Add(float64(l.refused))
		u.log.ErrorContext(ctx, "enclave refused sealed keys", slog.Uint64("refused", l.refused))
	}
	u.log.InfoContext(ctx, "keyring loaded", slog.String("keyring", ring), slog.Uint64("loaded", l.loaded))
	return nil
}

// loader gathers sealed keys into requests as large as the wire permits.
type loader struct {
	c               *signclient.Client
	header          []byte
	keys            [][]byte
	size            int // bytes of keys
	loaded, refused uint64
}

func (l *loader) add(ctx context.Context, entry []byte) error {
	if len(l.keys) == wire.MaxLoadKeys || l.size+len(entry) > loadBytes {
		if err := l.flush(ctx); err != nil {
			return err
		}
	}
	l.keys = append(l.keys, entry)
	l.size += len(entry) + 8 // and its CBOR head
	return nil
}

func (l *loader) flush(ctx context.Context) error {
	if len(l.keys) == 0 {
		return nil
	}
	reply, err := l.c.Load(ctx, &wire.Load{Header: l.header, Keys: l.keys})
	if err != nil {
		return err
	}
	l.loaded += reply.Loaded
	l.refused += uint64(len(reply.Refused))
	l.keys, l.size = l.keys[:0], 0
	return nil
}

// collect stores and acknowledges the receipts of lanes without a connection, so
// that their chains are whole and the lanes can be handed out again.
func (u *unit) collect(ctx context.Context, c *signclient.Client, b boot) error {
	var ack []wire.LaneSeq
	for range collectRounds {
		reply, err := c.Receipts(ctx, &wire.Receipts{Ack: ack})
		if err != nil {
			return err
		}
		if len(reply.Receipts) == 0 {
			return nil
		}
		if ack, err = u.keepReceipts(ctx, b, reply.Receipts); err != nil {
			return err
		}
	}
	// Acknowledge the last round; what is new in this answer comes again.
	_, err := c.Receipts(ctx, &wire.Receipts{Ack: ack})
	return err
}

// keepReceipts verifies and stores receipts, and returns what to acknowledge.
func (u *unit) keepReceipts(ctx context.Context, b boot, signed [][]byte) ([]wire.LaneSeq, error) {
	newest := map[uint32]uint64{}
	for _, s := range signed {
		r, err := receipt.OpenReceipt(b.public, s)
		if err != nil {
			return nil, fmt.Errorf("receipt left behind: %w: %w", refusal.ReceiptInvalid, err)
		}
		// ErrDiffers is evidence: two receipts for one place in the chain.
		ref := store.ReceiptRef{BootID: r.BootID, Lane: r.Lane, Seq: r.Seq}
		if err := u.p.store.PutReceipt(ctx, store.Receipt{Ref: ref, Signed: s}); err != nil {
			return nil, fmt.Errorf("keep receipt %d of lane %d: %w: %w", r.Seq, r.Lane, errStore, err)
		}
		newest[r.Lane] = max(newest[r.Lane], r.Seq)
	}
	ack := make([]wire.LaneSeq, 0, len(newest))
	for lane, seq := range newest {
		ack = append(ack, wire.LaneSeq{Lane: lane, Seq: seq})
	}
	return ack, nil
}
