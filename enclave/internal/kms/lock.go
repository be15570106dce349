package kms

import (
	"context"
	"log/slog"

	"github.com/aws/aws-sdk-go-v2/aws"
	awskms "github.com/aws/aws-sdk-go-v2/service/kms"

	"github.com/keyhold/keyhold/keypolicy"
)

const (
	policyName    = "default" // the only one that KMS knows
	grantsPerPage = 20
	maxGrantPages = 1000 // far beyond the quota of grants on a key; a reply that never ends is refused
)

// Lock is what decides who gets data keys: policy, state and grants of the key,
// as KMS itself tells them over the enclave's own TLS. It is what was true when
// it was read: KMS gives no history.
type Lock struct {
	Policy []byte             // the text as it was put, at most 32 KiB
	Key    keypolicy.KeyFacts // of the measured ARN
}

// ReadLock asks KMS for the key's policy, then for its metadata and grants: in
// that order a grant from before the policy forbade grants is still seen. It
// answers errors as Decrypt does.
func (c *Client) ReadLock(ctx context.Context) (*Lock, error) {
	policy, err := c.readPolicy(ctx)
	if err != nil {
		return nil, err
	}
	key, err := c.describe(ctx)
	if err != nil {
		return nil, err
	}
	if key.Grants, err = c.countGrants(ctx); err != nil {
		return nil, err
	}
	c.log.InfoContext(ctx, "key policy read from KMS", slog.String("key_arn", c.arn), slog.Int("grants", key.Grants))
	return &Lock{Policy: policy, Key: key}, nil
}

func (c *Client) readPolicy(ctx context.Context) ([]byte, error) {
	const op = "GetKeyPolicy"
	req, err := c.unattested(ctx, op)
	if err != nil {
		return nil, err
	}
	out, err := c.api.GetKeyPolicy(ctx, &awskms.GetKeyPolicyInput{KeyId: &c.arn, PolicyName: aws.String(policyName)}, req.options)
	if err != nil {
		return nil, c.fail(ctx, op, classify(err))
	}
	if aws.ToString(out.PolicyName) != policyName || aws.ToString(out.Policy) == "" {
		return nil, c.fail(ctx, op, CodeReply)
	}
	return []byte(*out.Policy), nil
}

func (c *Client) describe(ctx context.Context) (keypolicy.KeyFacts, error) {
	const op = "DescribeKey"
	req, err := c.unattested(ctx, op)
	if err != nil {
		return keypolicy.KeyFacts{}, err
	}
	out, err := c.api.DescribeKey(ctx, &awskms.DescribeKeyInput{KeyId: &c.arn}, req.options)
	if err != nil {
		return keypolicy.KeyFacts{}, c.fail(ctx, op, classify(err))
	}
	m := out.KeyMetadata
	if m == nil || aws.ToString(m.Arn) != c.arn {
		return keypolicy.KeyFacts{}, c.fail(ctx, op, CodeReply)
	}
	return keypolicy.KeyFacts{
		ARN: aws.ToString(m.Arn), Account: aws.ToString(m.AWSAccountId),
		KeyManager: string(m.KeyManager), KeyState: string(m.KeyState), Enabled: m.Enabled, MultiRegion: m.MultiRegion,
		Origin: string(m.Origin), KeySpec: string(m.KeySpec), KeyUsage: string(m.KeyUsage),
	}, nil
}

// countGrants walks every page: a page may be empty and yet not be the last.
func (c *Client) countGrants(ctx context.Context) (int, error) {
	const op = "ListGrants"
	grants := 0
	var marker *string
	for range maxGrantPages {
		req, err := c.unattested(ctx, op)
		if err != nil {
			return 0, err
		}
		out, err := c.api.ListGrants(ctx, &awskms.ListGrantsInput{KeyId: &c.arn, Limit: aws.Int32(grantsPerPage), Marker: marker}, req.options)
		if err != nil {
			return 0, c.fail(ctx, op, classify(err))
		}
		grants += len(out.Grants)
		switch next := aws.ToString(out.NextMarker); {
		case !out.Truncated:
			return grants, nil
		case next == "" || next == aws.ToString(marker):
			return 0, c.fail(ctx, op, CodeReply)
		}
		marker = out.NextMarker
	}
	return 0, c.fail(ctx, op, CodeReply)
}

// unattested refuses a debug enclave and gets the credentials of the moment.
// What KMS tells on such a request is no secret.
func (c *Client) unattested(ctx context.Context, op string) (*request, error) {
	if code := c.measured(); code != "" {
		return nil, c.fail(ctx, op, code)
	}
	credentials, err := c.credentials(ctx)
	if err != nil || !credentials.usable() {
		return nil, c.fail(ctx, op, CodeCredentials)
	}
	return &request{credentials: credentials}, nil
}
