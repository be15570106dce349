package doctor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/egress"
)

// The metadata service of EC2 (IMDSv2).
const (
	imdsToken = "http://169.254.169.254/latest/api/token" //nolint:gosec // G101: an address
	imdsID    = "http://169.254.169.254/latest/meta-data/instance-id"
)

// soon is when credentials should have been renewed.
const soon = 2 * time.Minute

// imds fetches a session token, which it drops, and looks whether the version
// that needs none is refused. The hop limit cannot be seen from here: 1 is enough,
// since keyhold-parent runs on the host itself.
func (e *exam) imds(ctx context.Context) Finding {
	if e.HTTP == nil {
		return skip("the metadata service is not asked")
	}
	before := e.Now()
	status, header, err := e.ask(ctx, http.MethodPut, imdsToken, "X-aws-ec2-metadata-token-ttl-seconds", "60")
	if err != nil || status != http.StatusOK {
		return fail("the metadata service gives no session token", "turn IMDSv2 on: aws ec2 modify-instance-metadata-options --http-endpoint enabled --http-tokens required --http-put-response-hop-limit 1")
	}
	if date, err := http.ParseTime(header.Get("Date")); err == nil && e.remote.IsZero() {
		// It tells whole seconds: half of one is the best guess.
		e.remote, e.local, e.source = date.Add(time.Second/2), before.Add(e.Now().Sub(before)/2), "the metadata service's"
	}
	if old, _, err := e.ask(ctx, http.MethodGet, imdsID, "", ""); err == nil && old == http.StatusOK {
		return warn("IMDSv1 is on: any request forger on this host gets the role's credentials", "aws ec2 modify-instance-metadata-options --http-tokens required --http-put-response-hop-limit 1")
	}
	return good("IMDSv2 answers, and IMDSv1 is off")
}

// ask makes one request and drops the body.
func (e *exam) ask(ctx context.Context, method, url, header, value string) (int, http.Header, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, nil)
	if err != nil {
		return 0, nil, fmt.Errorf("ask the metadata service: %w", err)
	}
	if header != "" {
		req.Header.Set(header, value)
	}
	resp, err := e.HTTP(req)
	if err != nil {
		return 0, nil, fmt.Errorf("ask the metadata service: %w", err)
	}
	_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, maxFile))
	if err = errors.Join(err, resp.Body.Close()); err != nil {
		return 0, nil, fmt.Errorf("ask the metadata service: %w", err)
	}
	return resp.StatusCode, resp.Header, nil
}

func (e *exam) credentials(ctx context.Context) Finding {
	if e.Credentials == nil {
		return skip("credentials are not fetched")
	}
	expires, err := e.Credentials(ctx)
	if err != nil {
		return fail("the instance role gives no credentials", "give the instance a profile whose role may use the tables and, under attestation, the KMS key")
	}
	if left := expires.Sub(e.Now()); !expires.IsZero() && left < soon {
		return warn(fmt.Sprintf("the role's credentials expire in %v and were not renewed", left.Round(time.Second)), "look whether the role still exists, and at the clock")
	}
	return good("the instance role gives credentials")
}

func (e *exam) tables(ctx context.Context) Finding {
	if e.Tables == nil {
		return skip("DynamoDB is not asked")
	}
	err := e.Tables(ctx)
	switch {
	case err == nil:
		return good("all tables are there and active")
	case errors.Is(err, refusal.TablesMissing):
		return fail("tables are missing, or not active yet", "keyhold tables create, or the stack of infra/; and look at KEYHOLD_TABLE_PREFIX")
	case errors.Is(err, refusal.StoreDenied):
		return fail("DynamoDB denies this role", "give the role of this host dynamodb:DescribeTable and the other actions that the stack of infra/ grants on the tables")
	}
	return fail("the tables cannot be looked at: "+reason(err), "look at the route to DynamoDB: the gateway endpoint and its policy")
}

func (e *exam) kmsEndpoint(ctx context.Context) Finding {
	cfg := e.loadConfig()
	if cfg == nil || e.TLS == nil {
		return skip("without a valid config nobody knows which KMS")
	}
	host, err := egress.KMSHost(cfg.KMSKeyARN)
	if err != nil {
		return skip("the config names no KMS key")
	}
	if err := e.TLS(ctx, host); err != nil {
		return fail(host+" is not reached with TLS: "+reason(err), "look at the interface endpoint of KMS, its private DNS and its security group (443 from this host)")
	}
	return good("%s is reached with TLS", host)
}
