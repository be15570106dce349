package hostile_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/enclave/enclavetest"
	localkms "github.com/keyhold/keyhold/internal/awslocal/kms"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/internal/wire"
)

func kmsAttacks() []attack {
	return []attack{
		{"answers as KMS with certificates of its own and a forged CMS envelope", "H1", []outcome{code(refusal.KMSUnreachable)}, ownCertificates},
		{"sends the enclave to the KMS of another region, with a good certificate", "H1", []outcome{code(refusal.KMSUnreachable)}, otherRegion},
		{"flips bytes of the TLS streams between enclave and KMS, and cuts them", "H1", []outcome{code(refusal.KMSUnreachable)}, spoilTLS},
		{"replays KMS's answer to another request, TLS being broken", "H1", []outcome{code(refusal.KMSReply)}, replayReply},
		{"boots the image with another config", "H2", []outcome{code(refusal.PolicyForeign)}, otherConfig},
		{"boots another image, a debug enclave and one under an NSM of its own", "H1", []outcome{code(refusal.KMSDenied), code(refusal.PolicyForeign), code(refusal.DebugEnclave)}, otherImage},
		{"puts data keys of another KMS key into the header", "H2", []outcome{code(refusal.KMSWrongKey), code(refusal.KeyringInvalid)}, otherKey},
		{"gives credentials of another role, of nobody, malformed and without end", "H4", []outcome{code(refusal.KMSDenied), code(refusal.KMSCredentials)}, otherCredentials},
	}
}

// create asks for a keyring and counts what came of it.
func create(t *testing.T, c *cloud, got *tally, change func(*machine)) {
	t.Helper()
	conn := c.boot(t, change)
	ask[wire.ConfigureReply](t, conn, wire.TypeConfigure, &wire.Configure{Config: c.raw})
	_, err := enclavetest.Ask[wire.CreateKeyringReply](conn, wire.TypeCreateKeyring, &wire.CreateKeyring{})
	got.gotErr(err)
}

// ready is a cloud with a keyring of one key, which still opens at the end.
func ready(t *testing.T) *cloud {
	t.Helper()
	c := newCloud(t)
	t.Cleanup(func() { c.settle(t) }) // after all connections are closed
	conn := c.boot(t, nil)
	ask[wire.ConfigureReply](t, conn, wire.TypeConfigure, &wire.Configure{Config: c.raw})
	c.header = ask[wire.CreateKeyringReply](t, conn, wire.TypeCreateKeyring, &wire.CreateKeyring{}).Header
	c.keys = ask[wire.AddKeysReply](t, conn, wire.TypeAddKeys, &wire.AddKeys{Algorithm: record.Secp256k1, Policy: "narrow", Count: 1}).Keys
	return c
}

// load asks a new boot for the keyring and counts what came of it.
func load(t *testing.T, c *cloud, got *tally, header []byte, change func(*machine)) {
	t.Helper()
	conn := c.boot(t, change)
	ask[wire.ConfigureReply](t, conn, wire.TypeConfigure, &wire.Configure{Config: c.raw})
	r, err := enclavetest.Ask[wire.LoadReply](conn, wire.TypeLoad, &wire.Load{Header: header, Keys: c.keys})
	got.gotErr(err)
	if err == nil {
		t.Errorf("%d keys were opened", r.Loaded)
	}
}

// certificates that are none of KMS: self-signed for its name, and of another CA
// that has KMS's name too.
func certificates(t *testing.T, host string) (all []tls.Certificate) {
	t.Helper()
	for _, ca := range []bool{false, true} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(t, err)
		template := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: host}, DNSNames: []string{host}, IsCA: ca, BasicConstraintsValid: true,
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
		must(t, err)
		all = append(all, tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key})
	}
	return all
}

func ownCertificates(t *testing.T, got *tally) {
	c := ready(t)
	var heard atomic.Int64
	forge := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		heard.Add(1)
		c.kms.Handler().ServeHTTP(w, r) // what is best forged is true
	})
	for _, cert := range certificates(t, c.kms.Host()) {
		l := c.listenTLS(t, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}, forge)
		change := func(m *machine) { m.kms = dialer(l) }
		create(t, c, got, change)
		load(t, c, got, c.header, change)
	}
	// And with no TLS at all.
	srv := httptest.NewServer(forge)
	t.Cleanup(srv.Close)
	load(t, c, got, c.header, func(m *machine) { m.kms = dialer(srv.Listener.Addr()) })
	if n := heard.Load(); n != 0 {
		t.Errorf("the man in the middle heard %d requests", n)
	}
	c.opens(t)
}

