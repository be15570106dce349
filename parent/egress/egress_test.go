package egress_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhold/keyhold/parent/egress"
)

const kmsHost = "kms.us-east-1.amazonaws.com"

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// listener hands out connections that the test makes.
type listener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newListener() *listener {
	return &listener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *listener) Addr() net.Addr { return &net.UnixAddr{Name: "test", Net: "unix"} }

// dial returns the enclave's end of a new connection.
func (l *listener) dial() net.Conn {
	near, far := net.Pipe()
	l.conns <- far
	return near
}

// serve runs f on ln until the test ends.
func serve(t *testing.T, f egress.Forwarder, ln net.Listener) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- f.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("forwarder: %v", err)
		}
	})
}

// loopback listens on a free port of this machine.
func loopback(t *testing.T) net.Listener {
	t.Helper()
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

func TestTLSToAListedHostPassesThrough(t *testing.T) {
	kms := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(w, r.Body); err != nil {
			t.Error(err)
		}
	}))
	defer kms.Close()
	ln := loopback(t)
	dialled := make(chan string, 1)
	serve(t, egress.Forwarder{Hosts: []string{kmsHost}, Dial: func(ctx context.Context, host string) (net.Conn, error) {
		dialled <- host
		var d net.Dialer
		return d.DialContext(ctx, "tcp", kms.Listener.Addr().String())
	}}, ln)

	roots := x509.NewCertPool()
	roots.AddCert(kms.Certificate())
	client := &http.Client{Transport: &http.Transport{
		// The test server's certificate is made for example.com; SNI names KMS.
		TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13, ServerName: kmsHost, InsecureSkipVerify: true, VerifyConnection: func(s tls.ConnectionState) error {
			_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, DNSName: "example.com"})
			return err
		}},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", ln.Addr().String())
		},
	}}
	defer client.CloseIdleConnections()
	sent := bytes.Repeat([]byte("keyhold"), 100_000)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+kmsHost+"/", bytes.NewReader(sent))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil || string(got) != string(sent) {
		t.Fatalf("got %d bytes back, %v, want %d", len(got), err, len(sent))
	}
	if host := <-dialled; host != kmsHost {
		t.Fatalf("dialled %q", host)
	}
}

// hello returns the bytes of a ClientHello for that server name.
func hello(t testing.TB, name string) []byte {
	t.Helper()
	near, far := net.Pipe()
	defer far.Close()
	go func() {
		// Nothing is trusted here: only the hello is wanted.
		_ = tls.Client(near, &tls.Config{ServerName: name, InsecureSkipVerify: true}).HandshakeContext(t.Context())
		near.Close()
	}()
	b := make([]byte, 64<<10)
	n, err := far.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return b[:n]
}

func TestEverythingElseIsRefusedBeforeDialling(t *testing.T) {
	for _, tt := range []struct {
		name  string
		bytes []byte
		want  error
	}{
		{"another host", hello(t, "example.com"), egress.ErrRefused},
		{"another region", hello(t, "kms.us-east-2.amazonaws.com"), egress.ErrRefused},
		{"a subdomain", hello(t, "a."+kmsHost), egress.ErrRefused},
		{"a longer name", hello(t, kmsHost+".example.com"), egress.ErrRefused},
		{"the metadata service", hello(t, "169.254.169.254"), egress.ErrNoSNI},
		{"no name", hello(t, ""), egress.ErrNoSNI},
		{"HTTP", []byte("GET / HTTP/1.1\r\nHost: secret-marker\r\n\r\n"), egress.ErrNotTLS},
		{"a proxy request", []byte("CONNECT " + kmsHost + ":443 HTTP/1.1\r\n\r\n"), egress.ErrNotTLS},
		{"a cut hello", hello(t, kmsHost)[:60], egress.ErrNotTLS},
		{"nothing", nil, egress.ErrNotTLS},
		{"no end", bytes.Repeat(append([]byte{22, 3, 1, 0x40, 0}, make([]byte, 0x4000)...), 9), egress.ErrNotTLS},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ln, logs := newListener(), &recorder{}
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error, 1)
				go func() {
					done <- egress.Forwarder{
						Hosts: []string{kmsHost}, Logger: slog.New(logs),
						Dial: func(context.Context, string) (net.Conn, error) {
							t.Error("dialled")
							return nil, io.EOF
						},
					}.Serve(ctx, ln)
				}()
				conn := ln.dial()
				go func() { _, _ = conn.Write(tt.bytes) }() // refused half-way where it is too long
				if n, err := conn.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
					t.Errorf("read %d bytes, %v; want the end and not a byte", n, err)
				}
				conn.Close()
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
				logs.wantOne(t, tt.want)
			})
		})
	}
}

