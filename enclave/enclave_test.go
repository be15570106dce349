package enclave_test

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/enclave"
	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/awslocal/kms"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	account   = "111122223333"
	region    = "eu-central-1"
	principal = "arn:aws:iam::111122223333:role/keyhold-parent"
	accessKey = "ASIALOCALROLE"
	image     = "enclave test image"
)

// host is a KMS with one key for this image and config, and a parent that
// forwards to it.
type host struct {
	kms         *kms.Server
	ca          *nsmtest.CA
	raw         []byte // the config
	keyARN      string
	kmsAddr     net.Addr
	credsAddr   net.Addr
	credentials atomic.Value // string, the answer
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{}
	h.credentials.Store(`{"AccessKeyId":"` + accessKey + `","SecretAccessKey":"secret","Token":"token","Expiration":"2099-01-01T00:00:00Z"}`)
	var err error
	if h.ca, err = nsmtest.NewCA(nil); err != nil {
		t.Fatal(err)
	}
	h.kms, err = kms.New(kms.Options{
		Dir: t.TempDir(), Account: account, Region: region, Root: h.ca.Root(), Logger: slog.New(slog.DiscardHandler),
		Credentials: func(id string) (kms.Credential, bool) {
			return kms.Credential{SecretAccessKey: "secret", SessionToken: "token", PrincipalARN: principal}, id == accessKey
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	h.keyARN = h.newKey(t, [48]byte{1}) // its pair follows from the config, which names the key
	cfg := enclavetest.DefaultConfig()
	cfg.KMSKeyARN = h.keyARN
	if h.raw, err = config.Encode(cfg); err != nil {
		t.Fatal(err)
	}
	h.admit(t, config.PCR16(h.raw))
	h.kmsAddr = h.serve(t, h.kms.Serve)
	creds := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || r.URL.Path != "/credentials" {
			http.NotFound(w, r)
			return
		}
		answer, _ := h.credentials.Load().(string)
		if _, err := w.Write([]byte(answer)); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(creds.Close)
	h.credsAddr = creds.Listener.Addr()
	return h
}

func (h *host) policy(t *testing.T, pcr16 [48]byte) []byte {
	t.Helper()
	p, err := kms.DefaultPolicy(account, principal, []kms.Pair{{PCR0: nsmtest.Measurements(image)[0], PCR16: pcr16[:]}})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (h *host) newKey(t *testing.T, pcr16 [48]byte) string {
	t.Helper()
	arn, err := h.kms.CreateKey(h.policy(t, pcr16))
	if err != nil {
		t.Fatal(err)
	}
	return arn
}

// admit lets the config with that PCR16 use the key, and no other.
func (h *host) admit(t *testing.T, pcr16 [48]byte) {
	t.Helper()
	if err := h.kms.PutKeyPolicy(h.keyARN, h.policy(t, pcr16)); err != nil {
		t.Fatal(err)
	}
}

func (h *host) serve(t *testing.T, f func(context.Context, net.Listener) error) net.Addr {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h.run(t, func(ctx context.Context) error { return f(ctx, l) })
	return l.Addr()
}

// run runs f until the test ends.
func (h *host) run(t *testing.T, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background()) // outlives the test's own context, until Cleanup
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("server: %v", err)
		}
	})
}

func dialer(addr func() net.Addr) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, addr().Network(), addr().String())
	}
}

// boot runs the whole enclave and returns a connection that has said hello.
func (h *host) boot(t *testing.T, change func(*enclave.Config)) net.Conn {
	t.Helper()
	return h.bootUnder(t, change, h.run)
}

