// Package awshttp is the HTTP client under the AWS SDK: the SDK's own client and time-outs, with
// connections that live. It refuses a request body that no AWS JSON protocol would accept.
package awshttp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	sdkhttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
)

const (
	// minIdlePerHost keeps a connection open for each worker of a busy parent. The SDK's 10 would
	// close and dial again for every burst above it.
	minIdlePerHost = 64

	// maxBody is the largest request DynamoDB takes (BatchWriteItem, 16 MiB); KMS takes less.
	maxBody = 16 << 20

	// The SDK's own dialer waits 30 s, longer than a lease lasts.
	defaultConnectTimeout = 5 * time.Second

	// Silence on a connection, not the length of an answer: see BuildableClient.WithReadTimeout.
	defaultReadTimeout = 10 * time.Second
)

// ErrBodyTooLarge is returned for a request body of more than 16 MiB.
var ErrBodyTooLarge = errors.New("request body is larger than 16 MiB")

// Options describes a Client. The zero value serves production.
type Options struct {
	// Dial opens the connections. Nil: TCP, giving up after 5 s.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)

	// ReadTimeout is how long a connection may deliver nothing before the request fails. Zero: 10 s.
	ReadTimeout time.Duration

	// Timeout bounds one attempt, from dialling to the last byte of the answer. Zero: no bound but
	// the request's context.
	Timeout time.Duration

	// MaxIdleConnsPerHost is how many connections stay open between requests; 64 at least.
	MaxIdleConnsPerHost int

	// Wrap, where set, is put between the SDK and the network. Tests inject faults here.
	Wrap func(http.RoundTripper) http.RoundTripper
}

// Client sends the SDK's requests. It keeps its connections to itself and is safe for concurrent use.
type Client struct {
	network http.RoundTripper
}

var _ aws.HTTPClient = (*Client)(nil)

// New returns a client with a connection pool of its own.
//
// The SDK adjusts only a client that is exactly its BuildableClient, so what it would have set (a
// read time-out, a connect time-out) is set here.
func New(o Options) *Client {
	idle := max(o.MaxIdleConnsPerHost, minIdlePerHost)
	read := o.ReadTimeout
	if read == 0 {
		read = defaultReadTimeout
	}
	sdk := sdkhttp.NewBuildableClient().
		WithDialerOptions(func(d *net.Dialer) { d.Timeout = defaultConnectTimeout }).
		WithTransportOptions(func(t *http.Transport) {
			t.MaxIdleConnsPerHost = idle
			t.MaxIdleConns = max(t.MaxIdleConns, idle)
			if o.Dial != nil {
				t.DialContext = o.Dial
			}
		}).
		WithReadTimeout(read).
		WithTimeout(o.Timeout)

	var network http.RoundTripper = roundTripper{sdk}
	if o.Wrap != nil {
		network = o.Wrap(network)
	}
	return &Client{network: network}
}

// Do sends req with a copy of its body.
//
// The SDK closes its body as soon as Do returns. A fast server has answered by then while net/http
// still holds the body to look for its end; it finds it closed, takes the request for broken and
// closes the connection: about one in ten against a server on the same machine (aws-sdk-go-v2 issue
// 2737), and under load the answer is lost with it. A body that nobody else closes ends that.
func (c *Client) Do(req *http.Request) (*http.Response, error) {
	own, err := detach(req)
	if err != nil {
		return nil, err
	}
	return c.network.RoundTrip(own)
}

// detach returns req with a body that belongs to nobody else. req's own body is left to its owner.
func detach(req *http.Request) (*http.Request, error) {
	if req.Body == nil || req.Body == http.NoBody {
		return req, nil
	}
	body, err := readBody(req)
	if err != nil {
		return nil, err
	}
	own := req.WithContext(req.Context())
	own.ContentLength = int64(len(body))
	own.Body = io.NopCloser(bytes.NewReader(body))
	// With GetBody net/http may try again on another connection where it wrote nothing to the first.
	own.GetBody = func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(body)), nil
	}
	return own, nil
}

func readBody(req *http.Request) ([]byte, error) {
	if req.ContentLength > maxBody {
		return nil, ErrBodyTooLarge
	}
	var buf bytes.Buffer
	buf.Grow(int(max(req.ContentLength, 0)) + bytes.MinRead) // one allocation where the length is known
	if _, err := buf.ReadFrom(io.LimitReader(req.Body, maxBody+1)); err != nil {
		return nil, fmt.Errorf("read request body: %w", err)
	}
	if buf.Len() > maxBody {
		return nil, ErrBodyTooLarge
	}
	return buf.Bytes(), nil
}

// roundTripper lets the SDK's client stand under a Wrap.
type roundTripper struct {
	sdk *sdkhttp.BuildableClient
}

func (r roundTripper) RoundTrip(req *http.Request) (*http.Response, error) {
	return r.sdk.Do(req)
}
