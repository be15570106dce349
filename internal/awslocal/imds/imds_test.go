package imds_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials/ec2rolecreds"
	awsimds "github.com/aws/aws-sdk-go-v2/feature/ec2/imds"

	"github.com/keyhold/keyhold/internal/awslocal/imds"
)

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

type clock struct{ ns atomic.Int64 }

func (c *clock) now() time.Time          { return start.Add(time.Duration(c.ns.Load())) }
func (c *clock) advance(d time.Duration) { c.ns.Add(int64(d)) }

func newServer(t *testing.T) (*imds.Server, *clock) {
	t.Helper()
	c := &clock{}
	s, err := imds.New(imds.Options{Role: "keyhold-parent", Now: c.now})
	if err != nil {
		t.Fatal(err)
	}
	return s, c
}

var good = imds.Credentials{AccessKeyID: "ASIAEXAMPLE", SecretAccessKey: "secret", SessionToken: "token", Expires: start.Add(time.Hour)}

func do(t *testing.T, h http.Handler, method, path string, header ...string) (int, string) {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), method, path, nil)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	body, err := io.ReadAll(w.Result().Body)
	if err != nil {
		t.Fatal(err)
	}
	return w.Code, string(body)
}

const (
	tokenHeader = "X-aws-ec2-metadata-token"
	ttlHeader   = "X-aws-ec2-metadata-token-ttl-seconds"
	rolePath    = "/latest/meta-data/iam/security-credentials/"
)

func token(t *testing.T, h http.Handler, ttl string) string {
	t.Helper()
	code, body := do(t, h, http.MethodPut, "/latest/api/token", ttlHeader, ttl)
	if code != http.StatusOK {
		t.Fatalf("token: status %d", code)
	}
	return body
}

func TestTheSDKGetsTheRoleCredentials(t *testing.T) {
	s, _ := newServer(t)
	s.SetCredentials(good)
	srv := httptest.NewServer(s)
	defer srv.Close()
	provider := ec2rolecreds.New(func(o *ec2rolecreds.Options) {
		o.Client = awsimds.New(awsimds.Options{Endpoint: srv.URL, EnableFallback: aws.FalseTernary})
	})
	got, err := provider.Retrieve(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got.AccessKeyID != good.AccessKeyID || got.SecretAccessKey != good.SecretAccessKey || got.SessionToken != good.SessionToken || !got.Expires.Equal(good.Expires) {
		t.Errorf("got other credentials than were set, expiring %s", got.Expires)
	}
}

func TestVersion1AndBadTokensAreRefused(t *testing.T) {
	s, c := newServer(t)
	s.SetCredentials(good)
	other, _ := newServer(t)
	fresh := token(t, s, "60")
	tests := []struct {
		name, token string
	}{
		{"no token", ""},
		{"nonsense", "abc"},
		{"of another server", token(t, other, "60")},
		{"cut", fresh[:len(fresh)-4]},
		{"changed", "A" + fresh[1:]},
	}
	for _, tt := range tests {
		if tt.token == fresh {
			t.Fatalf("%s: the mutation changed nothing", tt.name)
		}
		if code, _ := do(t, s, http.MethodGet, rolePath, tokenHeader, tt.token); code != http.StatusUnauthorized {
			t.Errorf("%s: status %d", tt.name, code)
		}
	}
	if code, body := do(t, s, http.MethodGet, rolePath, tokenHeader, fresh); code != http.StatusOK || body != "keyhold-parent" {
		t.Errorf("good token: status %d, %q", code, body)
	}
	c.advance(60 * time.Second)
	if code, _ := do(t, s, http.MethodGet, rolePath, tokenHeader, fresh); code != http.StatusUnauthorized {
		t.Errorf("expired token: status %d", code)
	}
}

func TestTokenRequestsAreChecked(t *testing.T) {
	s, _ := newServer(t)
	for _, ttl := range []string{"", "0", "-1", "21601", "x"} {
		if code, _ := do(t, s, http.MethodPut, "/latest/api/token", ttlHeader, ttl); code != http.StatusBadRequest {
			t.Errorf("ttl %q: status %d", ttl, code)
		}
	}
	if code, _ := do(t, s, http.MethodPut, "/latest/api/token", ttlHeader, "60", "X-Forwarded-For", "10.0.0.1"); code != http.StatusForbidden {
		t.Errorf("behind a proxy: status %d", code)
	}
	if code, _ := do(t, s, http.MethodPost, "/latest/api/token", ttlHeader, "60"); code != http.StatusMethodNotAllowed {
		t.Errorf("POST: status %d", code)
	}
}

func TestOnlyTheRoleIsServed(t *testing.T) {
	s, _ := newServer(t)
	tok := token(t, s, "60")
	if code, _ := do(t, s, http.MethodGet, rolePath, tokenHeader, tok); code != http.StatusNotFound {
		t.Errorf("no role yet: status %d", code)
	}
	s.SetCredentials(good)
	for path, want := range map[string]int{
		rolePath:                          http.StatusOK,
		strings.TrimSuffix(rolePath, "/"): http.StatusOK,
		rolePath + "keyhold-parent":       http.StatusOK,
		rolePath + "other":                http.StatusNotFound,
		"/latest/user-data":               http.StatusNotFound,
	} {
		if code, _ := do(t, s, http.MethodGet, path, tokenHeader, tok); code != want {
			t.Errorf("%s: status %d, want %d", path, code, want)
		}
	}
}

func TestCredentialsCanBeReplaced(t *testing.T) {
	s, _ := newServer(t)
	tok := token(t, s, "60")
	s.SetCredentials(good)
	next := good
	next.AccessKeyID = "ASIANEXT"
	s.SetCredentials(next)
	if _, body := do(t, s, http.MethodGet, rolePath+"keyhold-parent", tokenHeader, tok); !strings.Contains(body, `"ASIANEXT"`) {
		t.Errorf("still the old credentials: %s", body)
	}
}

func TestFaultsAreInjected(t *testing.T) {
	s, _ := newServer(t)
	s.SetCredentials(good)
	srv := httptest.NewServer(s)
	defer srv.Close()
	get := func(ctx context.Context) (int, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, srv.URL+rolePath, nil)
		if err != nil {
			return 0, err
		}
		resp, err := srv.Client().Do(req)
		if err != nil {
			return 0, err
		}
		return resp.StatusCode, resp.Body.Close()
	}
	s.SetFault(func(string, string) imds.Fault { return imds.Fault{Status: http.StatusServiceUnavailable} })
	if code, err := get(t.Context()); err != nil || code != http.StatusServiceUnavailable {
		t.Errorf("status fault: %d, %v", code, err)
	}
	s.SetFault(func(string, string) imds.Fault { return imds.Fault{Drop: true} })
	if _, err := get(t.Context()); !errors.Is(err, io.EOF) {
		t.Errorf("drop fault: %v", err)
	}
	s.SetFault(func(string, string) imds.Fault { return imds.Fault{Delay: time.Hour} })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := get(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("delay fault: %v", err)
	}
	s.SetFault(nil)
	if code, err := get(t.Context()); err != nil || code != http.StatusUnauthorized {
		t.Errorf("no fault: %d, %v", code, err)
	}
}

func TestARoleNameIsNeeded(t *testing.T) {
	for _, role := range []string{"", "a/b", strings.Repeat("r", 65)} {
		if _, err := imds.New(imds.Options{Role: role}); err == nil {
			t.Errorf("role %q was accepted", role)
		}
	}
}