// bootUnder does so with its own way to run it.
func (h *host) bootUnder(t *testing.T, change func(*enclave.Config), run func(*testing.T, func(context.Context) error)) net.Conn {
	t.Helper()
	device, err := nsmtest.New(h.ca, nsmtest.Options{PCRs: nsmtest.Measurements(image)})
	if err != nil {
		t.Fatal(err)
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", filepath.Join(t.TempDir(), "e"))
	if err != nil {
		t.Fatal(err)
	}
	cfg := enclave.Config{
		Listener: l, NSM: device, KMSRoots: h.kms.Roots(), Entropy: func() error { return nil },
		DialKMS: dialer(func() net.Addr { return h.kmsAddr }), DialCredentials: dialer(func() net.Addr { return h.credsAddr }),
		Logger: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&cfg)
	}
	run(t, func(ctx context.Context) error { return enclave.Run(ctx, cfg) })
	conn, err := new(net.Dialer).DialContext(t.Context(), "unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	ask[wire.HelloReply](t, conn, wire.TypeHello, &wire.Hello{})
	return conn
}

func ask[Reply any](t *testing.T, conn net.Conn, typ wire.Type, req any) *Reply {
	t.Helper()
	r, err := enclavetest.Ask[Reply](conn, typ, req)
	if err != nil {
		t.Fatalf("%s: %v", typ, err)
	}
	return r
}

// The whole enclave as production wires it, but for the NSM and the network:
// attested KMS over TLS, two boots of one keyring, one signature.
func TestKeysMadeInOneBootSignInAnother(t *testing.T) {
	h := newHost(t)
	conn := h.boot(t, nil)
	ask[wire.ConfigureReply](t, conn, wire.TypeConfigure, &wire.Configure{Config: h.raw})
	created := ask[wire.CreateKeyringReply](t, conn, wire.TypeCreateKeyring, &wire.CreateKeyring{})
	added := ask[wire.AddKeysReply](t, conn, wire.TypeAddKeys, &wire.AddKeys{Algorithm: record.Ed25519, Policy: "default", Count: 2})

	conn = h.boot(t, nil)
	ask[wire.ConfigureReply](t, conn, wire.TypeConfigure, &wire.Configure{Config: h.raw})
	loaded := ask[wire.LoadReply](t, conn, wire.TypeLoad, &wire.Load{Header: created.Header, Keys: added.Keys})
	if loaded.Loaded != 2 {
		t.Fatalf("load: %+v", loaded)
	}
	e, err := sealed.DecodeEntry(added.Keys[0])
	if err != nil {
		t.Fatal(err)
	}
	ticket := ask[wire.TicketReply](t, conn, wire.TypeTicket, &wire.GetTicket{}).Ticket
	reply := ask[wire.SignReply](t, conn, wire.TypeSign, &wire.Sign{
		Ticket: ticket, BatchID: "imp-b0000000", ImportID: "imp", BatchFence: 1, KeyID: e.Public.KeyID, KeyFence: 1, LeaseMS: 10_000,
		Kind: record.Message, Payload: record.EncodePayload([]record.Record{{Payload: []byte("x")}}), Probe: wire.NoProbe,
	})
	if _, out, err := record.DecodeResult(reply.Result); err != nil || len(out) != 1 || out[0].Refusal != "" {
		t.Errorf("result %v, %v", out, err)
	}
	if st := ask[wire.StatusReply](t, conn, wire.TypeStatus, &wire.GetStatus{}); st.TimeMS < time.Now().Add(-time.Minute).UnixMilli() || st.Signed != 1 {
		t.Errorf("status %+v", st)
	}
}

func TestWithoutItsRightsAnEnclaveGetsNoDataKey(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*testing.T, *host, *enclave.Config)
		want   refusal.Code
	}{
		{"the key policy admits another config", func(t *testing.T, h *host, _ *enclave.Config) {
			t.Helper()
			h.admit(t, [48]byte{2})
		}, refusal.PolicyForeign},
		{"a debug enclave", func(t *testing.T, h *host, c *enclave.Config) {
			t.Helper()
			device, err := nsmtest.New(h.ca, nsmtest.Options{Debug: true})
			if err != nil {
				t.Fatal(err)
			}
			c.NSM = device
		}, refusal.DebugEnclave},
		{"an NSM under another root", func(t *testing.T, _ *host, c *enclave.Config) {
			t.Helper()
			ca, err := nsmtest.NewCA(nil)
			if err != nil {
				t.Fatal(err)
			}
			if c.NSM, err = nsmtest.New(ca, nsmtest.Options{PCRs: nsmtest.Measurements(image)}); err != nil {
				t.Fatal(err)
			}
		}, refusal.KMSDenied},
		{"KMS has no certificate of the roots", func(_ *testing.T, _ *host, c *enclave.Config) { c.KMSRoots = x509.NewCertPool() }, refusal.KMSUnreachable},
		{"the forwarder is away", func(_ *testing.T, _ *host, c *enclave.Config) {
			c.DialKMS = func(context.Context) (net.Conn, error) { return nil, errors.New("refused") }
		}, refusal.KMSUnreachable},
		{"the credential server is away", func(_ *testing.T, _ *host, c *enclave.Config) {
			c.DialCredentials = func(context.Context) (net.Conn, error) { return nil, errors.New("refused") }
		}, refusal.KMSCredentials},
		{"credentials that nobody knows", func(_ *testing.T, h *host, _ *enclave.Config) {
			h.credentials.Store(`{"AccessKeyId":"ASIAOTHER","SecretAccessKey":"secret","Token":"token"}`)
		}, refusal.KMSCredentials},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := newHost(t)
			conn := h.boot(t, func(c *enclave.Config) { tc.change(t, h, c) })
			ask[wire.ConfigureReply](t, conn, wire.TypeConfigure, &wire.Configure{Config: h.raw})
			_, err := enclavetest.Ask[wire.CreateKeyringReply](conn, wire.TypeCreateKeyring, &wire.CreateKeyring{})
			if !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %s", err, tc.want)
			}
		})
	}
}

