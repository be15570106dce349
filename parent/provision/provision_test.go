package provision_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/provision"
	"github.com/keyhold/keyhold/parent/signclient"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/memory"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const ring = "test#1" // of enclavetest.DefaultConfig

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// bare boots an enclave that has its config and nothing else.
func bare(t *testing.T, o enclavetest.Options) *enclavetest.Server {
	t.Helper()
	o.Bare = true
	e, err := enclavetest.New(t.Context(), o)
	must(t, err)
	t.Cleanup(e.Close)
	configure(t, e)
	return e
}

func configure(t *testing.T, e *enclavetest.Server) {
	t.Helper()
	_, err := connect(t, e).Configure(t.Context(), &wire.Configure{Config: e.Config()})
	must(t, err)
}

func connect(t *testing.T, e *enclavetest.Server) *signclient.Client {
	t.Helper()
	c, err := signclient.Connect(t.Context(), e.Dial, signclient.Options{})
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

func cfg(t *testing.T, e *enclavetest.Server) *config.Config {
	t.Helper()
	c, err := config.Parse(e.Config())
	must(t, err)
	return c
}

func options(n int) provision.Options {
	return provision.Options{Algorithm: record.Ed25519, Policy: "default", Pool: "main", Count: n}
}

func stored(t *testing.T, s store.Store) (keys []store.Key) {
	t.Helper()
	must(t, s.Keys(t.Context(), ring, func(page []store.Key) error {
		keys = append(keys, page...)
		return nil
	}))
	return keys
}

// waiting is what the enclave still has to deliver to anybody.
func waiting(t *testing.T, e *enclavetest.Server) int {
	t.Helper()
	reply, err := connect(t, e).Receipts(t.Context(), &wire.Receipts{Ack: []wire.LaneSeq{}})
	must(t, err)
	return len(reply.Receipts)
}

// receipts checks the lanes of a boot: without gaps, and each about keys. It
// returns how many keys they are about.
func receipts(t *testing.T, s store.Store, e *enclavetest.Server) (keys int) {
	t.Helper()
	for lane := range uint32(64) {
		next := uint64(1)
		must(t, s.Receipts(t.Context(), e.BootID(), lane, 1, func(r store.Receipt) error {
			if r.Ref.Seq != next {
				return fmt.Errorf("receipt %d where %d is next", r.Ref.Seq, next)
			}
			next++
			signed, err := receipt.Decode[receipt.Signed](r.Signed)
			must(t, err)
			body, err := receipt.Decode[receipt.Receipt](signed.Body)
			must(t, err)
			if body.Subject != receipt.SubjectKeys || body.Seq != r.Ref.Seq || body.Lane != lane {
				t.Errorf("lane %d, receipt %d: %+v", lane, r.Ref.Seq, body)
			}
			keys += int(body.Count)
			return nil
		}))
	}
	return keys
}

func TestAKeyringAndItsKeysAreMadeOnceAndKept(t *testing.T) {
	e, s := bare(t, enclavetest.Options{}), memory.New()
	var progress []int
	o, seen := options(3), time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	o.Now = func() time.Time { return seen }
	o.Progress = func(done, total int) { progress = append(progress, done, total) }
	sum, err := provision.Run(t.Context(), connect(t, e), s, cfg(t, e), o)
	must(t, err)
	header, err := s.Keyring(t.Context(), ring)
	must(t, err)
	h, err := sealed.DecodeHeader(header)
	must(t, err)
	hello := connect(t, e).Hello()
	boot, err := s.Boot(t.Context(), e.BootID())
	must(t, err)
	if diff := cmp.Diff(store.Boot{ID: hello.BootID, Document: hello.Document, Statement: hello.Statement, SeenAt: seen}, boot); diff != "" {
		t.Error(diff)
	}
	want := provision.Summary{KeyringID: ring, Fingerprint: h.Fingerprint(), Created: true, Made: 3}
	if diff := cmp.Diff(want, sum); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]int{3, 3}, progress); diff != "" {
		t.Error(diff)
	}
	checkKeys(t, s)
	if n := receipts(t, s, e); n != 3 || len(stored(t, s)) != 3 || waiting(t, e) != 0 {
		t.Errorf("%d keys, receipts for %d, %d waiting", len(stored(t, s)), n, waiting(t, e))
	}

	// Again: nothing. More: only what is missing, also by another boot, which
	// opens what the first one sealed.
	want.Created, want.Had, want.Made = false, 3, 0
	again, err := provision.Run(t.Context(), connect(t, e), s, cfg(t, e), options(3))
	must(t, err)
	if diff := cmp.Diff(want, again); diff != "" {
		t.Error(diff)
	}
	must(t, e.Restart(t.Context()))
	configure(t, e)
	want.Made = 2
	more, err := provision.Run(t.Context(), connect(t, e), s, cfg(t, e), options(5))
	must(t, err)
	if diff := cmp.Diff(want, more); diff != "" {
		t.Error(diff)
	}
	if n := receipts(t, s, e); n != 2 || len(stored(t, s)) != 5 {
		t.Errorf("%d keys, the second boot has receipts for %d", len(stored(t, s)), n)
	}
}

