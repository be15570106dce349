package kms

import (
	"net/http"
	"time"
)

var (
	TestingOnlyUnwrapKey  = unwrapKey
	TestingOnlyDecryptCBC = decryptCBC
)

const TestingOnlyMaxEnvelope = maxEnvelope

// TestingOnlyNew makes a Client that does not wait between attempts.
func TestingOnlyNew(o Options) (*Client, error) { return newClient(o, noDelay{}) }

type noDelay struct{}

func (noDelay) BackoffDelay(int, error) (time.Duration, error) { return 0, nil }

// TestingOnlyOnlyHost is the transport that sends to host through next.
func TestingOnlyOnlyHost(host string, next http.RoundTripper) http.RoundTripper {
	return onlyHost{host: host, next: next}
}

const (
	TestingOnlyMaxAttempts = maxAttempts
	TestingOnlyMaxBody     = maxBody
)
