package boot_test

import (
	"bytes"
	"context"
	"crypto/sha512"
	"errors"
	"log/slog"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/enclave/internal/boot"
	"github.com/keyhold/keyhold/enclave/internal/kms"
	"github.com/keyhold/keyhold/enclave/internal/secret"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/keypolicy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is what a boot meets.
type world struct {
	nsm   *nsmtest.NSM
	kms   boot.KMS
	calls *[]string // what KMS was asked
	opt   boot.Options
}

// counted notes every call, and has the key policy admit the enclave.
type counted struct {
	boot.KMS
	nsm   nsm.Session
	calls *[]string
}

func (c counted) ReadLock(ctx context.Context) (*kms.Lock, error) {
	*c.calls = append(*c.calls, "ReadLock")
	pcr0, _, err0 := c.nsm.DescribePCR(0)
	pcr16, _, err16 := c.nsm.DescribePCR(16)
	if a, ok := c.KMS.(interface {
		Admit(keyARN string, pair keypolicy.Pair)
	}); ok && err0 == nil && err16 == nil {
		a.Admit(enclavetest.DefaultConfig().KMSKeyARN, keypolicy.Pair{PCR0: keypolicy.PCR(pcr0), PCR16: keypolicy.PCR(pcr16)})
	}
	return c.KMS.ReadLock(ctx)
}

func (c counted) GenerateDataKey(ctx context.Context, e map[string]string) ([]byte, *secret.Bytes, error) {
	*c.calls = append(*c.calls, "GenerateDataKey")
	return c.KMS.GenerateDataKey(ctx, e)
}

func (c counted) Decrypt(ctx context.Context, w []byte, e map[string]string) (*secret.Bytes, error) {
	*c.calls = append(*c.calls, "Decrypt")
	return c.KMS.Decrypt(ctx, w, e)
}

func newWorld(t *testing.T, debug bool, client boot.KMS) *world {
	t.Helper()
	ca, err := nsmtest.NewCA(nil)
	if err != nil {
		t.Fatal(err)
	}
	device, err := nsmtest.New(ca, nsmtest.Options{PCRs: nsmtest.Measurements("boot"), Debug: debug})
	if err != nil {
		t.Fatal(err)
	}
	calls := &[]string{}
	w := &world{nsm: device, kms: counted{client, device, calls}, calls: calls}
	begin := time.Now()
	w.opt = boot.Options{
		NSM: device, Entropy: func() error { return nil }, Mono: func() time.Duration { return time.Since(begin) },
		KMS: func(string, func() time.Time) (boot.KMS, error) { return w.kms, nil }, MaxLanes: 4, Prove: enclavetest.Prove,
		Logger: slog.New(slog.DiscardHandler),
	}
	return w
}

// start runs the boot until the test ends.
func (w *world) start(t *testing.T) *boot.Boot {
	t.Helper()
	b, err := boot.New(w.opt)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background()) // outlives the test's own context, until Cleanup
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("boot: %v", err)
		}
	})
	<-b.Started()
	return b
}

