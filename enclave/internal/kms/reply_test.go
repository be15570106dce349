package kms_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/enclave/internal/kms"
	localkms "github.com/keyhold/keyhold/internal/awslocal/kms"
)

func TestWhoeverHasNoCertificateOfKMSIsRefused(t *testing.T) {
	ownCert := func(change func(*localkms.Options)) func(*testing.T, *world) net.Listener {
		return func(t *testing.T, w *world) net.Listener {
			t.Helper()
			other, err := localkms.New(func() localkms.Options {
				o := localkms.Options{
					Dir: t.TempDir(), Account: account, Region: region, Root: w.ca.Root(), Now: w.now, Logger: w.opt.Logger,
					Credentials: func(string) (localkms.Credential, bool) { return localkms.Credential{}, false },
				}
				change(&o)
				return o
			}())
			if err != nil {
				t.Fatal(err)
			}
			if other.Host() != w.kms.Host() {
				w.opt.Roots = other.Roots() // the right CA, the wrong name
			}
			return w.serve(t, other.Serve)
		}
	}
	tests := map[string]func(*testing.T, *world) net.Listener{
		"another CA":           ownCert(func(*localkms.Options) {}),
		"another region's KMS": ownCert(func(o *localkms.Options) { o.Region = "eu-west-1" }),
		"no TLS at all": func(t *testing.T, _ *world) net.Listener {
			t.Helper()
			srv := httptest.NewServer(http.NotFoundHandler())
			t.Cleanup(srv.Close)
			return srv.Listener
		},
	}
	for name, start := range tests {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			ops := operations(t, w)
			l := start(t, w)
			w.opt.Dial = func(ctx context.Context) (net.Conn, error) { return w.dial(ctx, l) }
			for _, op := range ops {
				w.dials.Store(0)
				wantCode(t, w, op(t.Context(), w.client(t)), kms.CodeTLS, kms.ClassRetry)
				if n := w.dials.Load(); n != 1 {
					t.Errorf("%d dials: a refused certificate was tried again", n)
				}
			}
		})
	}
}

func TestACertificateIsJudgedByTheEnclavesClock(t *testing.T) {
	w := newWorld(t)
	ops := operations(t, w)
	w.opt.Now = func() time.Time { return start.AddDate(20, 0, 0) }
	for _, op := range ops {
		wantCode(t, w, op(t.Context(), w.client(t)), kms.CodeTLS, kms.ClassRetry)
	}
}

func TestSystemRootsAreNeverUsed(t *testing.T) {
	w := newWorld(t)
	ops := operations(t, w)
	w.opt.Roots = x509.NewCertPool()
	for _, op := range ops {
		wantCode(t, w, op(t.Context(), w.client(t)), kms.CodeTLS, kms.ClassRetry)
	}
}

// answer is a reply of KMS, as the test may forge it.
type answer map[string]any

// recipientOf finds the public key in the request's document.
func recipientOf(t *testing.T, body []byte) *rsa.PublicKey {
	t.Helper()
	var in struct {
		Recipient struct{ AttestationDocument []byte }
	}
	if err := json.Unmarshal(body, &in); err != nil {
		t.Fatal(err)
	}
	doc, err := attestation.Parse(in.Recipient.AttestationDocument)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParsePKIXPublicKey(doc.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	public, ok := parsed.(*rsa.PublicKey)
	if !ok {
		t.Fatal("no RSA key in the document")
	}
	return public
}

// envelopeFor seals content to public, in an envelope without fault.
func envelopeFor(t *testing.T, public *rsa.PublicKey, content []byte) []byte {
	t.Helper()
	p := goodParts(t)
	wrapped, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public, contentKey, nil)
	if err != nil {
		t.Fatal(err)
	}
	p.rid = tlv(0x80, keyID(public))
	p.wrapped = tlv(4, wrapped)
	p.content = tlv(0x80, encrypt(contentKey, contentIV, pad(content)))
	return p.build()
}

