package pipeline_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/store"
)

// way that a remote call goes wrong.
type way int

const (
	well       way = iota
	notApplied     // it fails and nothing was done
	applied        // it fails although it was done
	hangs          // no answer ever comes, and nothing was done
	hangsDone      // no answer ever comes, and it was done
)

var ways = []way{notApplied, applied, hangs, hangsDone}

func (w way) String() string {
	return [...]string{"well", "fails", "answer lost", "times out", "applied, times out"}[w]
}

// hangTime is when a store call that hangs is given up: two leases.
const hangTime = 2 * lease

// fault happens to the nth remote call of a run, from 1.
type fault struct {
	nth int
	way way
}

// plot counts the remote calls of a run, to the store and to the enclave, and
// spoils some of them. Calls before begin go well and are not counted.
type plot struct {
	faults []fault

	mu    sync.Mutex
	on    bool
	calls []string // by name
	hit   int      // faults that came to pass
}

func (p *plot) begin() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.on = true
}

// end lets all later calls go well.
func (p *plot) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.on = false
}

// oneStoreError reports whether all that happened was one answer of the store
// that said so.
func (p *plot) oneStoreError() bool {
	if len(p.faults) != 1 || p.hit != 1 {
		return false
	}
	f := p.faults[0]
	return (f.way == notApplied || f.way == applied) && strings.HasPrefix(p.calls[f.nth-1], "store.")
}

func (p *plot) next(name string) way {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.on {
		return well
	}
	p.calls = append(p.calls, name)
	for _, f := range p.faults {
		if f.nth == len(p.calls) {
			p.hit++
			return f.way
		}
	}
	return well
}

// plotted is a store whose calls are part of a plot.
type plotted struct {
	store.Store
	p *plot
}

func spoil[T any](ctx context.Context, s *plotted, name string, call func() (T, error)) (T, error) {
	var none T
	how := s.p.next("store." + name)
	if how == well || how == applied || how == hangsDone {
		v, err := call()
		if how == well {
			return v, err
		}
	}
	if how == hangs || how == hangsDone {
		t := time.NewTimer(hangTime)
		defer t.Stop()
		select {
		case <-t.C:
			return none, fmt.Errorf("%s: %w", name, context.DeadlineExceeded)
		case <-ctx.Done():
		}
	}
	return none, fmt.Errorf("%s: %w", name, errUnknown)
}

func spoil0(ctx context.Context, s *plotted, name string, call func() error) error {
	_, err := spoil(ctx, s, name, func() (struct{}, error) { return struct{}{}, call() })
	return err
}

func (s *plotted) Ready(ctx context.Context, shard int, until time.Time, limit int, page string) (store.ReadyPage, error) {
	return spoil(ctx, s, "ready", func() (store.ReadyPage, error) { return s.Store.Ready(ctx, shard, until, limit, page) })
}

func (s *plotted) Batch(ctx context.Context, id record.BatchID) (store.Batch, error) {
	return spoil(ctx, s, "batch", func() (store.Batch, error) { return s.Store.Batch(ctx, id) })
}

func (s *plotted) Payload(ctx context.Context, id record.BatchID) ([]byte, error) {
	return spoil(ctx, s, "payload", func() ([]byte, error) { return s.Store.Payload(ctx, id) })
}

func (s *plotted) Idle(ctx context.Context, pool string, shard, limit int) ([]store.IdleKey, error) {
	return spoil(ctx, s, "idle", func() ([]store.IdleKey, error) { return s.Store.Idle(ctx, pool, shard, limit) })
}

func (s *plotted) Lease(ctx context.Context, id record.KeyID) (store.Lease, error) {
	return spoil(ctx, s, "lease", func() (store.Lease, error) { return s.Store.Lease(ctx, id) })
}

func (s *plotted) Claim(ctx context.Context, c store.Claim) (store.Batch, error) {
	return spoil(ctx, s, "claim", func() (store.Batch, error) { return s.Store.Claim(ctx, c) })
}

func (s *plotted) Commit(ctx context.Context, c store.Commit) error {
	return spoil0(ctx, s, "commit", func() error { return s.Store.Commit(ctx, c) })
}

func (s *plotted) Release(ctx context.Context, b store.Batch, e store.End) error {
	return spoil0(ctx, s, "release", func() error { return s.Store.Release(ctx, b, e) })
}

func (s *plotted) NoteCrash(ctx context.Context, b store.Batch, crashed []uint32) error {
	return spoil0(ctx, s, "note_crash", func() error { return s.Store.NoteCrash(ctx, b, crashed) })
}

func (s *plotted) OpenImport(ctx context.Context, i store.Import) (store.Import, error) {
	return spoil(ctx, s, "open_import", func() (store.Import, error) { return s.Store.OpenImport(ctx, i) })
}

func (s *plotted) ReserveRecord(ctx context.Context, ref store.RecordRef, over *store.RecordRef) (store.RecordRef, error) {
	return spoil(ctx, s, "reserve_record", func() (store.RecordRef, error) { return s.Store.ReserveRecord(ctx, ref, over) })
}