func otherRegion(t *testing.T, got *tally) {
	c := ready(t)
	o := c.options(t)
	o.Dir, o.CertDir, o.Region = t.TempDir(), c.dir, "eu-west-1"
	other, err := localkms.New(o)
	must(t, err)
	addr := c.listen(t, other.Serve)
	load(t, c, got, c.header, func(m *machine) { m.kms = dialer(addr) })
	create(t, c, got, func(m *machine) { m.kms = dialer(addr) })
	c.opens(t)
}

// spoiling is a connection that flips a bit of the byte at place at, or ends
// there.
type spoiling struct {
	net.Conn
	mu       sync.Mutex
	at, seen int
	read     bool // of what the enclave reads; else of what it writes
	cut      bool
}

func (s *spoiling) spoil(p []byte) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := bytes.Clone(p)
	if i := s.at - s.seen; i >= 0 && i < len(p) {
		if s.cut {
			_ = s.Close() // the enclave will notice
			out = out[:i]
		} else {
			out[i] ^= 1
		}
	}
	s.seen += len(p)
	return out
}

func (s *spoiling) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	if s.read && n > 0 {
		n = copy(p, s.spoil(p[:n]))
	}
	return n, err
}

func (s *spoiling) Write(p []byte) (int, error) {
	if s.read {
		return s.Conn.Write(p)
	}
	if _, err := s.Conn.Write(s.spoil(p)); err != nil {
		return 0, err
	}
	return len(p), nil
}

func spoilTLS(t *testing.T, got *tally) {
	c := ready(t)
	places := []int{0, 5, 43, 100, 700, 1500}
	if testing.Short() {
		places = places[3:4]
	}
	var wg sync.WaitGroup
	for _, at := range places {
		for _, read := range []bool{true, false} {
			for _, cut := range []bool{true, false} {
				wg.Go(func() { // they wait for the client's patience most of the time
					load(t, c, got, c.header, func(m *machine) {
						dial := m.kms
						m.kms = func(ctx context.Context) (net.Conn, error) {
							conn, err := dial(ctx)
							return &spoiling{Conn: conn, at: at, read: read, cut: cut}, err
						}
					})
				})
			}
		}
	}
	wg.Wait()
	c.opens(t)
}

// replayReply gives the man in the middle what he must never have, KMS's own
// certificate: an envelope of another request opens all the same only with the
// RSA key of that request.
func replayReply(t *testing.T, got *tally) {
	c := ready(t)
	var mu sync.Mutex
	first := map[string][]byte{}
	l := c.listenTLS(t, c.kms.TLSConfig(), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rec := httptest.NewRecorder()
		c.kms.Handler().ServeHTTP(rec, r)
		body, op := rec.Body.Bytes(), r.Header.Get("X-Amz-Target")
		var reply struct{ CiphertextForRecipient []byte }
		if err := json.Unmarshal(body, &reply); err != nil || len(reply.CiphertextForRecipient) == 0 && strings.HasSuffix(op, "Decrypt") {
			t.Errorf("KMS answered %d", rec.Code)
		}
		mu.Lock()
		defer mu.Unlock()
		if first[op] == nil {
			first[op] = body
		}
		if _, err := w.Write(first[op]); err != nil {
			t.Error(err)
		}
	}))
	conn := c.boot(t, func(m *machine) { m.kms = dialer(l) })
	ask[wire.ConfigureReply](t, conn, wire.TypeConfigure, &wire.Configure{Config: c.raw})
	ask[wire.LoadReply](t, conn, wire.TypeLoad, &wire.Load{Header: c.header, Keys: c.keys}) // the recording
	for range 3 {
		load(t, c, got, c.header, func(m *machine) { m.kms = dialer(l) })
	}
	c.opens(t)
}

