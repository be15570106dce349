package parent_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent"
	"github.com/keyhold/keyhold/parent/intake"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/memory"
)

const (
	pool = "hot"
	keys = 3
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pipes is a listener on loopback as far as anybody can tell.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), closed: make(chan struct{})} }

func (l *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipes) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }

// world is one enclave that waits for its config, tables, and a parent.
type world struct {
	t       *testing.T
	enclave *enclavetest.Server
	sealed  enclavetest.Sealed
	store   *memory.Store
	cfg     parent.Config
	http    *pipes
	stop    context.CancelFunc
	done    chan error
	failing atomic.Bool // receipts cannot be stored
}

// receiptsFail is a store that keeps no receipt while told so.
type receiptsFail struct {
	store.Store
	failing *atomic.Bool
}

func (s receiptsFail) PutReceipt(ctx context.Context, r store.Receipt) error {
	if s.failing.Load() {
		return store.ErrThrottled
	}
	return s.Store.PutReceipt(ctx, r)
}

// newWorld makes a keyring with an enclave that is gone by then, and another
// enclave that may open it. Nothing is in the tables yet.
func newWorld(t *testing.T) *world {
	t.Helper()
	return newWorldOf(t, keys)
}

func newWorldOf(t *testing.T, keys int) *world {
	t.Helper()
	maker, err := enclavetest.New(t.Context(), enclavetest.Options{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, store: memory.New(), http: newPipes(), sealed: maker.Sealed(), done: make(chan error, 1)}
	maker.Close()
	w.enclave, err = enclavetest.New(t.Context(), enclavetest.Options{Bare: true, KMS: maker.KMS(), CA: maker.CA()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.enclave.Close)
	w.cfg = parent.Config{
		Store: receiptsFail{w.store, &w.failing}, Enclaves: []parent.Enclave{{Name: "one", Dial: w.enclave.Dial}}, EnclaveConfig: w.enclave.Config(),
		Root: attestation.TestRoot(w.enclave.CA().Root()), Images: []attestation.Image{{PCRs: map[int][]byte{0: w.enclave.PCR0()}}},
		HTTP: w.http, Workers: 2, Now: time.Now,
	}
	return w
}

// provision puts the keyring into the tables.
func (w *world) provision() {
	w.t.Helper()
	h, err := sealed.DecodeHeader(w.sealed.Header)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := w.store.PutKeyring(w.t.Context(), h.ID(), w.sealed.Header); err != nil {
		w.t.Fatal(err)
	}
	var ks []store.Key
	for _, raw := range w.sealed.Entries {
		e, err := sealed.DecodeEntry(raw)
		if err != nil {
			w.t.Fatal(err)
		}
		ks = append(ks, store.Key{ID: e.Public.KeyID, Keyring: h.ID(), Pool: pool, Sealed: raw})
	}
	if err := w.store.PutKeys(w.t.Context(), ks); err != nil {
		w.t.Fatal(err)
	}
}

// start runs the parent until end.
func (w *world) start() {
	ctx, cancel := context.WithCancel(w.t.Context())
	w.stop = cancel
	go func() { w.done <- parent.Run(ctx, w.cfg) }()
}

// end cancels the parent, which is no error and takes no longer than a lease.
func (w *world) end() {
	w.t.Helper()
	begin := time.Now()
	w.stop()
	if err := <-w.done; err != nil {
		w.t.Errorf("parent: %v", err)
	}
	if took := time.Since(begin); took > 15*time.Second {
		w.t.Errorf("the end took %v", took)
	}
}

// readiness is the body of /readyz.
type readiness struct {
	Ready    bool
	Enclaves []struct {
		Name, Phase, Code string
		BootID            string `json:"boot_id"`
		Live              bool
	}
}

func (w *world) get(path string) (int, string) {
	w.t.Helper()
	near, far := net.Pipe()
	defer near.Close()
	w.http.conns <- far
	go func() { _, _ = fmt.Fprintf(near, "GET %s HTTP/1.0\r\n\r\n", path) }() // the read below fails where this does
	resp, err := http.ReadResponse(bufio.NewReader(near), nil)
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func (w *world) readyz() (int, readiness) {
	w.t.Helper()
	code, body := w.get("/readyz")
	var r readiness
	if err := json.Unmarshal([]byte(body), &r); err != nil {
		w.t.Fatalf("%v in %s", err, body)
	}
	return code, r
}

// await looks once a second until the enclave is in that phase with that code.
func (w *world) await(phase, code string) readiness {
	w.t.Helper()
	for range 120 {
		status, r := w.readyz()
		if e := r.Enclaves[0]; e.Phase == phase && e.Code == code {
			if want := phase == "ready"; r.Ready != want || (status == http.StatusOK) != want {
				w.t.Fatalf("phase %s, but ready is %v with status %d", phase, r.Ready, status)
			}
			return r
		}
		<-time.After(time.Second)
	}
	_, r := w.readyz()
	w.t.Fatalf("not %s (%q) after two minutes: %+v", phase, code, r)
	return readiness{}
}

func TestABareEnclaveIsConfiguredLoadedVerifiedAndReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.provision()
		w.start()
		r := w.await("ready", "")
		if want := w.enclave.BootID().String(); r.Enclaves[0].BootID != want {
			t.Errorf("boot %s, want %s", r.Enclaves[0].BootID, want)
		}
		b, err := w.store.Boot(t.Context(), w.enclave.BootID())
		if err != nil {
			t.Fatal(err)
		}
		w.checkBoot(b)
		synctest.Wait()
		conn := w.lane()
		status, err := enclavetest.Ask[wire.StatusReply](conn, wire.TypeStatus, &wire.GetStatus{})
		if err != nil || status.Keys != keys {
			t.Errorf("the enclave has %+v, %v; want %d keys", status, err, keys)
		}
		if code, body := w.get("/healthz"); code != http.StatusOK || body != "{\"alive\":true}\n" {
			t.Errorf("/healthz: %d %s", code, body)
		}
		w.wantMetric(`keyhold_enclave_up{enclave="one"} 1`)
		w.end()
	})
}

