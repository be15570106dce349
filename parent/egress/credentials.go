package egress

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/credentials/ec2rolecreds"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"

	"github.com/keyhold/keyhold/internal/refusal"
)

// CredentialsPath is where the credential server answers.
const CredentialsPath = "/credentials"

// Limits of the credential server.
const (
	credentialsTimeout = 10 * time.Second // of a whole request, asking IMDS included
	credentialsHeader  = 4 << 10          // bytes of a request's head
	renewBefore        = 5 * time.Minute  // credentials are renewed so long before they expire
	endGrace           = time.Second      // requests that run when the server ends
)

// Errors of a Source. None repeats what the source answered.
var (
	ErrNoCredentials = fmt.Errorf("egress: no AWS credentials: %w", refusal.KMSCredentials)
	ErrExpired       = fmt.Errorf("egress: the AWS credentials have expired: %w", refusal.KMSCredentials)
)

// Source gives AWS credentials. They sit behind a function, so a Source prints
// as an address under every verb. The zero value gives none.
type Source struct {
	retrieve func(context.Context) (aws.Credentials, error)
}

// FromProvider takes the credentials of p and keeps them until they expire.
func FromProvider(p aws.CredentialsProvider) Source {
	cache := aws.NewCredentialsCache(p, func(o *aws.CredentialsCacheOptions) { o.ExpiryWindow = renewBefore })
	return Source{retrieve: cache.Retrieve}
}

// Static gives always the same credentials. Local mode only.
func Static(accessKeyID, secretAccessKey, sessionToken string) Source {
	return Source{retrieve: credentials.NewStaticCredentialsProvider(accessKeyID, secretAccessKey, sessionToken).Retrieve}
}

// InstanceRole gives the credentials of the instance's role from IMDSv2. It
// never falls back to IMDSv1, whose answers any request forger on the instance
// can fetch. An empty endpoint is the one of EC2.
func InstanceRole(endpoint string, client imds.HTTPClient) Source {
	return FromProvider(ec2rolecreds.New(func(o *ec2rolecreds.Options) {
		o.Client = imds.New(imds.Options{
			ClientEnableState: imds.ClientEnabled, EnableFallback: aws.FalseTernary,
			Endpoint: endpoint, HTTPClient: client,
		})
	}))
}

// Expires fetches credentials, drops them, and returns when they expire: the zero
// time where they do not.
func (s Source) Expires(ctx context.Context) (time.Time, error) {
	if s.retrieve == nil {
		return time.Time{}, ErrNoCredentials
	}
	cred, err := s.retrieve(ctx)
	if err != nil || !cred.HasKeys() {
		return time.Time{}, errors.Join(ErrNoCredentials, ctx.Err())
	}
	if !cred.CanExpire {
		return time.Time{}, nil
	}
	return cred.Expires, nil
}

// Credentials serves the credentials of a Source to enclaves.
type Credentials struct {
	Source Source
	// Logger is told when there are none, and never what they are. Nil: nobody is.
	Logger *slog.Logger
	// Now tells whether credentials have expired. Nil is time.Now.
	Now func() time.Time
}

// answer is the body of GET /credentials: what an instance's own credential
// endpoint answers, under the same names.
type answer struct {
	AccessKeyID     string `json:"AccessKeyId"`
	SecretAccessKey string `json:"SecretAccessKey"`
	Token           string `json:"Token"`
	Expiration      string `json:"Expiration,omitempty"` // RFC 3339; absent where they never expire
}

// Serve answers until ctx ends, which is no error, or ln fails. It closes ln.
func (c Credentials) Serve(ctx context.Context, ln net.Listener) error {
	srv := &http.Server{
		Handler:           c.Handler(),
		ReadHeaderTimeout: credentialsTimeout,
		ReadTimeout:       credentialsTimeout,
		WriteTimeout:      2 * credentialsTimeout,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    credentialsHeader,
		ErrorLog:          slog.NewLogLogger(c.logger().Handler(), slog.LevelDebug),
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), endGrace)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			closeQuietly(srv)
		}
	})
	err := srv.Serve(ln)
	if !stop() {
		<-ended
		return nil
	}
	return errors.Join(fmt.Errorf("serve credentials: %w", err), srv.Close())
}

// Handler answers GET /credentials and nothing else.
func (c Credentials) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+CredentialsPath, c.get)
	return mux
}

func (c Credentials) get(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), credentialsTimeout)
	defer cancel()
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	body, err := c.body(ctx)
	if err != nil {
		c.logger().WarnContext(ctx, "no credentials for the enclave", slog.Any("error", err))
		w.WriteHeader(http.StatusServiceUnavailable)
		body = []byte(`{"code":"` + string(refusal.KMSCredentials) + `"}`)
	}
	if _, err := w.Write(body); err != nil {
		c.logger().InfoContext(ctx, "credentials not delivered", slog.Any("error", err))
	}
	clear(body)
}

func (c Credentials) body(ctx context.Context) ([]byte, error) {
	if c.Source.retrieve == nil {
		return nil, ErrNoCredentials
	}
	cred, err := c.Source.retrieve(ctx)
	if err != nil || !cred.HasKeys() {
		// The SDK's error can repeat what came from the endpoint.
		return nil, errors.Join(ErrNoCredentials, ctx.Err())
	}
	now := time.Now
	if c.Now != nil {
		now = c.Now
	}
	a := answer{AccessKeyID: cred.AccessKeyID, SecretAccessKey: cred.SecretAccessKey, Token: cred.SessionToken}
	if cred.CanExpire {
		if !now().Before(cred.Expires) {
			return nil, ErrExpired
		}
		a.Expiration = cred.Expires.UTC().Format(time.RFC3339)
	}
	b, err := json.Marshal(a)
	if err != nil {
		return nil, ErrNoCredentials
	}
	return b, nil
}

func (c Credentials) logger() *slog.Logger {
	if c.Logger == nil {
		return slog.New(slog.DiscardHandler)
	}
	return c.Logger
}
