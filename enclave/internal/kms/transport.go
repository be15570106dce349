package kms

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/ratelimit"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	awskms "github.com/aws/aws-sdk-go-v2/service/kms"
	smithyendpoints "github.com/aws/smithy-go/endpoints"
)

const (
	maxAttempts    = 3
	maxBackoff     = 2 * time.Second
	attemptTimeout = 15 * time.Second // from the dial to the last byte of the body
	tlsTimeout     = 10 * time.Second
	maxHeader      = 16 << 10
	maxBody        = 256 << 10 // the longest reply is a key policy: 32 KiB, and as JSON in JSON up to six times that
)

var (
	errTooLong  = errors.New("kms: reply is too long")
	errOtherURL = errors.New("kms: refused to send a request elsewhere")
)

// newAPI builds the SDK's client from the options alone: neither environment
// nor files nor the SDK's table of endpoints have a say. (The SDK reads two
// variables, for its User-Agent and its default retry costs; neither reaches
// anything that is set here.)
func newAPI(o Options, arn KeyARN, backoff retry.BackoffDelayer) *awskms.Client {
	return awskms.New(awskms.Options{
		Region:                     arn.Region,
		EndpointResolverV2:         fixedEndpoint{host: arn.Host()},
		HTTPClient:                 newHTTPClient(o, arn.Host()),
		HTTPSignerV4:               clockSigner{signer: v4.NewSigner(), now: o.Now},
		DisableClockSkewCorrection: true,
		Retryer:                    newRetryer(backoff),
	})
}

func newRetryer(backoff retry.BackoffDelayer) aws.Retryer {
	return retry.NewStandard(func(s *retry.StandardOptions) {
		s.MaxAttempts = maxAttempts
		s.MaxBackoff = maxBackoff
		s.Backoff = backoff
		s.RateLimiter = ratelimit.None
		s.Retryables = []retry.IsErrorRetryable{
			retry.NoRetryCanceledError{},
			retry.IsErrorRetryableFunc(func(err error) aws.Ternary {
				code := classify(err)
				return aws.BoolTernary(code == CodeUnreachable || code == CodeThrottled)
			}),
		}
	})
}

// fixedEndpoint resolves to the host that was derived from the measured ARN.
type fixedEndpoint struct{ host string }

func (e fixedEndpoint) ResolveEndpoint(context.Context, awskms.EndpointParameters) (smithyendpoints.Endpoint, error) {
	return smithyendpoints.Endpoint{URI: url.URL{Scheme: "https", Host: e.host}}, nil
}

// clockSigner dates signatures by the enclave's own clock.
type clockSigner struct {
	signer *v4.Signer
	now    func() time.Time
}

func (s clockSigner) SignHTTP(ctx context.Context, credentials aws.Credentials, r *http.Request, payloadHash, service, region string,
	_ time.Time, optFns ...func(*v4.SignerOptions),
) error {
	return s.signer.SignHTTP(ctx, credentials, r, payloadHash, service, region, s.now(), optFns...)
}

// newHTTPClient speaks HTTP/1.1 over TLS that ends here. A connection serves
// one request: there are a few an hour, and none is left to be watched between.
func newHTTPClient(o Options, host string) *http.Client {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return o.Dial(ctx) },
		TLSClientConfig: &tls.Config{
			RootCAs:    o.Roots,
			ServerName: host,
			MinVersion: tls.VersionTLS12,
			Time:       o.Now,
			NextProtos: []string{"http/1.1"},
		},
		TLSHandshakeTimeout:    tlsTimeout,
		MaxResponseHeaderBytes: maxHeader,
		DisableCompression:     true,
		DisableKeepAlives:      true,
	}
	return &http.Client{
		Transport:     onlyHost{host: host, next: transport},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Timeout:       attemptTimeout,
	}
}

// onlyHost sends requests to one host over TLS and bounds what comes back.
type onlyHost struct {
	host string
	next http.RoundTripper
}

func (t onlyHost) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" || r.URL.Host != t.host || r.Host != "" && r.Host != t.host {
		return nil, errOtherURL
	}
	own, err := ownBody(r)
	if err != nil {
		return nil, err
	}
	resp, err := t.next.RoundTrip(own)
	if err != nil {
		return nil, fmt.Errorf("send to KMS: %w", err)
	}
	resp.Body = &boundedBody{body: resp.Body, left: maxBody}
	return resp, nil
}

// ownBody returns r with a copy of its body. The SDK closes the body as soon as it
// has the head of an answer; net/http, which may still be looking for the body's
// end, would then break the connection under an answer that is still coming in.
func ownBody(r *http.Request) (*http.Request, error) {
	if r.Body == nil {
		return r, nil
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, fmt.Errorf("send to KMS: read the request: %w", err)
	}
	own := r.Clone(r.Context())
	own.Body = io.NopCloser(bytes.NewReader(body))
	return own, nil
}

// boundedBody fails where io.LimitReader would cut silently.
type boundedBody struct {
	body io.ReadCloser
	left int
}

func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, errTooLong
	}
	n, err := b.body.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err //nolint:wrapcheck // io.EOF must stay itself
}

func (b *boundedBody) Close() error {
	return b.body.Close() //nolint:wrapcheck // nothing to add
}