func encoded(t *testing.T, change func(*config.Config)) []byte {
	t.Helper()
	c := enclavetest.DefaultConfig()
	if change != nil {
		change(c)
	}
	raw, err := config.Encode(c)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func configure(t *testing.T, b *boot.Boot, raw []byte) (*wire.ConfigureReply, error) {
	t.Helper()
	return b.Configure(t.Context(), &wire.Configure{Config: raw})
}

// configured starts w and gives it the default config.
func (w *world) configured(t *testing.T) *boot.Boot {
	t.Helper()
	b := w.start(t)
	if _, err := configure(t, b, encoded(t, nil)); err != nil {
		t.Fatal(err)
	}
	return b
}

func want(t *testing.T, err error, code refusal.Code) {
	t.Helper()
	if code == "" && err != nil || code != "" && !errors.Is(err, code) {
		t.Errorf("got %v, want %q", err, code)
	}
}

func TestAConfigIsMeasuredAndLockedBeforeItIsParsed(t *testing.T) {
	w := newWorld(t, false, &enclavetest.KMS{})
	b := w.start(t)
	bad := []byte("{ this is no config")
	_, err := configure(t, b, bad)
	want(t, err, refusal.ConfigInvalid)
	value, locked, err := w.nsm.DescribePCR(16)
	want(t, err, "")
	if !locked || [48]byte(value) != config.PCR16(bad) {
		t.Error("what was refused is not what was measured")
	}
	// A good config cannot follow in this boot.
	for range 2 {
		_, err = configure(t, b, encoded(t, nil))
		want(t, err, refusal.ConfigInvalid)
	}
	_, err = b.CreateKeyring(t.Context())
	want(t, err, refusal.ConfigInvalid)
	if p := b.Progress(); p.State != wire.StateWaiting {
		t.Errorf("state %s", p.State)
	}
}

func TestAConfigCountsOnce(t *testing.T) {
	w := newWorld(t, false, &enclavetest.KMS{})
	b := w.start(t)
	raw := encoded(t, nil)
	other := encoded(t, func(c *config.Config) { c.Lease.MarginMS = 2000 })
	check := func(wantAlready bool) {
		t.Helper()
		reply, err := configure(t, b, raw)
		want(t, err, "")
		if reply.Already != wantAlready || [48]byte(reply.PCR16) != config.PCR16(raw) {
			t.Errorf("already %t, want %t", reply.Already, wantAlready)
		}
	}
	check(false)
	check(true)
	_, err := configure(t, b, other)
	want(t, err, refusal.ConfigConflict)
	_, err = b.CreateKeyring(t.Context())
	want(t, err, "")
	check(true)
	_, err = configure(t, b, other)
	want(t, err, refusal.ConfigConflict)
}

func TestPCR16MustBeZeroUnlockedAndTakeTheMeasurement(t *testing.T) {
	failing := errors.New("device fault")
	fault := func(op string, skip int) func(*testing.T, *world) {
		return func(_ *testing.T, w *world) {
			w.nsm.SetFaults(nsmtest.Faults{Fault: func(o string) error {
				if o != op {
					return nil
				}
				if skip--; skip < 0 {
					return failing
				}
				return nil
			}})
		}
	}
	for _, tc := range []struct {
		name      string
		prepare   func(*testing.T, *world)
		untouched []byte // what the register was extended with, and keeps
	}{
		{"extended before", func(t *testing.T, w *world) {
			t.Helper()
			if _, err := w.nsm.ExtendPCR(16, []byte("x")); err != nil {
				t.Fatal(err)
			}
		}, []byte("x")},
		{"extended before with the very config", func(t *testing.T, w *world) {
			t.Helper()
			m := config.Measurement(encoded(t, nil))
			if _, err := w.nsm.ExtendPCR(16, m[:]); err != nil {
				t.Fatal(err)
			}
		}, nil},
		{"locked before", func(t *testing.T, w *world) {
			t.Helper()
			if err := w.nsm.LockPCRs(17); err != nil {
				t.Fatal(err)
			}
		}, nil},
		{"cannot be read", fault(nsmtest.OpDescribe, 0), nil},
		{"cannot be extended", fault(nsmtest.OpExtend, 0), nil},
		{"cannot be locked", fault(nsmtest.OpLock, 0), nil},
		{"cannot be read after", fault(nsmtest.OpDescribe, 1), nil},
		{"answers another value", func(_ *testing.T, w *world) { w.opt.NSM = liar{w.nsm} }, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, false, &enclavetest.KMS{})
			tc.prepare(t, w)
			b := w.start(t)
			for range 2 {
				_, err := configure(t, b, encoded(t, nil))
				want(t, err, refusal.ConfigMeasure)
			}
			w.nsm.SetFaults(nsmtest.Faults{})
			if tc.untouched != nil {
				value, _, err := w.nsm.DescribePCR(16)
				want(t, err, "")
				if [48]byte(value) != extended(tc.untouched) {
					t.Error("a register that was not zero was extended")
				}
			}
			_, err := b.CreateKeyring(t.Context())
			want(t, err, refusal.ConfigMeasure) // for ever: nobody knows what the register stands for
			if len(*w.calls) != 0 {
				t.Errorf("KMS was asked: %v", *w.calls)
			}
		})
	}
}