// checkKeys checks that every key is the one that options asks for, and idle.
func checkKeys(t *testing.T, s store.Store) {
	t.Helper()
	for _, k := range stored(t, s) {
		entry, err := sealed.DecodeEntry(k.Sealed)
		must(t, err)
		if p := entry.Public; k.Pool != "main" || k.ID != p.KeyID || p.Policy != "default" || p.Algorithm != record.Ed25519 {
			t.Errorf("key %s in pool %s: %+v", k.ID, k.Pool, p)
		}
		if l, err := s.Lease(t.Context(), k.ID); err != nil || !l.Idle() {
			t.Errorf("key %s is not idle: %v", k.ID, err)
		}
	}
}

func TestAnEnclaveThatHasItsKeysOpenTakesMore(t *testing.T) {
	e, err := enclavetest.New(t.Context(), enclavetest.Options{Keys: 2})
	must(t, err)
	t.Cleanup(e.Close)
	s, sealedRing := memory.New(), e.Sealed()
	must(t, s.PutKeyring(t.Context(), ring, sealedRing.Header))
	sum, err := provision.Run(t.Context(), connect(t, e), s, cfg(t, e), options(1))
	must(t, err)
	if sum.Created || sum.Had != 0 || sum.Made != 1 {
		t.Errorf("%+v", sum)
	}
}

func TestKeysThatNobodyAskedForAreNotMade(t *testing.T) {
	e := bare(t, enclavetest.Options{})
	for name, change := range map[string]func(*provision.Options){
		"no pool":           func(o *provision.Options) { o.Pool = "" },
		"a bad pool":        func(o *provision.Options) { o.Pool = "Main/1" },
		"less than none":    func(o *provision.Options) { o.Count = -1 },
		"unknown algorithm": func(o *provision.Options) { o.Algorithm = "dsa" },
	} {
		o := options(1)
		change(&o)
		s := memory.New()
		if _, err := provision.Run(t.Context(), connect(t, e), s, cfg(t, e), o); !errors.Is(err, refusal.UsageWrong) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := s.Keyring(t.Context(), ring); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("%s: a keyring was made: %v", name, err)
		}
	}
}