func otherConfig(t *testing.T, got *tally) {
	c := ready(t)
	for _, edit := range []func(*config.Config){
		func(g *config.Config) { g.Policies[0].Kinds = record.Kinds() },
		func(g *config.Config) { g.Create[1].Max++ },
		func(g *config.Config) { g.Epochs = []uint32{1, 2} },
		func(g *config.Config) { g.Lease.MarginMS++ },
		func(g *config.Config) { g.DenyKeys = []string{public(t, c.keys[0]).KeyID.String()} },
	} {
		wide := *c.cfg
		wide.Policies, wide.Create = append([]config.Policy{}, wide.Policies...), append([]config.Create{}, wide.Create...)
		edit(&wide)
		raw, err := config.Encode(&wide)
		must(t, err)
		conn := c.boot(t, nil)
		ask[wire.ConfigureReply](t, conn, wire.TypeConfigure, &wire.Configure{Config: raw})
		_, err = enclavetest.Ask[wire.LoadReply](conn, wire.TypeLoad, &wire.Load{Header: c.header, Keys: c.keys})
		got.gotErr(err)
		_, err = enclavetest.Ask[wire.CreateKeyringReply](conn, wire.TypeCreateKeyring, &wire.CreateKeyring{})
		got.gotErr(err)
	}
	c.opens(t)
}

func otherImage(t *testing.T, got *tally) {
	c := ready(t)
	own, err := nsmtest.NewCA(nil)
	must(t, err)
	for _, o := range []struct {
		ca  *nsmtest.CA
		opt nsmtest.Options
	}{
		{c.ca, nsmtest.Options{PCRs: nsmtest.Measurements("the attacker's image")}},
		{c.ca, nsmtest.Options{Debug: true}},
		{own, nsmtest.Options{PCRs: nsmtest.Measurements("enclavetest")}},
		{c.ca, nsmtest.Options{PCRs: nsmtest.Measurements("enclavetest"), Faults: nsmtest.Faults{PCRs: map[int][]byte{16: make([]byte, 48)}}}},
		{c.ca, nsmtest.Options{PCRs: nsmtest.Measurements("the attacker's image"), Faults: nsmtest.Faults{PCRs: map[int][]byte{0: image()}, WrongKey: true}}},
	} {
		device, err := nsmtest.New(o.ca, o.opt)
		must(t, err)
		load(t, c, got, c.header, func(m *machine) { m.device = device })
	}
	c.opens(t)
}

func otherKey(t *testing.T, got *tally) {
	c := ready(t)
	mine, err := c.kms.CreateKey(c.policy(t, config.PCR16(c.raw))) // the attacker's own, which admits our enclave
	must(t, err)
	cfg := *c.cfg
	cfg.KMSKeyARN = mine
	raw, err := config.Encode(&cfg)
	must(t, err)
	must(t, c.kms.PutKeyPolicy(mine, c.policy(t, config.PCR16(raw))))
	conn := c.boot(t, nil)
	ask[wire.ConfigureReply](t, conn, wire.TypeConfigure, &wire.Configure{Config: raw})
	theirs := ask[wire.CreateKeyringReply](t, conn, wire.TypeCreateKeyring, &wire.CreateKeyring{}).Header
	load(t, c, got, theirs, nil)
	h, err := sealed.DecodeHeader(theirs)
	must(t, err)
	h.KMSKeyARN = c.cfg.KMSKeyARN
	load(t, c, got, sealed.EncodeHeader(h), nil)
	h, err = sealed.DecodeHeader(c.header)
	must(t, err)
	for i := 0; i < len(h.WrappedDEK); i += max(1, len(h.WrappedDEK)/8) { // each tenth of a second
		h.WrappedDEK[i] ^= 1
		load(t, c, got, sealed.EncodeHeader(h), nil)
		h.WrappedDEK[i] ^= 1
	}
	c.opens(t)
}

func otherCredentials(t *testing.T, got *tally) {
	c := ready(t)
	for _, answer := range []string{
		`{"AccessKeyId":"ASIAOTHERROLE","SecretAccessKey":"secret","Token":"token"}`,
		`{"AccessKeyId":"ASIANOBODY","SecretAccessKey":"secret","Token":"token"}`,
		`{"AccessKeyId":"ASIALOCALROLE","SecretAccessKey":"another","Token":"token"}`,
		`{"AccessKeyId":"ASIALOCALROLE","SecretAccessKey":"secret","Token":"token","Endpoint":"https://mine"}`,
		`{"AccessKeyId":"ASIA\r\nX-Amz-Target: TrentService.Encrypt","SecretAccessKey":"secret","Token":"token"}`,
		`{}`, ``, `[`, `{"AccessKeyId":"` + string(bytes.Repeat([]byte("A"), 1<<20)) + `"}`,
	} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, answer) // the enclave hangs up on what is too long
		}))
		load(t, c, got, c.header, func(m *machine) { m.credentials = dialer(srv.Listener.Addr()) })
		srv.Close()
	}
	c.opens(t)
}