func (s *plotted) PutPayload(ctx context.Context, id record.BatchID, p []byte) ([]byte, error) {
	return spoil(ctx, s, "put_payload", func() ([]byte, error) { return s.Store.PutPayload(ctx, id, p) })
}

func (s *plotted) PutBatch(ctx context.Context, b store.Batch) error {
	return spoil0(ctx, s, "put_batch", func() error { return s.Store.PutBatch(ctx, b) })
}

func (s *plotted) FinishImport(ctx context.Context, i store.Import) error {
	return spoil0(ctx, s, "finish_import", func() error { return s.Store.FinishImport(ctx, i) })
}

func (s *plotted) Import(ctx context.Context, id record.ImportID) (store.Import, error) {
	return spoil(ctx, s, "import", func() (store.Import, error) { return s.Store.Import(ctx, id) })
}

func (s *plotted) Record(ctx context.Context, id string) (store.RecordRef, error) {
	return spoil(ctx, s, "record", func() (store.RecordRef, error) { return s.Store.Record(ctx, id) })
}

func (s *plotted) PutReceipt(ctx context.Context, r store.Receipt) error {
	return spoil0(ctx, s, "put_receipt", func() error { return s.Store.PutReceipt(ctx, r) })
}

func (s *plotted) PutBoot(ctx context.Context, b store.Boot) error {
	return spoil0(ctx, s, "put_boot", func() error { return s.Store.PutBoot(ctx, b) })
}

func (s *plotted) PutKeyring(ctx context.Context, id string, header []byte) error {
	return spoil0(ctx, s, "put_keyring", func() error { return s.Store.PutKeyring(ctx, id, header) })
}

func (s *plotted) Keyring(ctx context.Context, id string) ([]byte, error) {
	return spoil(ctx, s, "keyring", func() ([]byte, error) { return s.Store.Keyring(ctx, id) })
}

func (s *plotted) PutKeys(ctx context.Context, keys []store.Key) error {
	return spoil0(ctx, s, "put_keys", func() error { return s.Store.PutKeys(ctx, keys) })
}

func (s *plotted) Key(ctx context.Context, id record.KeyID) (store.Key, error) {
	return spoil(ctx, s, "key", func() (store.Key, error) { return s.Store.Key(ctx, id) })
}

func (s *plotted) Keys(ctx context.Context, ring string, f func([]store.Key) error) error {
	return spoil0(ctx, s, "keys", func() error { return s.Store.Keys(ctx, ring, f) })
}

// wiretap carries frames between a parent and an enclave as a plot has it.
type wiretap struct {
	p       *plot
	enclave *enclavetest.Server
	running sync.WaitGroup
}

// dial counts as a call: it fails, or it hangs until the dialler gives up.
func (w *wiretap) dial(ctx context.Context) (net.Conn, error) {
	switch w.p.next("wire.dial") {
	case well, applied, hangsDone: // a connection that nobody uses is none
	case notApplied:
		return nil, errUnknown
	case hangs:
		<-ctx.Done()
		return nil, ctx.Err()
	}
	far, err := w.enclave.Dial(ctx)
	if err != nil {
		return nil, err
	}
	near, mine := net.Pipe()
	c := &tapped{parent: mine, enclave: far, verdicts: make(chan way, wire.MaxInFlight+1)}
	w.running.Go(func() { c.requests(w.p) })
	w.running.Go(c.answers)
	return near, nil
}

// tapped is one connection. Answers come in the order of their requests, so one
// verdict on each is enough.
type tapped struct {
	parent, enclave net.Conn
	verdicts        chan way // on the requests that the enclave has
}

func (c *tapped) close() {
	_ = c.parent.Close() // a pipe closes without an error
	_ = c.enclave.Close()
}

func (c *tapped) requests(p *plot) {
	defer c.close()
	defer close(c.verdicts)
	for {
		frame, err := wire.ReadFrame(c.parent)
		if err != nil {
			return
		}
		m, err := wire.Decode(frame)
		if err != nil {
			return
		}
		how := p.next("wire." + string(m.Type))
		switch how {
		case notApplied:
			return
		case hangs:
			_, _ = io.Copy(io.Discard, c.parent) // until the parent gives up
			return
		case well, applied, hangsDone:
		}
		c.verdicts <- how
		if wire.WriteFrame(c.enclave, frame) != nil {
			return
		}
	}
}

func (c *tapped) answers() {
	defer c.close()
	for {
		frame, err := wire.ReadFrame(c.enclave)
		if err != nil {
			return
		}
		switch <-c.verdicts {
		case applied:
			return
		case hangsDone:
			_, _ = io.Copy(io.Discard, c.enclave) // until the other side of the tap gives up
			return
		case well, notApplied, hangs:
		}
		if wire.WriteFrame(c.parent, frame) != nil {
			return
		}
	}
}
