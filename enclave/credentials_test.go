package enclave_test

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/keyhold/keyhold/enclave"
)

func TestCredentialsAreTakenInOneFormOnly(t *testing.T) {
	const marker = "marker-from-the-parent"
	for _, tc := range []struct {
		name   string
		status int
		body   string
		ok     bool
	}{
		{"with expiration", 200, `{"AccessKeyId":"a","SecretAccessKey":"s","Token":"t","Expiration":"2099-01-01T00:00:00Z"}`, true},
		{"that never expire", 200, `{"AccessKeyId":"a","SecretAccessKey":"s","Token":""}`, true},
		{"without access key", 200, `{"SecretAccessKey":"s","Token":"t"}`, false},
		{"without secret", 200, `{"AccessKeyId":"a","Token":"t"}`, false},
		{"with a field too many", 200, `{"AccessKeyId":"a","SecretAccessKey":"s","Token":"t","Endpoint":"` + marker + `"}`, false},
		{"with more behind them", 200, `{"AccessKeyId":"a","SecretAccessKey":"s","Token":"t"}{}`, false},
		{"cut off", 200, `{"AccessKeyId":"a","Secret`, false},
		{"of a megabyte", 200, `{"AccessKeyId":"a","SecretAccessKey":"s","Token":"` + strings.Repeat("t", 1<<20) + `"}`, false},
		{"as a list", 200, `[]`, false},
		{"refused", 503, marker, false},
		{"from elsewhere", 302, marker, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path != "/credentials" {
					t.Errorf("asked for %s", r.URL.Path)
				}
				w.Header().Set("Location", "/elsewhere")
				w.WriteHeader(tc.status)
				_, _ = w.Write([]byte(tc.body)) // the client may hang up on a megabyte
			}))
			defer srv.Close()
			id, err := enclave.TestingOnlyCredentials(t.Context(), dialer(srv.Listener.Addr))
			if (err == nil) != tc.ok || tc.ok && id != "a" || !tc.ok && id != "" {
				t.Errorf("got %q, %v", id, err)
			}
			if err != nil && strings.Contains(err.Error(), marker) {
				t.Errorf("the error quotes the parent: %v", err)
			}
		})
	}
}

func TestAskingForCredentialsEndsWithItsContext(t *testing.T) {
	silent, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := enclave.TestingOnlyCredentials(ctx, dialer(silent.Addr)); err == nil {
		t.Error("a silent parent gave credentials")
	}
}