// recorder keeps the errors that are logged.
type recorder struct {
	mu   sync.Mutex
	errs []error
}

func (*recorder) Enabled(context.Context, slog.Level) bool { return true }
func (r *recorder) WithAttrs([]slog.Attr) slog.Handler     { return r }
func (r *recorder) WithGroup(string) slog.Handler          { return r }
func (r *recorder) Handle(_ context.Context, rec slog.Record) error {
	rec.Attrs(func(a slog.Attr) bool {
		if err, ok := a.Value.Any().(error); ok {
			r.mu.Lock()
			r.errs = append(r.errs, err)
			r.mu.Unlock()
		}
		return true
	})
	return nil
}

func (r *recorder) wantOne(t *testing.T, want error) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.errs) != 1 || !errors.Is(r.errs[0], want) {
		t.Fatalf("logged %v, want once %v", r.errs, want)
	}
	if strings.Contains(r.errs[0].Error(), "secret-marker") {
		t.Fatalf("the log repeats what came in: %v", r.errs[0])
	}
}

// upstream returns a forwarder whose dialler hands its far ends to the test.
func upstream(opt egress.Forwarder) (egress.Forwarder, <-chan net.Conn) {
	far := make(chan net.Conn, 4)
	opt.Hosts = []string{kmsHost}
	opt.Dial = func(context.Context, string) (net.Conn, error) {
		near, end := net.Pipe()
		far <- end
		return near, nil
	}
	return opt, far
}

func TestAConnectionEndsAfterItsIdleTimeAndNotBefore(t *testing.T) {
	hi := hello(t, kmsHost)
	synctest.Test(t, func(t *testing.T) {
		f, far := upstream(egress.Forwarder{IdleTimeout: 10 * time.Second})
		ln := newListener()
		serve(t, f, ln)
		conn := ln.dial()
		write(t, conn, hi)
		up := <-far
		read(t, up, len(hi))
		for range 5 { // one direction speaks, so the other may be silent
			<-time.After(8 * time.Second)
			go write(t, up, []byte("x"))
			read(t, conn, 1)
		}
		begin := time.Now()
		if _, err := conn.Read(make([]byte, 1)); err == nil || time.Since(begin) != 10*time.Second {
			t.Fatalf("ended after %v with %v, want 10s", time.Since(begin), err)
		}
	})
}

func TestAConnectionEndsAfterItsWholeTime(t *testing.T) {
	hi := hello(t, kmsHost)
	synctest.Test(t, func(t *testing.T) {
		f, far := upstream(egress.Forwarder{TotalTimeout: time.Minute})
		ln := newListener()
		serve(t, f, ln)
		begin := time.Now()
		conn := ln.dial()
		write(t, conn, hi)
		go io.Copy(io.Discard, <-far)
		for {
			if _, err := conn.Write([]byte("x")); err != nil {
				break
			}
			<-time.After(time.Second)
		}
		if took := time.Since(begin); took < time.Minute || took > time.Minute+time.Second {
			t.Fatalf("lived %v, want a minute", took)
		}
	})
}

func TestASilentClientIsDroppedAfterTheHelloTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, _ := upstream(egress.Forwarder{HelloTimeout: 3 * time.Second})
		ln := newListener()
		serve(t, f, ln)
		begin := time.Now()
		conn := ln.dial()
		if _, err := conn.Read(make([]byte, 1)); err == nil || time.Since(begin) != 3*time.Second {
			t.Fatalf("dropped after %v with %v, want 3s", time.Since(begin), err)
		}
	})
}

func TestConnectionsAboveTheCapAreClosed(t *testing.T) {
	hi := hello(t, kmsHost)
	synctest.Test(t, func(t *testing.T) {
		f, far := upstream(egress.Forwarder{MaxConns: 1})
		ln := newListener()
		serve(t, f, ln)
		first := ln.dial()
		write(t, first, hi)
		up := <-far
		read(t, up, len(hi))
		if _, err := ln.dial().Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Fatalf("second connection: %v, want its end", err)
		}
		first.Close()
		synctest.Wait()
		third := ln.dial()
		write(t, third, hi)
		read(t, <-far, len(hi))
	})
}