// extended is the value of a zero register after that.
func extended(data []byte) [48]byte { return sha512.Sum384(append(make([]byte, 48), data...)) }

// liar extends and says that the value is another.
type liar struct{ nsm.Session }

func (l liar) ExtendPCR(i uint16, data []byte) ([]byte, error) {
	value, err := l.Session.ExtendPCR(i, data)
	value = bytes.Clone(value)
	value[47] ^= 1
	return value, err
}

func TestNothingButAConfigIsTakenFirst(t *testing.T) {
	w := newWorld(t, false, &enclavetest.KMS{})
	b := w.start(t)
	_, err := b.CreateKeyring(t.Context())
	want(t, err, refusal.NotConfigured)
	_, err = b.Load(t.Context(), &wire.Load{Header: []byte("x")})
	want(t, err, refusal.NotConfigured)
	_, err = b.Challenge(make([]byte, 32))
	want(t, err, refusal.NotConfigured)
	_, err = configure(t, b, make([]byte, config.MaxLen+1))
	want(t, err, refusal.TooLarge) // and measured nothing
	_, err = configure(t, b, encoded(t, nil))
	want(t, err, "")
	for n, code := range map[int]refusal.Code{0: refusal.BadMessage, 1: "", wire.MaxNonce: "", wire.MaxNonce + 1: refusal.BadMessage} {
		_, err = b.Challenge(make([]byte, n))
		want(t, err, code)
	}
}

func TestADebugEnclaveAsksKMSNothing(t *testing.T) {
	maker := newWorld(t, false, &enclavetest.KMS{})
	made, err := maker.configured(t).CreateKeyring(t.Context())
	want(t, err, "")

	w := newWorld(t, true, maker.kms)
	b := w.configured(t)
	*maker.calls = nil
	_, err = b.CreateKeyring(t.Context())
	want(t, err, refusal.DebugEnclave)
	_, err = b.Load(t.Context(), &wire.Load{Header: made.Header})
	want(t, err, refusal.DebugEnclave)
	if len(*w.calls)+len(*maker.calls) != 0 {
		t.Errorf("KMS was asked: %v %v", *w.calls, *maker.calls)
	}
}

func TestANewDataKeyIsOpenedAgainBeforeItIsUsed(t *testing.T) {
	for _, tc := range []struct {
		name string
		kms  boot.KMS
		want refusal.Code
	}{
		{"KMS gives it back", &enclavetest.KMS{}, ""},
		{"KMS gives another", forgetful{&enclavetest.KMS{}}, refusal.KMSReply},
		{"KMS does not open it", &enclavetest.KMS{Fail: failAt("Decrypt", kms.ErrDenied)}, refusal.KMSDenied},
		{"KMS makes none", &enclavetest.KMS{Fail: failAt("GenerateDataKey", kms.ErrThrottled)}, refusal.KMSThrottled},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, false, tc.kms)
			b := w.configured(t)
			_, err := b.CreateKeyring(t.Context())
			want(t, err, tc.want)
			if state := b.Progress().State; (state == wire.StateReady) != (tc.want == "") {
				t.Errorf("state %s", state)
			}
		})
	}
}

// forgetful opens every wrapped key to a fresh one.
type forgetful struct{ *enclavetest.KMS }

