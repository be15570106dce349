package kms

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awskms "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"

	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/enclave/internal/secret"
	"github.com/keyhold/keyhold/internal/receipt"
)

const (
	dataKeySize = 32   // bytes, AES-256
	maxWrapped  = 6144 // bytes, CiphertextType in the API of KMS
	rsaBits     = 2048
)

// Options say which key a Client uses and how it gets there.
type Options struct {
	KeyARN      string                                     // from the measured config
	Credentials func(context.Context) (Credentials, error) // asked once for each call
	Dial        func(context.Context) (net.Conn, error)    // plain bytes to the parent's forwarder; TLS is put on top here
	Roots       *x509.CertPool                             // who may vouch for KMS; the system's roots are never used
	Now         func() time.Time                           // the enclave's clock: dates signatures and checks certificates
	NSM         nsm.Session
	Logger      *slog.Logger
}

func (o Options) validate() error {
	missing := func(name string, is bool) error {
		if is {
			return fmt.Errorf("option %s is missing", name)
		}
		return nil
	}
	return errors.Join(
		missing("Credentials", o.Credentials == nil),
		missing("Dial", o.Dial == nil),
		missing("Roots", o.Roots == nil),
		missing("Now", o.Now == nil),
		missing("NSM", o.NSM == nil),
		missing("Logger", o.Logger == nil),
	)
}

// Client calls one KMS key with attestation. It is safe for concurrent use.
type Client struct {
	arn         string
	api         *awskms.Client
	credentials func(context.Context) (Credentials, error)
	nsm         nsm.Session
	log         *slog.Logger
}

// New makes a Client and calls nobody yet.
func New(o Options) (*Client, error) {
	return newClient(o, retry.NewExponentialJitterBackoff(maxBackoff))
}

func newClient(o Options, backoff retry.BackoffDelayer) (*Client, error) {
	arn, arnErr := ParseKeyARN(o.KeyARN)
	if err := errors.Join(arnErr, o.validate()); err != nil {
		return nil, fmt.Errorf("set up the KMS client: %w", err)
	}
	return &Client{
		arn:         arn.String(),
		api:         newAPI(o, arn, backoff),
		credentials: o.Credentials,
		nsm:         o.NSM,
		log:         o.Logger,
	}, nil
}

// request is what one call sends along. Its RSA key, if any, is used for that
// call alone; what it leaves in memory stays until garbage collection.
type request struct {
	key         *rsa.PrivateKey
	recipient   *types.RecipientInfo
	credentials Credentials
}

func (r *request) options(o *awskms.Options) {
	o.Credentials = aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
		return aws.Credentials{
			AccessKeyID:     r.credentials.AccessKeyID,
			SecretAccessKey: r.credentials.SecretAccessKey,
			SessionToken:    r.credentials.SessionToken,
			Source:          "keyhold",
		}, nil
	})
}

// GenerateDataKey asks KMS for a new data key of 32 bytes and returns it with
// its wrapped form, which Decrypt opens under an equal encryption context.
func (c *Client) GenerateDataKey(ctx context.Context, encCtx map[string]string) (wrapped []byte, dek *secret.Bytes, err error) {
	const op = "GenerateDataKey"
	req, err := c.prepare(ctx, op)
	if err != nil {
		return nil, nil, err
	}
	out, err := c.api.GenerateDataKey(ctx, &awskms.GenerateDataKeyInput{
		KeyId:             &c.arn,
		KeySpec:           types.DataKeySpecAes256,
		EncryptionContext: encCtx,
		Recipient:         req.recipient,
	}, req.options)
	if err != nil {
		return nil, nil, c.fail(ctx, op, classify(err))
	}
	defer clear(out.Plaintext)
	if len(out.CiphertextBlob) == 0 || len(out.CiphertextBlob) > maxWrapped {
		return nil, nil, c.fail(ctx, op, CodeReply)
	}
	dek, err = c.open(ctx, op, req, out.KeyId, out.Plaintext, out.CiphertextForRecipient)
	if err != nil {
		return nil, nil, err
	}
	return out.CiphertextBlob, dek, nil
}

