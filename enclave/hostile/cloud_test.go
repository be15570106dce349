package hostile_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"
	"time"

	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/enclave"
	"github.com/keyhold/keyhold/enclave/internal/kms"
	localkms "github.com/keyhold/keyhold/internal/awslocal/kms"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/internal/wire"
)

const (
	account   = "111122223333"
	region    = "eu-central-1"
	role      = "arn:aws:iam::111122223333:role/keyhold-parent"
	accessKey = "ASIALOCALROLE"
)

// dialFunc is the form of the enclave's dialers.
type dialFunc = func(context.Context) (net.Conn, error)

// cloud is a KMS with one key that admits one image and config, and what root on
// the parent puts around the enclave: the forwarder, the credential server and
// the machine itself.
type cloud struct {
	*judge
	kms       *localkms.Server
	dir       string // of the KMS
	ca        *nsmtest.CA
	raw       []byte // the config
	kmsAddr   net.Addr
	credsAddr net.Addr
	logged    log

	header []byte
	keys   [][]byte
}

// machine is what one boot of an enclave runs on.
type machine struct {
	device           *nsmtest.NSM
	kms, credentials dialFunc
}

func newCloud(t *testing.T) *cloud {
	t.Helper()
	c := &cloud{dir: t.TempDir()}
	var err error
	c.ca, err = nsmtest.NewCA(nil)
	must(t, err)
	o := c.options(t)
	c.kms, err = localkms.New(o)
	must(t, err)
	arn, err := c.kms.CreateKey(c.policy(t, [48]byte{1})) // its pair follows from the config, which names the key
	must(t, err)
	cfg := testConfig()
	cfg.KMSKeyARN = arn
	c.judge = newJudge(cfg)
	c.raw, err = config.Encode(cfg)
	must(t, err)
	must(t, c.kms.PutKeyPolicy(arn, c.policy(t, config.PCR16(c.raw))))
	c.kmsAddr = c.listen(t, c.kms.Serve)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if _, err := w.Write([]byte(`{"AccessKeyId":"` + accessKey + `","SecretAccessKey":"secret","Token":"token"}`)); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(srv.Close)
	c.credsAddr = srv.Listener.Addr()
	return c
}

func (c *cloud) options(t *testing.T) localkms.Options {
	t.Helper()
	return localkms.Options{
		Dir: c.dir, Account: account, Region: region, Root: c.ca.Root(), Logger: slog.New(slog.DiscardHandler),
		Credentials: func(id string) (localkms.Credential, bool) {
			known := map[string]string{accessKey: role, "ASIAOTHERROLE": "arn:aws:iam::111122223333:role/another"}
			return localkms.Credential{SecretAccessKey: "secret", SessionToken: "token", PrincipalARN: known[id]}, known[id] != ""
		},
	}
}

func (*cloud) policy(t *testing.T, pcr16 [48]byte) []byte {
	t.Helper()
	p, err := localkms.DefaultPolicy(account, role, []localkms.Pair{{PCR0: image(), PCR16: pcr16[:]}})
	must(t, err)
	return p
}

// listen runs a server until the test ends.
func (c *cloud) listen(t *testing.T, serve func(context.Context, net.Listener) error) net.Addr {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(t, err)
	c.run(t, func(ctx context.Context) error { return serve(ctx, l) })
	return l.Addr()
}

// listenTLS serves h behind a certificate of the test's choice.
func (*cloud) listenTLS(t *testing.T, conf *tls.Config, h http.Handler) net.Addr {
	t.Helper()
	srv := httptest.NewUnstartedServer(h)
	srv.TLS = conf
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return srv.Listener.Addr()
}

func (*cloud) run(t *testing.T, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("server: %v", err)
		}
	})
}

func dialer(addr net.Addr) dialFunc {
	return func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, addr.Network(), addr.String())
	}
}

// tap lets the judge hear what the enclave sends to a server of the parent.
func (c *cloud) tap(dial dialFunc) dialFunc {
	return func(ctx context.Context) (net.Conn, error) {
		conn, err := dial(ctx)
		if err != nil {
			return nil, err
		}
		return &sending{Conn: conn, judge: c.judge}, nil
	}
}

// sending is a connection that the enclave dialled: what it writes comes out.
type sending struct {
	net.Conn
	judge *judge
	out   bytes.Buffer
}

func (s *sending) Write(p []byte) (int, error) {
	s.judge.mu.Lock()
	s.out.Write(p)
	s.judge.mu.Unlock()
	return s.Conn.Write(p)
}