func (f forgetful) Decrypt(ctx context.Context, _ []byte, e map[string]string) (*secret.Bytes, error) {
	_, dek, err := f.GenerateDataKey(ctx, e)
	return dek, err
}

func failAt(op string, err error) func(string) error {
	return func(o string) error {
		if o == op {
			return err
		}
		return nil
	}
}

func TestErrorsOfKMSKeepTheirMeaning(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want refusal.Code
	}{
		{kms.ErrDebugEnclave, refusal.DebugEnclave},
		{kms.ErrNSM, refusal.NSMFailed},
		{kms.ErrCredentials, refusal.KMSCredentials},
		{kms.ErrDenied, refusal.KMSDenied},
		{kms.ErrKey, refusal.KMSDenied},
		{kms.ErrWrappedKey, refusal.KMSWrongKey},
		{kms.ErrThrottled, refusal.KMSThrottled},
		{kms.ErrUnreachable, refusal.KMSUnreachable},
		{kms.ErrTLS, refusal.KMSUnreachable},
		{kms.ErrReply, refusal.KMSReply},
		{kms.ErrUnknown, refusal.KMSReply},
		{errors.New("something else"), refusal.Internal},
	} {
		t.Run(string(tc.want), func(t *testing.T) {
			failing := true
			client := &enclavetest.KMS{Fail: func(string) error {
				if failing {
					return tc.err
				}
				return nil
			}}
			b := newWorld(t, false, client).configured(t)
			_, err := b.CreateKeyring(t.Context())
			if got := refusal.Of(err); got != tc.want {
				t.Errorf("got %s, want %s", got, tc.want)
			}
			failing = false // what failed may be asked again in the same boot
			_, err = b.CreateKeyring(t.Context())
			want(t, err, "")
		})
	}
}

func TestABootThatCannotBeAttestedHasNoKeyring(t *testing.T) {
	w := newWorld(t, false, &enclavetest.KMS{})
	b := w.configured(t)
	w.nsm.SetFaults(nsmtest.Faults{EmptyDocument: true})
	_, err := b.CreateKeyring(t.Context())
	want(t, err, refusal.NSMFailed)
	_, err = b.Challenge(make([]byte, 32))
	want(t, err, refusal.NSMFailed)
	if b.Progress().State != wire.StateConfigured {
		t.Errorf("state %s", b.Progress().State)
	}
	_, err = b.Engine().Load(t.Context(), nil)
	want(t, err, refusal.NoKeyring)
	w.nsm.SetFaults(nsmtest.Faults{})
	_, err = b.CreateKeyring(t.Context())
	want(t, err, "")
}