func TestAPoolHasOneAlgorithm(t *testing.T) {
	e, s := bare(t, enclavetest.Options{}), memory.New()
	_, err := provision.Run(t.Context(), connect(t, e), s, cfg(t, e), options(1))
	must(t, err)
	o := options(1)
	o.Algorithm = record.P256
	_, err = provision.Run(t.Context(), connect(t, e), s, cfg(t, e), o)
	if !errors.Is(err, refusal.UsageWrong) || !strings.Contains(err.Error(), "pool main holds ed25519 keys") {
		t.Errorf("another algorithm in the pool: %v", err)
	}
	o.Pool = "other"
	_, err = provision.Run(t.Context(), connect(t, e), s, cfg(t, e), o)
	must(t, err)
	// Another policy of the same algorithm is counted on its own.
	o = options(1)
	o.Policy = "open"
	sum, err := provision.Run(t.Context(), connect(t, e), s, cfg(t, e), o)
	must(t, err)
	if sum.Had != 0 || sum.Made != 1 || len(stored(t, s)) != 3 {
		t.Errorf("%+v, %d keys", sum, len(stored(t, s)))
	}
}

func TestWhatTheConfigForbidsComesBackWithItsCode(t *testing.T) {
	c := enclavetest.DefaultConfig()
	c.Create = []config.Create{{Algorithm: record.Ed25519, Policy: "default", Max: 2}}
	e, s := bare(t, enclavetest.Options{Config: c}), memory.New()
	client := connect(t, e)
	for name, tt := range map[string]struct {
		change func(*provision.Options)
		want   refusal.Code
	}{
		"one too many":      {func(o *provision.Options) { o.Count = 3 }, refusal.CreateLimit},
		"another policy":    {func(o *provision.Options) { o.Policy = "open" }, refusal.CreateDenied},
		"no such policy":    {func(o *provision.Options) { o.Policy = "none" }, refusal.CreateDenied},
		"another algorithm": {func(o *provision.Options) { o.Algorithm, o.Pool = record.P256, "p" }, refusal.CreateDenied},
	} {
		o := options(1)
		tt.change(&o)
		if _, err := provision.Run(t.Context(), client, s, c, o); !errors.Is(err, tt.want) || refusal.Of(err) != tt.want {
			t.Errorf("%s: %v, want %s", name, err, tt.want)
		}
	}
	sum, err := provision.Run(t.Context(), client, s, c, options(2))
	if err != nil || sum.Made != 2 {
		t.Errorf("as many as permitted: %+v, %v", sum, err)
	}
}

func TestTwoThatMakeTheKeyringAtOnceAreToldWhatToDo(t *testing.T) {
	s, kms := memory.New(), &enclavetest.KMS{}
	first, second := bare(t, enclavetest.Options{KMS: kms}), bare(t, enclavetest.Options{KMS: kms})
	// The second looks before the first has stored, and stores after it.
	_, err := provision.Run(t.Context(), connect(t, second), &behind{Store: s, before: func() {
		_, err := provision.Run(t.Context(), connect(t, first), s, cfg(t, first), options(1))
		must(t, err)
	}}, cfg(t, second), options(1))
	if !errors.Is(err, refusal.KeyringConflict) || !strings.Contains(err.Error(), "restart this enclave") {
		t.Fatalf("the second: %v", err)
	}
	// Without a restart it holds another keyring than the stored one.
	if _, err = provision.Run(t.Context(), connect(t, second), s, cfg(t, second), options(1)); !errors.Is(err, refusal.KeyringConflict) {
		t.Fatalf("the second, again: %v", err)
	}
	must(t, second.Restart(t.Context()))
	configure(t, second)
	sum, err := provision.Run(t.Context(), connect(t, second), s, cfg(t, second), options(2))
	must(t, err)
	if sum.Created || sum.Had != 1 || sum.Made != 1 {
		t.Errorf("after a restart: %+v", sum)
	}
}

// behind is a store in which somebody else is faster.
type behind struct {
	provision.Store
	once   sync.Once
	before func()
}

func (b *behind) PutKeyring(ctx context.Context, id string, header []byte) error {
	b.once.Do(b.before)
	return b.Store.PutKeyring(ctx, id, header)
}