func TestTheEndOfOneDirectionLeavesTheOther(t *testing.T) {
	kms := loopback(t)
	defer kms.Close()
	ln := loopback(t)
	serve(t, egress.Forwarder{Hosts: []string{kmsHost}, Dial: func(ctx context.Context, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", kms.Addr().String())
	}}, ln)
	var d net.Dialer
	conn, err := d.DialContext(t.Context(), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	hi := hello(t, kmsHost)
	write(t, conn, hi)
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	up, err := kms.Accept()
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(up)
	if err != nil || string(got) != string(hi) {
		t.Fatalf("upstream got %d bytes, %v, want the hello and then the end", len(got), err)
	}
	write(t, up, []byte("answer"))
	up.Close()
	if got, err := io.ReadAll(conn); err != nil || string(got) != "answer" {
		t.Fatalf("answer after the end: %q, %v", got, err)
	}
}

func TestAListenerThatFailsIsAnError(t *testing.T) {
	ln := newListener()
	ln.Close()
	err := egress.Forwarder{Hosts: []string{kmsHost}}.Serve(t.Context(), ln)
	if !errors.Is(err, net.ErrClosed) {
		t.Fatalf("err = %v", err)
	}
}

func TestHostListsOfOtherThanNamesAreRefused(t *testing.T) {
	for _, h := range []string{"", "localhost", "127.0.0.1", "0x7f.0x1", "[::1]", "*.amazonaws.com", "KMS.us-east-1.amazonaws.com", kmsHost + ".", kmsHost + ":443", "-a.com"} {
		f := egress.Forwarder{Hosts: []string{kmsHost, h}}
		if err := f.Validate(); !errors.Is(err, egress.ErrHost) {
			t.Errorf("%q: %v, want ErrHost", h, err)
		}
	}
	if err := (&egress.Forwarder{}).Validate(); !errors.Is(err, egress.ErrHost) {
		t.Errorf("empty list: %v", err)
	}
}

func TestTheKMSHostFollowsFromTheKeyARN(t *testing.T) {
	for _, tt := range []struct{ arn, want string }{
		{"arn:aws:kms:us-east-1:111122223333:key/1234", kmsHost},
		{"arn:aws-us-gov:kms:us-gov-west-1:111122223333:key/1234", "kms.us-gov-west-1.amazonaws.com"},
		{"arn:aws-cn:kms:cn-north-1:111122223333:key/1234", "kms.cn-north-1.amazonaws.com.cn"},
		{"arn:aws:kms:evil.example:111122223333:key/1234", ""},
		{"arn:aws:s3:us-east-1:111122223333:key/1234", ""},
		{"arn:aws:kms::111122223333:key/1234", ""},
		{"kms", ""},
	} {
		got, err := egress.KMSHost(tt.arn)
		if got != tt.want || (err != nil) != (tt.want == "") {
			t.Errorf("KMSHost(%q) = %q, %v, want %q", tt.arn, got, err, tt.want)
		}
	}
}

func write(t *testing.T, w io.Writer, b []byte) {
	t.Helper()
	if _, err := w.Write(b); err != nil {
		t.Errorf("write: %v", err)
	}
}

func read(t *testing.T, r io.Reader, n int) {
	t.Helper()
	if _, err := io.ReadFull(r, make([]byte, n)); err != nil {
		t.Fatalf("read: %v", err)
	}
}

// FuzzHello sends arbitrary first bytes: nothing but the listed name is ever
// dialled, and what is passed on begins with what came in.
func FuzzHello(f *testing.F) {
	f.Add(hello(f, kmsHost))
	f.Add(hello(f, "example.com"))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, first []byte) {
		synctest.Test(t, func(t *testing.T) {
			passed := make(chan []byte, 1)
			ln := newListener()
			serve(t, egress.Forwarder{Hosts: []string{kmsHost}, Dial: func(_ context.Context, host string) (net.Conn, error) {
				if host != kmsHost {
					t.Errorf("dialled %q", host)
				}
				near, far := net.Pipe()
				go func() {
					b := make([]byte, len(first))
					n, err := far.Read(b)
					if err != nil {
						t.Error(err)
					}
					passed <- b[:n]
					far.Close()
				}()
				return near, nil
			}}, ln)
			conn := ln.dial()
			defer conn.Close()
			go func() { _, _ = conn.Write(first) }() // cut off where it is refused
			for {
				if _, err := conn.Read(make([]byte, 1)); err != nil {
					break
				}
			}
			synctest.Wait()
			select {
			case b := <-passed:
				if len(b) == 0 || !bytes.HasPrefix(first, b) || !bytes.Contains(b, []byte(kmsHost)) {
					t.Errorf("passed on %d bytes that are not those that came in", len(b))
				}
			default:
			}
		})
	})
}