func TestAKeyringOfAnotherIsRefused(t *testing.T) {
	cfg := enclavetest.DefaultConfig()
	cfg.Epochs = []uint32{1, 2}
	client := &enclavetest.KMS{}
	wrap := func(keyring string, epoch uint32) []byte {
		wrapped, dek, err := client.GenerateDataKey(t.Context(), sealed.EncryptionContext(keyring, epoch))
		if err != nil {
			t.Fatal(err)
		}
		dek.Destroy()
		return wrapped
	}
	for _, tc := range []struct {
		name   string
		change func(*sealed.Header)
		want   refusal.Code
	}{
		{"nothing wrong", func(*sealed.Header) {}, ""},
		{"epoch that is open but does not seal", func(h *sealed.Header) { h.Epoch, h.WrappedDEK = 2, wrap("test", 2) }, ""},
		{"epoch that is not open", func(h *sealed.Header) { h.Epoch, h.WrappedDEK = 3, wrap("test", 3) }, refusal.EpochClosed},
		{"another keyring", func(h *sealed.Header) { h.Keyring, h.WrappedDEK = "other", wrap("other", 1) }, refusal.KeyringInvalid},
		{"another KMS key", func(h *sealed.Header) { h.KMSKeyARN = h.KMSKeyARN[:len(h.KMSKeyARN)-1] + "2" }, refusal.KeyringInvalid},
		{"another account", func(h *sealed.Header) {
			h.KMSKeyARN = "arn:aws:kms:eu-central-1:999999999999:key/00000000-0000-4000-8000-000000000001"
		}, refusal.KeyringInvalid},
		{"data key of another keyring", func(h *sealed.Header) { h.WrappedDEK = wrap("other", 1) }, refusal.KMSWrongKey},
		{"data key of another epoch", func(h *sealed.Header) { h.WrappedDEK = wrap("test", 2) }, refusal.KMSWrongKey},
		{"data key that this KMS key did not make", func(h *sealed.Header) { h.WrappedDEK = bytes.Repeat([]byte{7}, 184) }, refusal.KMSWrongKey},
		{"no data key", func(h *sealed.Header) { h.WrappedDEK = nil }, refusal.KeyringInvalid},
		{"another version", func(h *sealed.Header) { h.Version = 2 }, refusal.KeyringInvalid},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, false, client)
			b := w.start(t)
			_, err := configure(t, b, encoded(t, func(c *config.Config) { c.Epochs = []uint32{1, 2} }))
			want(t, err, "")
			h := &sealed.Header{Version: 1, Keyring: "test", Epoch: 1, KMSKeyARN: cfg.KMSKeyARN, WrappedDEK: wrap("test", 1)}
			tc.change(h)
			_, err = b.Load(t.Context(), &wire.Load{Header: sealed.EncodeHeader(h)})
			want(t, err, tc.want)
			local := tc.want == refusal.KeyringInvalid || tc.want == refusal.EpochClosed
			if asked := len(*w.calls) > 0; asked == local {
				t.Errorf("KMS was asked: %t", asked)
			}
		})
	}
}

func TestKeyringsCountOnce(t *testing.T) {
	client := &enclavetest.KMS{}
	maker := newWorld(t, false, client).configured(t)
	made, err := maker.CreateKeyring(t.Context())
	want(t, err, "")
	again, err := maker.CreateKeyring(t.Context())
	want(t, err, "")
	if string(made.Header) != string(again.Header) || string(made.Document) != string(again.Document) {
		t.Error("asked again, another keyring was made")
	}
	other, err := newWorld(t, false, client).configured(t).CreateKeyring(t.Context())
	want(t, err, "")

	loader := newWorld(t, false, client).configured(t)
	for _, already := range []bool{false, true} {
		reply, err := loader.Load(t.Context(), &wire.Load{Header: made.Header})
		want(t, err, "")
		if reply.Already != already || len(reply.Document) == 0 {
			t.Errorf("already %t, want %t", reply.Already, already)
		}
	}
	_, err = loader.Load(t.Context(), &wire.Load{Header: other.Header})
	want(t, err, refusal.KeyringConflict)
	_, err = loader.CreateKeyring(t.Context())
	want(t, err, refusal.KeyringConflict)
	_, err = maker.Load(t.Context(), &wire.Load{Header: other.Header})
	want(t, err, refusal.KeyringConflict)
}