func TestBothOnOneEnclaveGetTheSameKeyring(t *testing.T) {
	e, s := bare(t, enclavetest.Options{}), memory.New()
	_, err := provision.Run(t.Context(), connect(t, e), &behind{Store: s, before: func() {
		_, err := provision.Run(t.Context(), connect(t, e), s, cfg(t, e), options(0))
		must(t, err)
	}}, cfg(t, e), options(1))
	must(t, err)
	if n := len(stored(t, s)); n != 1 {
		t.Errorf("%d keys", n)
	}
}

var errStore = errors.New("the store is away")

// dying fails its nth call, before or after it was applied, and every later one.
type dying struct {
	provision.Store
	n       int
	applied bool
	calls   []string
}

func (d *dying) call(name string, do func() error) error {
	d.calls = append(d.calls, name)
	switch {
	case len(d.calls) < d.n:
		return do()
	case len(d.calls) == d.n && d.applied:
		if err := do(); err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
	}
	return errStore
}

func (d *dying) PutKeyring(ctx context.Context, id string, header []byte) error {
	return d.call("PutKeyring", func() error { return d.Store.PutKeyring(ctx, id, header) })
}

func (d *dying) Keyring(ctx context.Context, id string) (h []byte, err error) {
	return h, d.call("Keyring", func() error { h, err = d.Store.Keyring(ctx, id); return err })
}

func (d *dying) PutKeys(ctx context.Context, keys []store.Key) error {
	return d.call("PutKeys", func() error { return d.Store.PutKeys(ctx, keys) })
}

func (d *dying) Keys(ctx context.Context, id string, f func([]store.Key) error) error {
	return d.call("Keys", func() error { return d.Store.Keys(ctx, id, f) })
}

func (d *dying) PutReceipt(ctx context.Context, r store.Receipt) error {
	return d.call("PutReceipt", func() error { return d.Store.PutReceipt(ctx, r) })
}

func (d *dying) PutBoot(ctx context.Context, b store.Boot) error {
	return d.call("PutBoot", func() error { return d.Store.PutBoot(ctx, b) })
}

func TestARunThatDiesAtAnyStoreCallIsContinued(t *testing.T) {
	calls := []string{"Keyring", "PutKeyring", "Keys", "PutBoot", "PutReceipt", "PutKeys"}
	for n := 1; n <= len(calls); n++ {
		for _, applied := range []bool{false, true} {
			for _, restarted := range []bool{false, true} {
				for _, connection := range []string{"same", "another"} {
					name := fmt.Sprintf("%s applied %v, enclave restarted %v, %s connection", calls[n-1], applied, restarted, connection)
					t.Run(name, func(t *testing.T) {
						e, s := bare(t, enclavetest.Options{}), memory.New()
						client := connect(t, e)
						d := &dying{Store: s, n: n, applied: applied}
						if _, err := provision.Run(t.Context(), client, d, cfg(t, e), options(2)); !errors.Is(err, errStore) {
							t.Fatalf("the first run: %v", err)
						}
						if !slices.Equal(d.calls, calls[:n]) {
							t.Fatalf("calls: %v", d.calls)
						}
						if restarted {
							must(t, e.Restart(t.Context()))
							configure(t, e)
						}
						if restarted || connection == "another" {
							client.Close()
							client = connect(t, e)
						}
						sum, err := provision.Run(t.Context(), client, s, cfg(t, e), options(2))
						must(t, err)
						client.Close()
						if got := len(stored(t, s)); got != 2 || sum.Had+sum.Made != 2 {
							t.Errorf("%d keys, %+v", got, sum)
						}
						// A receipt that was not stored is delivered again, so no lane has a gap.
						if made := receipts(t, s, e); made < sum.Made || waiting(t, e) != 0 {
							t.Errorf("receipts for %d keys, %d waiting, %+v", made, waiting(t, e), sum)
						}
					})
				}
			}
		}
	}
}

