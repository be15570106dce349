package egress_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/parent/egress"
)

const marker = "wJalrXUtnFEMI-marker"

// metadata is an IMDS that answers version 2 only, as EC2 does.
type metadata struct {
	down    bool
	expires time.Time
}

func (m *metadata) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	const role = "/latest/meta-data/iam/security-credentials/"
	token := r.Header.Get("X-Aws-Ec2-Metadata-Token") == "session"
	switch {
	case m.down:
		w.WriteHeader(http.StatusServiceUnavailable)
	case r.URL.Path == "/latest/api/token" && r.Method == http.MethodPut:
		w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "21600")
		io.WriteString(w, "session")
	case !token:
		w.WriteHeader(http.StatusUnauthorized)
	case r.URL.Path == role:
		io.WriteString(w, "keyhold-parent")
	case r.URL.Path == role+"keyhold-parent":
		fmt.Fprintf(w, `{"Code":"Success","Type":"AWS-HMAC","AccessKeyId":"ASIA1","SecretAccessKey":%q,"Token":"token1","Expiration":%q}`,
			marker, m.expires.Format(time.RFC3339))
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

func get(t *testing.T, c egress.Credentials, method, path string) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	c.Handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), method, path, nil))
	return w.Code, w.Body.String()
}

func TestRoleCredentialsComeFromIMDSv2(t *testing.T) {
	expires := time.Now().Add(30 * time.Minute).UTC().Truncate(time.Second)
	srv := httptest.NewServer(&metadata{expires: expires})
	defer srv.Close()
	code, body := get(t, egress.Credentials{Source: egress.InstanceRole(srv.URL, srv.Client())}, http.MethodGet, egress.CredentialsPath)
	if code != http.StatusOK {
		t.Fatalf("status %d: %s", code, body)
	}
	var got map[string]string
	if err := json.Unmarshal([]byte(body), &got); err != nil {
		t.Fatal(err)
	}
	// The cache renews 5 minutes before the end and says so.
	want := map[string]string{
		"AccessKeyId": "ASIA1", "SecretAccessKey": marker, "Token": "token1",
		"Expiration": expires.Add(-5 * time.Minute).Format(time.RFC3339),
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatal(diff)
	}
}

func TestStaticCredentialsHaveNoEnd(t *testing.T) {
	code, body := get(t, egress.Credentials{Source: egress.Static("AKIA1", marker, "")}, http.MethodGet, egress.CredentialsPath)
	if want := `{"AccessKeyId":"AKIA1","SecretAccessKey":"` + marker + `","Token":""}`; code != http.StatusOK || body != want {
		t.Fatalf("status %d, %s, want %s", code, body, want)
	}
}

type provider func() (aws.Credentials, error)

func (p provider) Retrieve(context.Context) (aws.Credentials, error) { return p() }

func TestWithoutGoodCredentialsTheAnswerIsTheCodeAndNothingElse(t *testing.T) {
	down := httptest.NewServer(&metadata{down: true})
	defer down.Close()
	expired := httptest.NewServer(&metadata{expires: time.Now().Add(-time.Hour)})
	defer expired.Close()
	impatient := &http.Client{Timeout: time.Second}
	for _, tt := range []struct {
		name   string
		source egress.Source
		want   string
	}{
		{"none", egress.Source{}, "egress: no AWS credentials"},
		{"IMDS is down", egress.InstanceRole(down.URL, impatient), "egress: no AWS credentials"},
		{"expired", egress.InstanceRole(expired.URL, impatient), "egress: the AWS credentials have expired"},
		{"empty", egress.FromProvider(provider(func() (aws.Credentials, error) { return aws.Credentials{}, nil })), "egress: no AWS credentials"},
		{"an error that repeats them", egress.FromProvider(provider(func() (aws.Credentials, error) {
			return aws.Credentials{}, fmt.Errorf("bad answer: %s", marker)
		})), "egress: no AWS credentials"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var log bytes.Buffer
			code, body := get(t, egress.Credentials{Source: tt.source, Logger: slog.New(slog.NewTextHandler(&log, nil))}, http.MethodGet, egress.CredentialsPath)
			if code != http.StatusServiceUnavailable || body != `{"code":"kms_credentials"}` {
				t.Fatalf("status %d: %s", code, body)
			}
			if !strings.Contains(log.String(), tt.want) || strings.Contains(log.String(), marker) {
				t.Fatalf("log: %s", log.String())
			}
		})
	}
}

func TestOnlyTheOnePathIsServed(t *testing.T) {
	c := egress.Credentials{Source: egress.Static("AKIA1", marker, "")}
	for _, tt := range []struct {
		method, path string
		want         int
	}{
		{http.MethodPost, egress.CredentialsPath, http.StatusMethodNotAllowed},
		{http.MethodGet, "/", http.StatusNotFound},
		{http.MethodGet, egress.CredentialsPath + "/x", http.StatusNotFound},
	} {
		if code, body := get(t, c, tt.method, tt.path); code != tt.want || strings.Contains(body, marker) {
			t.Errorf("%s %s: %d %q, want %d", tt.method, tt.path, code, body, tt.want)
		}
	}
}

func TestASourceDoesNotPrint(t *testing.T) {
	s := struct{ Source egress.Source }{egress.Static("AKIA1", marker, marker)}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%d", "%x"} {
		if got := fmt.Sprintf(verb, s); strings.Contains(got, marker) || strings.Contains(got, fmt.Sprintf("%x", marker)) {
			t.Errorf("%s printed %s", verb, got)
		}
	}
	if b, err := json.Marshal(s); err == nil && strings.Contains(string(b), marker) {
		t.Errorf("JSON printed %s", b)
	}
}

func TestTheCredentialServerEndsWithItsContext(t *testing.T) {
	ln := loopback(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- egress.Credentials{Source: egress.Static("AKIA1", marker, "")}.Serve(ctx, ln) }()
	client := &http.Client{Transport: &http.Transport{}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+ln.Addr().String()+egress.CredentialsPath, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	client.CloseIdleConnections()
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	var d net.Dialer
	if _, err := d.DialContext(t.Context(), "tcp", ln.Addr().String()); err == nil {
		t.Fatal("still listening")
	}
}