func TestASealedKeyThatWasEditedIsRefusedAlone(t *testing.T) {
	client := &enclavetest.KMS{}
	made, err := enclavetest.New(t.Context(), enclavetest.Options{Keys: 3, KMS: client})
	want(t, err, "")
	defer made.Close()
	ring := made.Sealed()
	edit := func(change func(*sealed.Entry)) []byte {
		e, err := sealed.DecodeEntry(ring.Entries[1])
		want(t, err, "")
		change(e)
		return sealed.EncodeEntry(e)
	}
	stranger, err := enclavetest.New(t.Context(), enclavetest.Options{Keys: 1, KMS: client})
	want(t, err, "")
	defer stranger.Close()
	for _, tc := range []struct {
		name  string
		entry []byte
	}{
		{"a wider policy", edit(func(e *sealed.Entry) { e.Public.Policy = "open" })},
		{"another public key with its own id", edit(func(e *sealed.Entry) {
			e.Public.PublicKey = stranger.Keys()[0].PublicKey
			e.Public.KeyID = sealed.KeyID(e.Public.Algorithm, e.Public.PublicKey)
		})},
		{"another address", edit(func(e *sealed.Entry) { e.Public.Address = stranger.Keys()[0].Address })},
		{"another algorithm", edit(func(e *sealed.Entry) {
			e.Public.Algorithm = record.P256
			e.Public.KeyID = sealed.KeyID(record.P256, e.Public.PublicKey)
		})},
		{"another epoch", edit(func(e *sealed.Entry) { e.Public.Epoch = 2 })},
		{"a changed ciphertext", edit(func(e *sealed.Entry) { e.Ciphertext[0] ^= 1 })},
		{"a key of another keyring", stranger.Sealed().Entries[0]},
		{"cut off", ring.Entries[1][:50]},
		{"nothing", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newWorld(t, false, client).configured(t)
			keys := [][]byte{ring.Entries[0], tc.entry, ring.Entries[2]}
			reply, err := b.Load(t.Context(), &wire.Load{Header: ring.Header, Keys: keys})
			want(t, err, "")
			if reply.Loaded != 2 || reply.Total != 2 || !slices.Equal(reply.Refused, []uint32{1}) {
				t.Errorf("loaded %d, refused %v", reply.Loaded, reply.Refused)
			}
		})
	}
}

func TestWithoutEntropyThereIsNoEnclave(t *testing.T) {
	w := newWorld(t, false, &enclavetest.KMS{})
	w.opt.Entropy = func() error { return errors.New("weak") }
	b, err := boot.New(w.opt)
	want(t, err, "")
	want(t, b.Run(t.Context()), refusal.EntropyWeak)
	select {
	case <-b.Started():
		t.Error("started all the same")
	default:
	}
}

func TestWithoutTheNSMsTimeThereIsNoEnclave(t *testing.T) {
	w := newWorld(t, false, &enclavetest.KMS{})
	w.nsm.SetFaults(nsmtest.Faults{EmptyDocument: true})
	b, err := boot.New(w.opt)
	want(t, err, "")
	want(t, b.Run(t.Context()), refusal.NSMFailed)
}

// The clock is the NSM's, carried on: the parent's word and the kernel's wall
// clock have no part in it.
func TestTimeIsTheNSMsCarriedOn(t *testing.T) {
	at := time.Date(2033, 1, 2, 3, 4, 5, 0, time.UTC)
	ca, err := nsmtest.NewCA(func() time.Time { return at })
	want(t, err, "")
	w := newWorld(t, false, &enclavetest.KMS{})
	w.opt.NSM, err = nsmtest.New(ca, nsmtest.Options{PCRs: nsmtest.Measurements("x")})
	want(t, err, "")
	mono := 1000 * time.Hour
	w.opt.Mono = func() time.Duration { return mono }
	b := w.start(t)
	mono += 90 * time.Minute
	st := b.Engine().Status()
	if st.TimeMS != at.Add(90*time.Minute).UnixMilli() || st.UptimeMS != (90*time.Minute).Milliseconds() {
		t.Errorf("time %v, uptime %d ms", time.UnixMilli(st.TimeMS).UTC(), st.UptimeMS)
	}
}

func TestRequestsEndWithTheirContext(t *testing.T) {
	block := make(chan struct{})
	w := newWorld(t, false, &enclavetest.KMS{Fail: func(string) error { <-block; return kms.ErrUnreachable }})
	b := w.configured(t)
	ctx, cancel := context.WithCancel(t.Context())
	errs := make(chan error, 2)
	for range 2 { // one is at work, one waits for it
		go func() {
			_, err := b.CreateKeyring(ctx)
			errs <- err
		}()
	}
	cancel()
	for range 2 {
		if err := <-errs; !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	}
	close(block)
}