func TestARunThatTheEnclaveLosesIsContinued(t *testing.T) {
	e, s := bare(t, enclavetest.Options{}), memory.New()
	first := connect(t, e)
	lost := &losing{Enclave: first}
	if _, err := provision.Run(t.Context(), lost, s, cfg(t, e), options(2)); !errors.Is(err, signclient.ErrLost) {
		t.Fatalf("%v", err)
	}
	if n := len(stored(t, s)); n != 0 {
		t.Fatalf("%d keys of an answer that was lost", n)
	}
	first.Close() // its lane can be delivered to others now
	_, err := provision.Run(t.Context(), connect(t, e), s, cfg(t, e), options(2))
	must(t, err)
	// Those of the lost answer exist nowhere but in their receipt.
	if n := receipts(t, s, e); n != 4 || len(stored(t, s)) != 2 {
		t.Errorf("receipts for %d keys, %d keys", n, len(stored(t, s)))
	}
}

// losing loses the answer to AddKeys.
type losing struct{ provision.Enclave }

func (l *losing) AddKeys(ctx context.Context, req *wire.AddKeys) (*wire.AddKeysReply, error) {
	if _, err := l.Enclave.AddKeys(ctx, req); err != nil {
		return nil, err
	}
	return nil, signclient.ErrLost
}

// cutting notes how requests are cut.
type cutting struct {
	provision.Enclave
	sizes []uint32
	acks  []uint64
}

func (c *cutting) AddKeys(ctx context.Context, req *wire.AddKeys) (*wire.AddKeysReply, error) {
	c.sizes, c.acks = append(c.sizes, req.Count), append(c.acks, req.Ack)
	return c.Enclave.AddKeys(ctx, req)
}

func TestManyKeysAreMadeInPartsThatAreAcknowledged(t *testing.T) {
	e, s := bare(t, enclavetest.Options{}), memory.New()
	c := &cutting{Enclave: connect(t, e)}
	n := 2*wire.MaxAddKeys + 1
	_, err := provision.Run(t.Context(), c, s, cfg(t, e), options(n))
	must(t, err)
	if diff := cmp.Diff([]uint32{wire.MaxAddKeys, wire.MaxAddKeys, 1}, c.sizes); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]uint64{0, 1, 2}, c.acks); diff != "" {
		t.Error(diff)
	}
	if waiting(t, e) != 0 || receipts(t, s, e) != n {
		t.Errorf("receipts for %d keys, %d waiting", receipts(t, s, e), waiting(t, e))
	}
}

func TestRSAKeysAreMadeTwentyAtATime(t *testing.T) {
	if testing.Short() {
		t.Skip("makes 21 RSA keys")
	}
	e, s := bare(t, enclavetest.Options{}), memory.New()
	c := &cutting{Enclave: connect(t, e)}
	o := options(21)
	o.Algorithm = record.RSA2048
	_, err := provision.Run(t.Context(), c, s, cfg(t, e), o)
	must(t, err)
	if diff := cmp.Diff([]uint32{20, 1}, c.sizes); diff != "" {
		t.Error(diff)
	}
}

// lying changes what the enclave answers.
type lying struct {
	provision.Enclave
	keyring func(*wire.CreateKeyringReply)
	keys    func(*wire.AddKeysReply)
	waiting [][]byte
}

func (l *lying) CreateKeyring(ctx context.Context) (*wire.CreateKeyringReply, error) {
	r, err := l.Enclave.CreateKeyring(ctx)
	if err == nil && l.keyring != nil {
		l.keyring(r)
	}
	return r, err
}

func (l *lying) AddKeys(ctx context.Context, req *wire.AddKeys) (*wire.AddKeysReply, error) {
	r, err := l.Enclave.AddKeys(ctx, req)
	if err == nil && l.keys != nil {
		l.keys(r)
	}
	return r, err
}

func (l *lying) Receipts(ctx context.Context, req *wire.Receipts) (*wire.ReceiptsReply, error) {
	if l.waiting != nil {
		return &wire.ReceiptsReply{Receipts: l.waiting}, nil
	}
	return l.Enclave.Receipts(ctx, req)
}

