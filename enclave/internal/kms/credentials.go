package kms

import (
	"errors"
	"fmt"
	"log/slog"
)

// Credentials are those of the parent's instance role. The parent hands them
// over, so they are no secret of the enclave; still they belong in no log.
type Credentials struct {
	AccessKeyID, SecretAccessKey, SessionToken string
}

const (
	redacted      = "[credentials]"
	maxCredential = 8 << 10 // bytes; session tokens have a few KB and no stated limit
)

var errEncode = errors.New("kms: credentials refuse to be encoded")

// usable refuses what could not stand in an HTTP header.
func (c Credentials) usable() bool {
	return c.AccessKeyID != "" && c.SecretAccessKey != "" &&
		printable(c.AccessKeyID) && printable(c.SecretAccessKey) && printable(c.SessionToken)
}

func printable(text string) bool {
	for i := range len(text) {
		if text[i] <= ' ' || text[i] > '~' {
			return false
		}
	}
	return len(text) <= maxCredential
}

// Format prints the same fixed text for every verb.
func (c Credentials) Format(f fmt.State, _ rune) {
	// A writer that fails is the business of whoever gave it to fmt.
	_, _ = f.Write([]byte(redacted))
}

// LogValue logs a fixed text.
func (c Credentials) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText always fails.
func (c Credentials) MarshalText() ([]byte, error) { return nil, errEncode }