// lane opens a connection as another parent would.
func (w *world) lane() net.Conn {
	w.t.Helper()
	conn, err := w.enclave.Dial(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	if _, err := enclavetest.Ask[wire.HelloReply](conn, wire.TypeHello, &wire.Hello{}); err != nil {
		w.t.Fatal(err)
	}
	return conn
}

// checkBoot verifies a stored boot as an auditor does.
func (w *world) checkBoot(b store.Boot) {
	w.t.Helper()
	pcr16 := config.PCR16(w.enclave.Config())
	rec, err := attestation.VerifyRecorded(b.Document, attestation.RecordedPolicy{
		Root: w.cfg.Root, Images: []attestation.Image{{PCRs: map[int][]byte{0: w.enclave.PCR0(), 16: pcr16[:]}}},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	doc, err := rec.Document()
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := receipt.CheckStatement(b.Statement, doc.PublicKey, doc.UserData); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) wantMetric(line string) {
	w.t.Helper()
	if _, body := w.get("/metrics"); !strings.Contains(body, line+"\n") {
		w.t.Errorf("no %q in the metrics", line)
	}
}

func TestWithoutAKeyringTheParentWaitsAndSaysSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		w.await("waiting_for_keyring", string(refusal.NoKeyring))
		w.provision()
		w.await("ready", "")
		w.end()
	})
}

func TestAKeyringLargerThanOneMessageIsLoadedWhole(t *testing.T) {
	const many = 2*wire.MaxLoadKeys + 1
	synctest.Test(t, func(t *testing.T) {
		w := newWorldOf(t, many)
		w.provision()
		w.start()
		w.await("ready", "")
		<-time.After(time.Minute)
		status, err := enclavetest.Ask[wire.StatusReply](w.lane(), wire.TypeStatus, &wire.GetStatus{})
		if err != nil || status.Keys != many {
			t.Errorf("the enclave has %+v, %v; want %d keys", status, err, many)
		}
		w.end()
	})
}

func TestARestartedEnclaveIsBroughtUpAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.provision()
		w.start()
		w.await("ready", "")
		first := w.enclave.BootID()
		w.enclave.Crash()
		w.await("failed", "enclave_unreachable")
		if err := w.enclave.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.await("ready", "")
		if w.enclave.BootID() == first {
			t.Fatal("the same boot")
		}
		boots, err := w.store.Boots(t.Context())
		if err != nil || len(boots) != 2 {
			t.Errorf("%d boots are stored, %v; want 2", len(boots), err)
		}
		w.end()
	})
}

