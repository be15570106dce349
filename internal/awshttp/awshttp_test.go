package awshttp_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"

	"github.com/keyhold/keyhold/internal/awshttp"
)

// fastServer answers before it has read the body, as a quick local DynamoDB may.
func fastServer(t *testing.T) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/x-amz-json-1.0")
		_, _ = io.WriteString(w, `{"TableNames":["`+strings.Repeat("t", 200)+`"]}`)
	}))
	t.Cleanup(s.Close)
	return s
}

// dialCounter dials TCP and counts.
type dialCounter struct {
	dials atomic.Int64
}

func (d *dialCounter) dial(ctx context.Context, network, address string) (net.Conn, error) {
	d.dials.Add(1)
	return (&net.Dialer{}).DialContext(ctx, network, address)
}

func sdkClient(url string, httpClient aws.HTTPClient) *dynamodb.Client {
	return dynamodb.New(dynamodb.Options{
		Region:           "us-east-1",
		BaseEndpoint:     aws.String(url),
		Credentials:      credentials.NewStaticCredentialsProvider("AKIDEXAMPLE", "example", ""),
		HTTPClient:       httpClient,
		RetryMaxAttempts: 1,
	})
}

func TestConnectionsToAFastServerAreReused(t *testing.T) {
	server := fastServer(t)
	var counter dialCounter
	client := sdkClient(server.URL, awshttp.New(awshttp.Options{Dial: counter.dial}))

	const calls = 2000
	for range calls {
		if _, err := client.ListTables(t.Context(), &dynamodb.ListTablesInput{}); err != nil {
			t.Fatalf("list tables: %v", err)
		}
	}
	if got := counter.dials.Load(); got > 2 {
		t.Errorf("%d dials for %d calls in a row, want one", got, calls)
	}
}

func TestManyWorkersKeepOneConnectionEach(t *testing.T) {
	server := fastServer(t)
	var counter dialCounter
	client := sdkClient(server.URL, awshttp.New(awshttp.Options{Dial: counter.dial}))

	const workers, rounds = 48, 20
	for range rounds { // each round lets all connections go idle at once
		var group sync.WaitGroup
		for range workers {
			group.Go(func() {
				if _, err := client.ListTables(t.Context(), &dynamodb.ListTablesInput{}); err != nil {
					t.Errorf("list tables: %v", err)
				}
			})
		}
		group.Wait()
	}
	// A request that starts while another one ends may dial a spare connection, hence the factor.
	if got := counter.dials.Load(); got > 2*workers {
		t.Errorf("%d dials for %d workers in %d rounds", got, workers, rounds)
	}
}

func TestTheBodyArrivesAlthoughTheCallerClosesIt(t *testing.T) {
	const want = `{"TableName":"batches"}`
	got := make(chan string, 1)
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Errorf("read body: %v", err)
		}
		got <- string(body)
	}))
	t.Cleanup(server.Close)

	body := &closable{Reader: strings.NewReader(want)}
	client := awshttp.New(awshttp.Options{
		// What the SDK does after Do, at the worst moment: before the network has read a byte.
		Wrap: func(next http.RoundTripper) http.RoundTripper {
			return roundTripFunc(func(r *http.Request) (*http.Response, error) {
				body.closed.Store(true)
				return next.RoundTrip(r)
			})
		},
	})
	if status := do(t, client, server.URL, body); status != http.StatusOK {
		t.Errorf("status %d, want 200", status)
	}
	if g := <-got; g != want {
		t.Errorf("the server received %q, want %q", g, want)
	}
}

func TestABodyAboveTheLimitIsRefused(t *testing.T) {
	const limit = 16 << 20
	for _, tc := range []struct {
		name string
		body io.Reader
		want error
	}{
		{"at the limit, length known", bytes.NewReader(make([]byte, limit)), nil},
		{"one above, length known", bytes.NewReader(make([]byte, limit+1)), awshttp.ErrBodyTooLarge},
		{"one above, length unknown", io.MultiReader(bytes.NewReader(make([]byte, limit+1))), awshttp.ErrBodyTooLarge},
	} {
		t.Run(tc.name, func(t *testing.T) {
			sent := false
			client := awshttp.New(awshttp.Options{Wrap: func(http.RoundTripper) http.RoundTripper {
				return roundTripFunc(func(*http.Request) (*http.Response, error) {
					sent = true
					return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}, nil
				})
			}})
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://localhost/", tc.body)
			if err != nil {
				t.Fatal(err)
			}
			res, err := client.Do(req)
			if err == nil {
				err = res.Body.Close()
			}
			if !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
			if wantSent := tc.want == nil; sent != wantSent {
				t.Errorf("sent %v, want %v", sent, wantSent)
			}
		})
	}
}

func TestASilentServerFailsTheRequest(t *testing.T) {
	release := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release }))
	t.Cleanup(server.Close)
	t.Cleanup(func() { close(release) })

	client := awshttp.New(awshttp.Options{ReadTimeout: 50 * time.Millisecond})
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL, strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	res, err := client.Do(req)
	if err == nil {
		_ = res.Body.Close()
		t.Fatal("a server that answers nothing gave an answer")
	}
	if netErr, ok := errors.AsType[net.Error](err); !ok || !netErr.Timeout() {
		t.Errorf("error %v, want a time-out", err)
	}
}

func TestRedirectsAreNotFollowed(t *testing.T) {
	server := httptest.NewServer(http.RedirectHandler("http://127.0.0.1:1/", http.StatusFound))
	t.Cleanup(server.Close)
	client := awshttp.New(awshttp.Options{})
	if status := do(t, client, server.URL, strings.NewReader("{}")); status != http.StatusFound {
		t.Errorf("status %d, want the redirect itself", status)
	}
}

// do posts body and returns the status.
func do(t *testing.T, client *awshttp.Client, url string, body io.Reader) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, body)
	if err != nil {
		t.Fatal(err)
	}
	res, err := client.Do(req)
	if err != nil {
		t.Fatalf("do: %v", err)
	}
	if err := res.Body.Close(); err != nil {
		t.Errorf("close answer: %v", err)
	}
	return res.StatusCode
}

type roundTripFunc func(*http.Request) (*http.Response, error)

func (f roundTripFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// closable reads as ended once it is closed, as the SDK's body does.
type closable struct {
	io.Reader
	closed atomic.Bool
}

func (c *closable) Read(p []byte) (int, error) {
	if c.closed.Load() {
		return 0, io.EOF
	}
	return c.Reader.Read(p)
}