// Somebody loosens the policy, grants the key away or retires the pair while the
// enclave runs: within revalidate_every it has wiped its keys and is gone.
func TestALooserLockEndsARunningEnclave(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		change func(*host) error
		want   refusal.Code
	}{
		{"an Allow for everybody, and no Deny", func(h *host) error {
			return h.kms.PutKeyPolicy(h.keyARN, []byte(`{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":"*","Action":"kms:*","Resource":"*"}]}`))
		}, refusal.PolicyLoose},
		{"a grant", func(h *host) error {
			f := kms.PlainFacts()
			f.Grants = 1
			return h.kms.SetFacts(h.keyARN, f)
		}, refusal.KMSKeyUnfit},
		{"another pair alone", func(h *host) error { return h.kms.PutKeyPolicy(h.keyARN, h.policy(t, [48]byte{2})) }, refusal.PolicyForeign},
		{"a disabled key", func(h *host) error { return h.kms.SetEnabled(h.keyARN, false) }, refusal.KMSKeyUnfit},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			cfg, err := config.Parse(h.raw)
			if err != nil {
				t.Fatal(err)
			}
			cfg.KeyPolicy.RevalidateEveryS = 5 // the shortest
			if h.raw, err = config.Encode(cfg); err != nil {
				t.Fatal(err)
			}
			h.admit(t, config.PCR16(h.raw))
			ended := make(chan error, 1)
			conn := h.bootUnder(t, nil, func(t *testing.T, f func(context.Context) error) {
				t.Helper()
				go func() { ended <- f(context.WithoutCancel(t.Context())) }()
			})
			ask[wire.ConfigureReply](t, conn, wire.TypeConfigure, &wire.Configure{Config: h.raw})
			ask[wire.CreateKeyringReply](t, conn, wire.TypeCreateKeyring, &wire.CreateKeyring{})
			ask[wire.AddKeysReply](t, conn, wire.TypeAddKeys, &wire.AddKeys{Algorithm: record.Ed25519, Policy: "default", Count: 1})
			if err := tc.change(h); err != nil {
				t.Fatal(err)
			}
			select {
			case err := <-ended:
				if !errors.Is(err, tc.want) {
					t.Errorf("it ended with %v, want %s", err, tc.want)
				}
			case <-time.After(time.Minute):
				t.Error("it goes on")
			}
			if _, err := enclavetest.Ask[wire.StatusReply](conn, wire.TypeStatus, &wire.GetStatus{}); err == nil {
				t.Error("it still answers")
			}
		})
	}
}

