package kms_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/enclave/internal/kms"
	localkms "github.com/keyhold/keyhold/internal/awslocal/kms"
)

const (
	account   = "111122223333"
	region    = "eu-central-1"
	role      = "arn:aws:iam::111122223333:role/keyhold-parent"
	accessKey = "ASIALOCALROLE"
	// The secrets are markers: no error and no log may show them.
	accessSecret = "marker-access-secret"
	sessionToken = "marker-session-token"
)

// start is far from the real time, so that a clock other than the one of the
// options would be noticed.
var start = time.Date(2031, 5, 6, 7, 8, 9, 0, time.UTC)

var (
	configDigest = bytes.Repeat([]byte{0x16}, 48)
	encCtx       = map[string]string{"keyhold:keyring": "main", "keyhold:epoch": "1"}
)

// buffer is a log that tests may read while others write it.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// world is an account with one key, its KMS, and an enclave that may use it.
type world struct {
	kms    *localkms.Server
	keyARN string
	ca     *nsmtest.CA
	nsm    *nsmtest.NSM
	opt    kms.Options
	log    *buffer

	clock       atomic.Int64 // nanoseconds since start
	dials       atomic.Int64
	calls       atomic.Int64 // requests that reached KMS
	faults      func(call int64) localkms.Fault
	credentials map[string]localkms.Credential
	listener    net.Listener
}

func (w *world) now() time.Time { return start.Add(time.Duration(w.clock.Load())) }

