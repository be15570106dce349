package enclave

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/keyhold/keyhold/enclave/internal/kms"
)

const (
	credentialsURL     = "http://parent/credentials" //nolint:gosec // no credential; the host is nobody's: the connection is dialled
	credentialsTimeout = 15 * time.Second            // longer than the parent gives its own source
	maxCredentials     = 16 << 10                    // bytes of the answer
	maxCredentialsHead = 4 << 10
)

// credentialsAnswer is what the parent's credential server says.
type credentialsAnswer struct {
	AccessKeyID     string `json:"AccessKeyId"`
	SecretAccessKey string `json:"SecretAccessKey"`
	Token           string `json:"Token"`
	Expiration      string `json:"Expiration"` // not looked at: KMS judges, by a clock that is not the parent's
}

// credentialsFrom asks the parent for its AWS credentials, anew each time. They
// only say who pays and may call: whether a key is given depends on attestation.
func credentialsFrom(dial func(context.Context) (net.Conn, error)) func(context.Context) (kms.Credentials, error) {
	return func(ctx context.Context) (kms.Credentials, error) {
		ctx, cancel := context.WithTimeout(ctx, credentialsTimeout)
		defer cancel()
		a, err := askCredentials(ctx, dial)
		if err != nil {
			return kms.Credentials{}, fmt.Errorf("ask the parent for credentials: %w", err)
		}
		return kms.Credentials{AccessKeyID: a.AccessKeyID, SecretAccessKey: a.SecretAccessKey, SessionToken: a.Token}, nil
	}
}

func askCredentials(ctx context.Context, dial func(context.Context) (net.Conn, error)) (a credentialsAnswer, err error) {
	client := &http.Client{
		Transport: &http.Transport{
			DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
			DisableKeepAlives:      true,
			MaxResponseHeaderBytes: maxCredentialsHead,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, credentialsURL, nil)
	if err != nil {
		return a, fmt.Errorf("make request: %w", err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return a, errors.New("no answer") // err may quote what the parent sent
	}
	defer func() { err = errors.Join(err, resp.Body.Close()) }()
	if resp.StatusCode != http.StatusOK {
		return a, errors.New("refused")
	}
	dec := json.NewDecoder(io.LimitReader(resp.Body, maxCredentials))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&a); err != nil || dec.More() {
		return credentialsAnswer{}, errors.New("answer is malformed")
	}
	if a.AccessKeyID == "" || a.SecretAccessKey == "" {
		return credentialsAnswer{}, errors.New("answer is incomplete")
	}
	return a, nil
}