// Decrypt opens a wrapped data key that KMS made under the same key and an equal
// encryption context.
func (c *Client) Decrypt(ctx context.Context, wrapped []byte, encCtx map[string]string) (*secret.Bytes, error) {
	const op = "Decrypt"
	if len(wrapped) == 0 || len(wrapped) > maxWrapped {
		return nil, c.fail(ctx, op, CodeWrappedKey)
	}
	req, err := c.prepare(ctx, op)
	if err != nil {
		return nil, err
	}
	out, err := c.api.Decrypt(ctx, &awskms.DecryptInput{
		KeyId:               &c.arn,
		CiphertextBlob:      wrapped,
		EncryptionAlgorithm: types.EncryptionAlgorithmSpecSymmetricDefault,
		EncryptionContext:   encCtx,
		Recipient:           req.recipient,
	}, req.options)
	if err != nil {
		return nil, c.fail(ctx, op, classify(err))
	}
	defer clear(out.Plaintext)
	if out.EncryptionAlgorithm != types.EncryptionAlgorithmSpecSymmetricDefault {
		return nil, c.fail(ctx, op, CodeReply)
	}
	return c.open(ctx, op, req, out.KeyId, out.Plaintext, out.CiphertextForRecipient)
}

// prepare makes a key for this one request and has the NSM attest it.
func (c *Client) prepare(ctx context.Context, op string) (*request, error) {
	req, err := c.unattested(ctx, op)
	if err != nil {
		return nil, err
	}
	key, err := rsa.GenerateKey(rand.Reader, rsaBits)
	if err != nil {
		return nil, c.fail(ctx, op, CodeNSM)
	}
	public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return nil, c.fail(ctx, op, CodeNSM)
	}
	document, err := c.nsm.Attest(nsm.AttestRequest{PublicKey: public, UserData: receipt.UserData(receipt.KindKMS, nil)})
	if err != nil || len(document) == 0 {
		return nil, c.fail(ctx, op, CodeNSM)
	}
	req.key = key
	req.recipient = &types.RecipientInfo{
		AttestationDocument:    document,
		KeyEncryptionAlgorithm: types.KeyEncryptionMechanismRsaesOaepSha256,
	}
	return req, nil
}

// measured returns the code of what is wrong with PCR0, or none.
func (c *Client) measured() Code {
	value, _, err := c.nsm.DescribePCR(0)
	if err != nil || len(value) != nsm.PCRSize {
		return CodeNSM
	}
	if [nsm.PCRSize]byte(value) == [nsm.PCRSize]byte{} {
		return CodeDebugEnclave
	}
	return ""
}

// open checks what every reply promises and opens its envelope.
func (c *Client) open(ctx context.Context, op string, req *request, keyID *string, plaintext, envelope []byte) (*secret.Bytes, error) {
	if aws.ToString(keyID) != c.arn || len(plaintext) != 0 {
		return nil, c.fail(ctx, op, CodeReply)
	}
	dek, err := OpenEnvelope(req.key, envelope)
	if err != nil {
		return nil, c.fail(ctx, op, CodeReply)
	}
	if len(dek) != dataKeySize {
		clear(dek)
		return nil, c.fail(ctx, op, CodeReply)
	}
	c.log.InfoContext(ctx, "data key received from KMS", slog.String("operation", op), slog.String("key_arn", c.arn))
	return secret.New(dek), nil
}

// fail logs a refusal and makes its error. A context that has ended explains
// every failure to reach somebody.
func (c *Client) fail(ctx context.Context, op string, code Code) error {
	err := &Error{Op: op, Code: code}
	if ended := contextError(ctx); ended != nil {
		switch table[code].class {
		case ClassRetry, ClassUnknown:
			err = &Error{Op: op, Code: CodeUnreachable, cause: ended}
		case ClassRefuse: // stays what it is
		}
	}
	c.log.WarnContext(ctx, "no answer from KMS", slog.String("operation", op), slog.String("code", string(err.Code)))
	return err
}