func (s *sending) Close() error {
	s.judge.mu.Lock()
	s.judge.out = append(s.judge.out, bytes.Clone(s.out.Bytes()))
	s.out.Reset()
	s.judge.mu.Unlock()
	return s.Conn.Close()
}

// newNSM is the device of one boot of our image.
func (c *cloud) newNSM(t *testing.T) *nsmtest.NSM {
	t.Helper()
	n, err := nsmtest.New(c.ca, nsmtest.Options{PCRs: nsmtest.Measurements("enclavetest")})
	must(t, err)
	return n
}

// boot runs the whole enclave as production wires it, on a machine that change
// may have spoilt, and returns a connection that has said hello.
func (c *cloud) boot(t *testing.T, change func(*machine)) *tapped {
	t.Helper()
	m := &machine{device: c.newNSM(t), kms: dialer(c.kmsAddr), credentials: dialer(c.credsAddr)}
	if change != nil {
		change(m)
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", filepath.Join(t.TempDir(), "e"))
	must(t, err)
	c.run(t, func(ctx context.Context) error {
		return enclave.Run(ctx, enclave.Config{
			Listener: l, NSM: m.device, KMSRoots: c.kms.Roots(), Entropy: func() error { return nil },
			DialKMS: c.tap(m.kms), DialCredentials: c.tap(m.credentials),
			Logger: slog.New(slog.NewJSONHandler(&c.logged, &slog.HandlerOptions{Level: slog.LevelDebug})),
		})
	})
	raw, err := new(net.Dialer).DialContext(t.Context(), "unix", l.Addr().String())
	must(t, err)
	conn := &tapped{Conn: raw, judge: c.judge}
	t.Cleanup(func() { _ = conn.Close() }) // closed by either side
	ask[wire.HelloReply](t, conn, wire.TypeHello, &wire.Hello{})
	return conn
}

// opens shows that the keyring still opens where nobody interferes.
func (c *cloud) opens(t *testing.T) {
	t.Helper()
	conn := c.boot(t, nil)
	ask[wire.ConfigureReply](t, conn, wire.TypeConfigure, &wire.Configure{Config: c.raw})
	if r := ask[wire.LoadReply](t, conn, wire.TypeLoad, &wire.Load{Header: c.header, Keys: c.keys}); r.Loaded != 1 {
		t.Errorf("our own key does not open: %+v", r)
	}
	ticket := ask[wire.TicketReply](t, conn, wire.TypeTicket, &wire.GetTicket{}).Ticket
	ask[wire.SignReply](t, conn, wire.TypeSign, &wire.Sign{
		Ticket: ticket, BatchID: "imp-b0000000", ImportID: "imp", BatchFence: 1, KeyID: public(t, c.keys[0]).KeyID, KeyFence: 1,
		LeaseMS: 10_000, Kind: record.Message, Payload: records("one"), Refuse: []uint32{}, Probe: wire.NoProbe,
	})
	must(t, conn.Close())
}

// settle gets the data key as our enclave would and lets the judge look for it in
// all that came out.
func (c *cloud) settle(t *testing.T) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	device := c.newNSM(t)
	m := config.Measurement(c.raw)
	_, err := device.ExtendPCR(16, m[:])
	must(t, err)
	must(t, device.LockPCRs(17))
	client, err := kms.New(kms.Options{
		KeyARN: c.cfg.KMSKeyARN, Dial: dialer(c.kmsAddr), Roots: c.kms.Roots(), Now: time.Now, NSM: device, Logger: slog.New(slog.DiscardHandler),
		Credentials: func(context.Context) (kms.Credentials, error) {
			return kms.Credentials{AccessKeyID: accessKey, SecretAccessKey: "secret", SessionToken: "token"}, nil
		},
	})
	must(t, err)
	h, err := sealed.DecodeHeader(c.header)
	must(t, err)
	s, err := client.Decrypt(ctx, h.WrappedDEK, sealed.EncryptionContext(h.Keyring, h.Epoch))
	must(t, err)
	defer s.Destroy()
	var dek []byte
	must(t, s.Use(func(b []byte) error { dek = bytes.Clone(b); return nil }))
	c.hear(nil, c.logged.b.Bytes())
	c.knows(t, dek, c.entries)
	t.Logf("the judge read %d streams and verified %d signatures", len(c.out), c.verdict(t))
}
