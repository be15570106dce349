package kms

import "time"

var (
	TestingOnlyUnwrapKey  = unwrapKey
	TestingOnlyDecryptCBC = decryptCBC
)

const TestingOnlyMaxEnvelope = maxEnvelope

// TestingOnlyNew makes a Client that does not wait between attempts.
func TestingOnlyNew(o Options) (*Client, error) { return newClient(o, noDelay{}) }

type noDelay struct{}

func (noDelay) BackoffDelay(int, error) (time.Duration, error) { return 0, nil }

const (
	TestingOnlyMaxAttempts = maxAttempts
	TestingOnlyMaxBody     = maxBody
)