func TestAnswersThatDoNotBelongTogetherAreNotStored(t *testing.T) {
	other, err := enclavetest.New(t.Context(), enclavetest.Options{Keys: 2, Algorithm: record.Ed25519})
	must(t, err)
	t.Cleanup(other.Close)
	for name, tt := range map[string]struct {
		lie  lying
		want error
	}{
		"a keyring of another name": {lying{keyring: func(r *wire.CreateKeyringReply) {
			h, err := sealed.DecodeHeader(r.Header)
			must(t, err)
			h.Keyring = "else"
			r.Header = sealed.EncodeHeader(h)
		}}, refusal.KeyringInvalid},
		"no keyring":              {lying{keyring: func(r *wire.CreateKeyringReply) { r.Header = nil }}, refusal.KeyringInvalid},
		"a key less":              {lying{keys: func(r *wire.AddKeysReply) { r.Keys = r.Keys[:1] }}, refusal.ReceiptInvalid},
		"in another order":        {lying{keys: func(r *wire.AddKeysReply) { slices.Reverse(r.Keys) }}, refusal.ReceiptInvalid},
		"keys of another keyring": {lying{keys: func(r *wire.AddKeysReply) { r.Keys = other.Sealed().Entries }}, refusal.SealedInvalid},
		"no key":                  {lying{keys: func(r *wire.AddKeysReply) { r.Keys[1] = []byte{0xa0} }}, sealed.ErrMalformed},
		"no receipt":              {lying{keys: func(r *wire.AddKeysReply) { r.Receipt = nil }}, refusal.ReceiptInvalid},
		"a receipt without content": {lying{keys: func(r *wire.AddKeysReply) {
			r.Receipt = receipt.Encode(&receipt.Signed{Body: []byte{}, Signature: []byte{}})
		}}, refusal.ReceiptInvalid},
		"no receipt waiting": {lying{waiting: [][]byte{{}}}, refusal.ReceiptInvalid},
	} {
		e, s := bare(t, enclavetest.Options{}), memory.New()
		tt.lie.Enclave = connect(t, e)
		if _, err := provision.Run(t.Context(), &tt.lie, s, cfg(t, e), options(2)); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
		if n := len(stored(t, s)); n != 0 {
			t.Errorf("%s: %d keys were stored", name, n)
		}
	}
}

func TestAnEnclaveThatIsDownEndsTheRun(t *testing.T) {
	e, s := bare(t, enclavetest.Options{}), memory.New()
	client := connect(t, e)
	_, err := provision.Run(t.Context(), client, s, cfg(t, e), options(1))
	must(t, err)
	e.Crash()
	if _, err := provision.Run(t.Context(), client, s, cfg(t, e), options(2)); !errors.Is(err, signclient.ErrLost) {
		t.Errorf("%v", err)
	}
}

func TestAStoreThatHoldsNoKeyringUnderTheNameIsRefused(t *testing.T) {
	e, s := bare(t, enclavetest.Options{}), memory.New()
	must(t, s.PutKeyring(t.Context(), ring, []byte{0xa0}))
	if _, err := provision.Run(t.Context(), connect(t, e), s, cfg(t, e), options(1)); !errors.Is(err, refusal.KeyringInvalid) {
		t.Errorf("a malformed header: %v", err)
	}
	e, s = bare(t, enclavetest.Options{}), memory.New()
	_, err := provision.Run(t.Context(), connect(t, e), s, cfg(t, e), options(0))
	must(t, err)
	must(t, s.PutKeys(t.Context(), []store.Key{{ID: record.KeyID{1}, Keyring: ring, Pool: "main", Sealed: []byte{0xa0}}}))
	if _, err := provision.Run(t.Context(), connect(t, e), s, cfg(t, e), options(1)); !errors.Is(err, sealed.ErrMalformed) {
		t.Errorf("a malformed key: %v", err)
	}
}