// forging serves replies of the emulator after change had its way with them.
func (w *world) forging(t *testing.T, change func(t *testing.T, request []byte, a answer)) {
	t.Helper()
	w.serveTLS(t, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		body := readAll(t, r.Body)
		r.Body = http.NoBody
		clone := r.Clone(r.Context())
		clone.Body = readCloser{bytes.NewReader(body)}
		rec := w.forward(t, clone)
		var a answer
		if err := json.Unmarshal(rec.Body.Bytes(), &a); err != nil || rec.Code != http.StatusOK {
			t.Errorf("the emulator answered %d", rec.Code)
		}
		change(t, body, a)
		if err := json.NewEncoder(rw).Encode(a); err != nil {
			t.Error(err)
		}
	}))
}

type readCloser struct{ *bytes.Reader }

func (readCloser) Close() error { return nil }

func TestRepliesThatBreakAPromiseAreRefused(t *testing.T) {
	w := newWorld(t)
	ops := operations(t, w)
	otherKey := w.newKey(t)
	set := func(name string, v any) func(*testing.T, []byte, answer) {
		return func(_ *testing.T, _ []byte, a answer) { a[name] = v }
	}
	sealed := func(content []byte) func(*testing.T, []byte, answer) {
		return func(t *testing.T, request []byte, a answer) {
			t.Helper()
			a["CiphertextForRecipient"] = envelopeFor(t, recipientOf(t, request), content)
		}
	}
	tests := map[string]struct {
		change func(*testing.T, []byte, answer)
		only   string // the operation that has the field; empty: both
	}{
		"another KeyId":         {change: set("KeyId", otherKey)},
		"a bare KeyId":          {change: set("KeyId", strings.Split(w.keyARN, "/")[1])},
		"no KeyId":              {change: set("KeyId", nil)},
		"a plaintext beside":    {change: set("Plaintext", []byte(untrusted))},
		"no envelope":           {change: set("CiphertextForRecipient", nil)},
		"an empty envelope":     {change: set("CiphertextForRecipient", []byte{})},
		"an envelope of 100 KB": {change: set("CiphertextForRecipient", make([]byte, 40_000))},
		"a plaintext instead":   {change: func(_ *testing.T, _ []byte, a answer) { delete(a, "CiphertextForRecipient"); a["Plaintext"] = dataKey }},
		"an envelope for another": {change: func(t *testing.T, _ []byte, a answer) {
			t.Helper()
			a["CiphertextForRecipient"] = goodParts(t).build()
		}},
		"a data key of 31 bytes":   {change: sealed(dataKey[:31])},
		"a data key of 33 bytes":   {change: sealed(append(bytes.Clone(dataKey), 1))},
		"an empty data key":        {change: sealed(nil)},
		"another algorithm":        {change: set("EncryptionAlgorithm", "RSAES_OAEP_SHA_256"), only: "Decrypt"},
		"no algorithm":             {change: set("EncryptionAlgorithm", nil), only: "Decrypt"},
		"no wrapped key":           {change: set("CiphertextBlob", nil), only: "GenerateDataKey"},
		"a wrapped key of 7 KB":    {change: set("CiphertextBlob", make([]byte, 7000)), only: "GenerateDataKey"},
		"more than a reply can be": {change: set("Padding", strings.Repeat("x", kms.TestingOnlyMaxBody))},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			w.forging(t, tt.change)
			for opName, op := range ops {
				err := op(t.Context(), w.client(t))
				if tt.only != "" && opName != tt.only {
					continue
				}
				wantCode(t, w, err, kms.CodeReply, kms.ClassRefuse)
			}
		})
	}
}