// newWorld starts a KMS on loopback whose key admits the image and config of
// the enclave. change may alter the options before anything starts.
func newWorld(t *testing.T, change ...func(*localkms.Options)) *world {
	t.Helper()
	w := &world{log: &buffer{}, credentials: map[string]localkms.Credential{
		accessKey: {SecretAccessKey: accessSecret, SessionToken: sessionToken, PrincipalARN: role},
	}}
	ca, err := nsmtest.NewCA(w.now)
	if err != nil {
		t.Fatal(err)
	}
	w.ca = ca
	w.nsm = bootedNSM(t, ca, "image")
	logger := slog.New(slog.NewJSONHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	opt := localkms.Options{
		Dir: t.TempDir(), Account: account, Region: region, Root: ca.Root(), Now: w.now, Logger: logger,
		Credentials: func(id string) (localkms.Credential, bool) { c, ok := w.credentials[id]; return c, ok },
		Faults: func(string) localkms.Fault {
			call := w.calls.Add(1)
			if w.faults == nil {
				return localkms.Fault{}
			}
			return w.faults(call)
		},
	}
	for _, f := range change {
		f(&opt)
	}
	if w.kms, err = localkms.New(opt); err != nil {
		t.Fatal(err)
	}
	w.keyARN = w.newKey(t)
	w.listener = w.serve(t, w.kms.Serve)
	w.opt = kms.Options{
		KeyARN: w.keyARN,
		Credentials: func(context.Context) (kms.Credentials, error) {
			return kms.Credentials{AccessKeyID: accessKey, SecretAccessKey: accessSecret, SessionToken: sessionToken}, nil
		},
		Dial:   func(ctx context.Context) (net.Conn, error) { return w.dial(ctx, w.listener) },
		Roots:  w.kms.Roots(),
		Now:    w.now,
		NSM:    w.nsm,
		Logger: logger,
	}
	return w
}

// bootedNSM is the NSM of an enclave that measured its config and locked it.
func bootedNSM(t *testing.T, ca *nsmtest.CA, image string) *nsmtest.NSM {
	t.Helper()
	n, err := nsmtest.New(ca, nsmtest.Options{PCRs: nsmtest.Measurements(image)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.ExtendPCR(16, configDigest); err != nil {
		t.Fatal(err)
	}
	if err := n.LockPCRs(17); err != nil {
		t.Fatal(err)
	}
	return n
}

func pairOf(t *testing.T, s nsm.Session) localkms.Pair {
	t.Helper()
	pcr := func(i uint16) []byte {
		value, _, err := s.DescribePCR(i)
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
	return localkms.Pair{PCR0: pcr(0), PCR16: pcr(16)}
}

// newKey makes a key that admits w's enclave.
func (w *world) newKey(t *testing.T) string {
	t.Helper()
	return w.keyFor(t, role, pairOf(t, w.nsm))
}

func (w *world) keyFor(t *testing.T, principal string, pairs ...localkms.Pair) string {
	t.Helper()
	policy, err := localkms.DefaultPolicy(account, principal, pairs)
	if err != nil {
		t.Fatal(err)
	}
	arn, err := w.kms.CreateKey(policy)
	if err != nil {
		t.Fatal(err)
	}
	return arn
}

// serve runs f on a loopback listener until the test ends.
func (w *world) serve(t *testing.T, f func(context.Context, net.Listener) error) net.Listener {
	t.Helper()
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context())) // t.Context ends before Cleanup
	done := make(chan error, 1)
	go func() { done <- f(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("server: %v", err)
		}
	})
	return l
}

// serveTLS puts a handler of the test behind the certificate of KMS.
func (w *world) serveTLS(t *testing.T, h http.Handler) {
	t.Helper()
	srv := httptest.NewUnstartedServer(h)
	srv.TLS = w.kms.TLSConfig()
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	w.opt.Dial = func(ctx context.Context) (net.Conn, error) { return w.dial(ctx, srv.Listener) }
}

func (w *world) dial(ctx context.Context, l net.Listener) (net.Conn, error) {
	w.dials.Add(1)
	var d net.Dialer
	return d.DialContext(ctx, l.Addr().Network(), l.Addr().String())
}

func (w *world) client(t *testing.T) *kms.Client {
	t.Helper()
	c, err := kms.TestingOnlyNew(w.opt)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// forward hands a request to the emulator and returns what it answers.
func (w *world) forward(t *testing.T, r *http.Request) *httptest.ResponseRecorder {
	t.Helper()
	rec := httptest.NewRecorder()
	w.kms.Handler().ServeHTTP(rec, r)
	return rec
}

// operations are the two calls of a Client, so that every fault meets both.
func operations(t *testing.T, w *world) map[string]func(context.Context, *kms.Client) error {
	t.Helper()
	wrapped, dek, err := w.client(t).GenerateDataKey(t.Context(), encCtx)
	if err != nil {
		t.Fatal(err)
	}
	dek.Destroy()
	w.calls.Store(0)
	w.dials.Store(0)
	return map[string]func(context.Context, *kms.Client) error{
		"GenerateDataKey": func(ctx context.Context, c *kms.Client) error {
			_, _, err := c.GenerateDataKey(ctx, encCtx)
			return err
		},
		"Decrypt": func(ctx context.Context, c *kms.Client) error {
			_, err := c.Decrypt(ctx, wrapped, encCtx)
			return err
		},
	}
}

// wantCode checks that err is an Error with this code and class, and that it
// and the log are free of secrets.
func wantCode(t *testing.T, w *world, err error, code kms.Code, class kms.Class) {
	t.Helper()
	var kmsErr *kms.Error
	if !errors.As(err, &kmsErr) {
		t.Fatalf("got error %v, want one with code %s", err, code)
	}
	if kmsErr.Code != code || kmsErr.Class() != class {
		t.Errorf("got code %s, class %d (%v), want %s, %d", kmsErr.Code, kmsErr.Class(), err, code, class)
	}
	for _, marker := range []string{accessSecret, sessionToken, untrusted} {
		if bytes.Contains([]byte(err.Error()), []byte(marker)) || bytes.Contains([]byte(w.log.String()), []byte(marker)) {
			t.Errorf("%q is in the error or in the log", marker)
		}
	}
}

// untrusted stands in replies, certificates and errors of others.
const untrusted = "marker-untrusted-text"

func withContext(change func(map[string]string)) map[string]string {
	out := maps.Clone(encCtx)
	change(out)
	return out
}

func readAll(t *testing.T, r io.Reader) []byte {
	t.Helper()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Error(err)
	}
	return b
}