func TestADataKeyOfAnotherKMSKeyIsRefused(t *testing.T) {
	h := newHost(t)
	conn := h.boot(t, nil)
	ask[wire.ConfigureReply](t, conn, wire.TypeConfigure, &wire.Configure{Config: h.raw})
	created := ask[wire.CreateKeyringReply](t, conn, wire.TypeCreateKeyring, &wire.CreateKeyring{})
	header, err := sealed.DecodeHeader(created.Header)
	if err != nil {
		t.Fatal(err)
	}

	// The same keyring and epoch under another key: root on the parent has put
	// the first key's wrapped data key into a header that names the second.
	other := newHost(t)
	header.KMSKeyARN = other.keyARN
	conn = other.boot(t, nil)
	ask[wire.ConfigureReply](t, conn, wire.TypeConfigure, &wire.Configure{Config: other.raw})
	_, err = enclavetest.Ask[wire.LoadReply](conn, wire.TypeLoad, &wire.Load{Header: sealed.EncodeHeader(header)})
	if !errors.Is(err, refusal.KMSWrongKey) {
		t.Errorf("got %v, want %s", err, refusal.KMSWrongKey)
	}
}

func TestRunEndsWithoutEntropy(t *testing.T) {
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", filepath.Join(t.TempDir(), "e"))
	if err != nil {
		t.Fatal(err)
	}
	h := &host{}
	if h.ca, err = nsmtest.NewCA(nil); err != nil {
		t.Fatal(err)
	}
	device, err := nsmtest.New(h.ca, nsmtest.Options{PCRs: nsmtest.Measurements(image)})
	if err != nil {
		t.Fatal(err)
	}
	none := func(context.Context) (net.Conn, error) { return nil, errors.New("none") }
	err = enclave.Run(t.Context(), enclave.Config{
		Listener: l, NSM: device, KMSRoots: x509.NewCertPool(), DialKMS: none, DialCredentials: none,
		Entropy: func() error { return errors.New("weak") }, Logger: slog.New(slog.DiscardHandler),
	})
	if !errors.Is(err, refusal.EntropyWeak) {
		t.Errorf("got %v", err)
	}
	if conn, err := new(net.Dialer).DialContext(t.Context(), "unix", l.Addr().String()); err == nil {
		conn.Close()
		t.Error("the listener is still open")
	}
}

func TestMemoryIsKeptFromDebuggersAndCoreFiles(t *testing.T) {
	newHost(t).boot(t, nil)
	if dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); err != nil || dumpable != 0 {
		t.Errorf("dumpable %d, %v", dumpable, err)
	}
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &l); err != nil || l.Cur != 0 || l.Max != 0 {
		t.Errorf("core limit %+v, %v", l, err)
	}
}

func TestValidateNamesEverythingThatIsMissing(t *testing.T) {
	c := enclave.Config{MaxConns: -1}
	err := c.Validate()
	if err == nil {
		t.Fatal("an empty config is valid")
	}
	for _, field := range []string{"Listener", "NSM", "KMSRoots", "DialKMS", "DialCredentials", "Logger", "MaxConns"} {
		if !strings.Contains(err.Error(), field) {
			t.Errorf("%s is not named in %q", field, err)
		}
	}
	if err := enclave.Run(t.Context(), c); err == nil {
		t.Error("ran with an empty config")
	}
}