// The forger of this test is one that the tests above rely on.
func TestAReplyThatIsNotForgedPasses(t *testing.T) {
	w := newWorld(t)
	ops := operations(t, w)
	for name, change := range map[string]func(*testing.T, []byte, answer){
		"as it was": func(*testing.T, []byte, answer) {},
		"sealed anew": func(t *testing.T, request []byte, a answer) {
			t.Helper()
			a["CiphertextForRecipient"] = envelopeFor(t, recipientOf(t, request), dataKey)
		},
	} {
		w.forging(t, change)
		for opName, op := range ops {
			if err := op(t.Context(), w.client(t)); err != nil {
				t.Errorf("%s, %s: %v", name, opName, err)
			}
		}
	}
}

func TestAReplayedReplyIsRefused(t *testing.T) {
	w := newWorld(t)
	var (
		mu    sync.Mutex
		first []byte
	)
	w.forging(t, func(_ *testing.T, _ []byte, a answer) {
		mu.Lock()
		defer mu.Unlock()
		encoded, err := json.Marshal(a["CiphertextForRecipient"])
		if err != nil {
			t.Error(err)
		}
		if first == nil {
			first = encoded
		}
		a["CiphertextForRecipient"] = json.RawMessage(first)
	})
	c := w.client(t)
	if _, _, err := c.GenerateDataKey(t.Context(), encCtx); err != nil {
		t.Fatal(err)
	}
	_, _, err := c.GenerateDataKey(t.Context(), encCtx)
	wantCode(t, w, err, kms.CodeReply, kms.ClassRefuse)
}

func TestAnswersThatAreNoneOfKMS(t *testing.T) {
	reply := func(status int, body string) http.HandlerFunc {
		return func(rw http.ResponseWriter, _ *http.Request) {
			rw.Header().Set("Content-Type", "application/x-amz-json-1.1")
			rw.Header().Set("Location", "http://evil.example/"+untrusted)
			rw.WriteHeader(status)
			_, _ = rw.Write([]byte(body))
		}
	}
	tests := map[string]struct {
		handler http.Handler
		code    kms.Code
		class   kms.Class
	}{
		"HTML":                    {reply(200, "<html>"+untrusted), kms.CodeReply, kms.ClassRefuse},
		"nothing":                 {reply(200, ""), kms.CodeReply, kms.ClassRefuse},
		"another JSON":            {reply(200, `["`+untrusted+`"]`), kms.CodeReply, kms.ClassRefuse},
		"an unknown error":        {reply(400, `{"__type":"`+untrusted+`","message":"`+untrusted+`"}`), kms.CodeUnknown, kms.ClassUnknown},
		"a known error with text": {reply(400, `{"__type":"AccessDeniedException","message":"`+untrusted+`"}`), kms.CodeDenied, kms.ClassRefuse},
		"a redirect":              {reply(307, ""), kms.CodeUnknown, kms.ClassUnknown},
		"503 of a balancer":       {reply(503, "<html>"), kms.CodeUnreachable, kms.ClassRetry},
		"cut in the middle": {http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
			rw.Header().Set("Content-Length", "1000")
			_, _ = rw.Write([]byte(`{"KeyId":`))
			panic(http.ErrAbortHandler)
		}), kms.CodeUnreachable, kms.ClassRetry},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			ops := operations(t, w)
			w.serveTLS(t, tt.handler)
			for _, op := range ops {
				wantCode(t, w, op(t.Context(), w.client(t)), tt.code, tt.class)
			}
		})
	}
}

func TestRedirectsAreNotFollowed(t *testing.T) {
	w := newWorld(t)
	ops := operations(t, w)
	var requests atomic.Int64
	w.serveTLS(t, http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		requests.Add(1)
		rw.Header().Set("Location", "/elsewhere") // on the same host, so that only the redirect policy stops it
		rw.WriteHeader(http.StatusFound)
	}))
	for _, op := range ops {
		requests.Store(0)
		wantCode(t, w, op(t.Context(), w.client(t)), kms.CodeUnknown, kms.ClassUnknown)
		if n := requests.Load(); n != 1 {
			t.Errorf("%d requests", n)
		}
	}
}