func TestAnEnclaveThatDoesNotProveWhatItIsGetsNothing(t *testing.T) {
	other := make([]byte, 48)
	other[0] = 1
	for _, tt := range []struct {
		name    string
		prepare func(w *world)
		code    string
		attest  bool // counted as a failed attestation
	}{
		{"another image", func(w *world) {
			w.cfg.Images = []attestation.Image{{PCRs: map[int][]byte{0: other}}}
		}, attestation.ErrPCRMismatch.Code, true},
		{"another root", func(w *world) {
			ca, err := nsmtest.NewCA(time.Now)
			if err != nil {
				w.t.Fatal(err)
			}
			w.cfg.Root = attestation.TestRoot(ca.Root())
		}, attestation.ErrRoot.Code, true},
		{"a forged signature", func(w *world) {
			w.enclave.NSM().SetFaults(nsmtest.Faults{MangledSignature: true})
		}, attestation.ErrSignature.Code, true},
		{"an old nonce", func(w *world) {
			w.enclave.NSM().SetFaults(nsmtest.Faults{Nonce: make([]byte, 32)})
		}, attestation.ErrNonce.Code, true},
		{"configured with another config", func(w *world) {
			c := enclavetest.DefaultConfig()
			c.Keyring = "another"
			raw, err := config.Encode(c)
			if err != nil {
				w.t.Fatal(err)
			}
			if _, err := enclavetest.Ask[wire.ConfigureReply](w.lane(), wire.TypeConfigure, &wire.Configure{Config: raw}); err != nil {
				w.t.Fatal(err)
			}
		}, string(refusal.ConfigConflict), false},
		{"KMS gives no data key", func(w *world) {
			w.enclave.KMS().Fail = func(string) error { return refusal.KMSDenied }
		}, string(refusal.KMSDenied), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.t = t
				w.provision()
				tt.prepare(w)
				w.start()
				<-time.After(30 * time.Second)
				status, r := w.readyz()
				e := r.Enclaves[0]
				if status != http.StatusServiceUnavailable || r.Ready || e.Phase != "failed" || e.BootID != "" || e.Code != tt.code {
					t.Errorf("status %d: %+v, want failed with %s", status, r, tt.code)
				}
				w.wantMetric(`keyhold_enclave_up{enclave="one"} 0`)
				_, metrics := w.get("/metrics")
				if got := strings.Contains(metrics, `keyhold_attestation_failures_total{code="`+tt.code+`",enclave="one"}`); got != tt.attest {
					t.Errorf("attestation failure counted: %v, want %v", got, tt.attest)
				}
				w.end()
			})
		})
	}
}

func TestAnEnclaveThatStopsAttestingIsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.provision()
		w.start()
		w.await("ready", "")
		w.enclave.NSM().SetFaults(nsmtest.Faults{MangledSignature: true})
		w.await("failed", attestation.ErrSignature.Code)
		w.enclave.NSM().SetFaults(nsmtest.Faults{})
		w.await("ready", "")
		w.end()
	})
}

func TestReceiptsThatALostConnectionLeftBehindAreKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.provision()
		w.start()
		w.await("ready", "")
		synctest.Wait()
		conn := w.lane()
		ticket, err := enclavetest.Ask[wire.TicketReply](conn, wire.TypeTicket, &wire.GetTicket{})
		if err != nil {
			t.Fatal(err)
		}
		e, err := sealed.DecodeEntry(w.sealed.Entries[0])
		if err != nil {
			t.Fatal(err)
		}
		reply, err := enclavetest.Ask[wire.SignReply](conn, wire.TypeSign, &wire.Sign{
			Ticket: ticket.Ticket, BatchID: "imp-b0000000", ImportID: "imp", BatchFence: 1, KeyID: e.Public.KeyID, KeyFence: 1,
			LeaseMS: 10_000, Kind: record.Message, Payload: record.EncodePayload([]record.Record{{Payload: []byte("hello")}}), Probe: wire.NoProbe,
		})
		if err != nil {
			t.Fatal(err)
		}
		conn.Close() // and the receipt is not stored
		w.failing.Store(true)
		<-time.After(2 * time.Minute)
		w.await("ready", "") // a store that fails takes nothing from the enclave
		w.failing.Store(false)
		<-time.After(2 * time.Minute)
		var kept [][]byte
		for lane := range uint32(8) {
			err := w.store.Receipts(t.Context(), w.enclave.BootID(), lane, 1, func(r store.Receipt) error {
				kept = append(kept, r.Signed)
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		if len(kept) != 1 || string(kept[0]) != string(reply.Receipt) {
			t.Errorf("%d receipts are kept, want the one that was lost", len(kept))
		}
		w.end()
	})
}

func TestRecordsAreSignedFromImportToCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.provision()
		var lines strings.Builder
		const records, batches = 40, 8
		for i := range records {
			fmt.Fprintf(&lines, "{\"text\":\"record %d\"}\n", i)
		}
		sum, err := intake.Run(t.Context(), w.store, strings.NewReader(lines.String()), intake.Options{
			ImportID: "imp", Pool: pool, Kind: record.Message, BatchSize: records / batches, SigLen: record.Secp256k1.SignatureLen(), Now: time.Now, SpoolDir: t.TempDir(),
		})
		if err != nil {
			t.Fatal(err)
		}
		w.start()
		for n := range batches {
			id := record.MakeBatchID("imp", n)
			for {
				b, err := w.store.Batch(t.Context(), id)
				if err != nil {
					t.Fatal(err)
				}
				if b.State == record.Signed {
					break
				}
				if time.Now().Year() > 2000 {
					t.Fatalf("%s is %s after a year: %+v", id, b.State, sum)
				}
				<-time.After(time.Second)
			}
		}
		w.wantMetric(fmt.Sprintf(`keyhold_records_total{state="SIGNED"} %d`, records))
		w.wantMetric(fmt.Sprintf(`keyhold_batches_total{end="committed"} %d`, batches))
		w.wantMetric(fmt.Sprintf(`keyhold_claims_total{outcome="won"} %d`, batches))
		w.wantMetric(`keyhold_sign_in_flight 0`)
		w.end()
	})
}

func TestWhatIsWrongWithAConfigIsSaidAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		good := w.cfg
		if err := good.Validate(); err != nil {
			t.Fatalf("good: %v", err)
		}
		for _, tt := range []struct {
			name  string
			spoil func(c *parent.Config)
			want  string
		}{
			{"nothing", func(c *parent.Config) { c.Store = nil }, "a store is needed"},
			{"no enclave", func(c *parent.Config) { c.Enclaves = nil }, "at least one enclave"},
			{"two of a name", func(c *parent.Config) { c.Enclaves = append(c.Enclaves, c.Enclaves[0]) }, "a name of its own"},
			{"no dialer", func(c *parent.Config) { c.Enclaves = []parent.Enclave{{Name: "x"}} }, "needs a dialer"},
			{"no root", func(c *parent.Config) { c.Root = attestation.Root{} }, "root is needed"},
			{"no image", func(c *parent.Config) { c.Images = nil }, "wanted image"},
			{"PCR16 of another config", func(c *parent.Config) {
				c.Images = []attestation.Image{{PCRs: map[int][]byte{0: w.enclave.PCR0(), 16: make([]byte, 48)}}}
			}, "PCR16"},
			{"a public address", func(c *parent.Config) { c.HTTP = public{newPipes()} }, "loopback"},
			{"no config", func(c *parent.Config) { c.EnclaveConfig = []byte("{}") }, "config_invalid"},
			{"a lease beyond the config's", func(c *parent.Config) { c.Lease = time.Hour }, "lease.max_ms"},
			{"too many workers", func(c *parent.Config) { c.Workers = 1000 }, "workers"},
		} {
			c := good
			tt.spoil(&c)
			err := parent.Run(t.Context(), c)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
			}
		}
		err := (&parent.Config{}).Validate()
		if !errors.Is(err, refusal.UsageWrong) || strings.Count(err.Error(), "\n") < 3 {
			t.Errorf("empty config: %v, want everything that is wrong", err)
		}
	})
}

type public struct{ *pipes }

func (public) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1} }
