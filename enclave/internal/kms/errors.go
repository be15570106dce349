package kms

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net/http"

	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"
)

// Class says what a caller can do about an error.
type Class uint8

// The classes.
const (
	ClassUnknown Class = iota // neither is known; nothing was changed, since a data key nobody got is no state
	ClassRetry                // the same call may succeed later
	ClassRefuse               // the same call will be refused again
)

// Code is stable: operators and other programs match on it.
type Code string

// The codes.
const (
	CodeDebugEnclave Code = "debug_enclave"    // PCR0 is zero: this enclave can be read from outside
	CodeNSM          Code = "nsm_failed"       // the NSM gave no document
	CodeCredentials  Code = "kms_credentials"  // none to be had, expired, or refused by AWS
	CodeDenied       Code = "kms_denied"       // key policy, attestation or request refused
	CodeKey          Code = "kms_key_unusable" // the key is disabled, pending deletion or gone
	CodeWrappedKey   Code = "kms_wrapped_key"  // wrapped under another key or encryption context, or damaged
	CodeThrottled    Code = "kms_throttled"
	CodeUnreachable  Code = "kms_unreachable" // no connection, no answer, or an internal error of KMS
	CodeTLS          Code = "kms_tls"         // whoever answered has no certificate for the host of KMS
	CodeReply        Code = "kms_reply"       // an authentic answer that breaks a promise of KMS
	CodeUnknown      Code = "kms_unknown"     // an error this version does not know
)

// table gives each code its class and its fixed text: no byte of a reply, of a
// credential or of a certificate gets into an error.
var table = map[Code]struct {
	class Class
	text  string
}{
	CodeDebugEnclave: {ClassRefuse, "this is a debug enclave (PCR0 is zero), it must not call KMS"},
	CodeNSM:          {ClassRetry, "the NSM gave no attestation document"},
	CodeCredentials:  {ClassRetry, "the AWS credentials are missing, expired or not accepted"},
	CodeDenied:       {ClassRefuse, "KMS denied the request"},
	CodeKey:          {ClassRefuse, "the KMS key is disabled, pending deletion or does not exist"},
	CodeWrappedKey:   {ClassRefuse, "the wrapped data key belongs to another KMS key or encryption context, or is damaged"},
	CodeThrottled:    {ClassRetry, "KMS throttles requests"},
	CodeUnreachable:  {ClassRetry, "KMS cannot be reached or failed to answer"},
	CodeTLS:          {ClassRetry, "the other end of the connection is not KMS: its certificate was refused"},
	CodeReply:        {ClassRefuse, "the reply of KMS was refused"},
	CodeUnknown:      {ClassUnknown, "KMS answered an error that is not known here"},
}

// Error is every error of a Client. errors.Is compares the code.
type Error struct {
	Op    string // operation of the KMS API
	Code  Code
	cause error // a context's error or nil: the only text that is not ours and yet safe
}

// Sentinels for errors.Is.
var (
	ErrDebugEnclave = &Error{Code: CodeDebugEnclave}
	ErrNSM          = &Error{Code: CodeNSM}
	ErrCredentials  = &Error{Code: CodeCredentials}
	ErrDenied       = &Error{Code: CodeDenied}
	ErrKey          = &Error{Code: CodeKey}
	ErrWrappedKey   = &Error{Code: CodeWrappedKey}
	ErrThrottled    = &Error{Code: CodeThrottled}
	ErrUnreachable  = &Error{Code: CodeUnreachable}
	ErrTLS          = &Error{Code: CodeTLS}
	ErrReply        = &Error{Code: CodeReply}
	ErrUnknown      = &Error{Code: CodeUnknown}
)

func (e *Error) Error() string {
	text := string(e.Code) + ": " + table[e.Code].text
	if e.Op != "" {
		text = e.Op + ": " + text
	}
	if e.cause != nil {
		text += ": " + e.cause.Error()
	}
	return text
}

// Class says what can be done about the error.
func (e *Error) Class() Class { return table[e.Code].class }

// Unwrap gives context.Canceled or context.DeadlineExceeded where the caller's
// context ended the call.
func (e *Error) Unwrap() error { return e.cause }

// Is compares codes, so that the sentinels match whatever the operation.
func (e *Error) Is(target error) bool {
	other, ok := target.(*Error)
	return ok && other.Code == e.Code
}

// classify maps an error of the SDK to a code.
func classify(err error) Code {
	var api smithy.APIError
	if errors.As(err, &api) {
		return classifyAPI(api.ErrorCode(), status(err))
	}
	var (
		certificate *tls.CertificateVerificationError
		alert       tls.AlertError
		notTLS      tls.RecordHeaderError
		sent        *smithyhttp.RequestSendError
		decode      *smithy.DeserializationError
	)
	switch {
	case errors.As(err, &certificate), errors.As(err, &alert), errors.As(err, &notTLS):
		return CodeTLS
	case errors.Is(err, errTooLong):
		return CodeReply
	case errors.As(err, &sent), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return CodeUnreachable
	case status(err) >= http.StatusInternalServerError:
		return CodeUnreachable
	case errors.As(err, &decode):
		return CodeReply
	default:
		return CodeUnknown
	}
}

func status(err error) int {
	var response *smithyhttp.ResponseError
	if !errors.As(err, &response) {
		return 0
	}
	return response.HTTPStatusCode()
}

// classifyAPI knows the errors of Decrypt and GenerateDataKey in the KMS API
// reference and those that all services of AWS share.
func classifyAPI(name string, status int) Code {
	switch name {
	case "AccessDeniedException", "ValidationException", "OptInRequired", "NotAuthorized":
		return CodeDenied
	case "NotFoundException", "DisabledException", "KMSInvalidStateException", "InvalidKeyUsageException":
		return CodeKey
	case "InvalidCiphertextException", "IncorrectKeyException":
		return CodeWrappedKey
	case "ThrottlingException", "Throttling", "LimitExceededException", "RequestLimitExceeded", "TooManyRequestsException":
		return CodeThrottled
	case "ExpiredTokenException", "ExpiredToken", "RequestExpired", "UnrecognizedClientException", "InvalidClientTokenId",
		"InvalidSignatureException", "SignatureDoesNotMatch", "IncompleteSignature", "IncompleteSignatureException",
		"MissingAuthenticationToken", "MissingAuthenticationTokenException":
		return CodeCredentials
	case "KMSInternalException", "DependencyTimeoutException", "KeyUnavailableException", "InternalFailure", "ServiceUnavailable",
		"ServiceUnavailableException":
		return CodeUnreachable
	}
	if status >= http.StatusInternalServerError {
		return CodeUnreachable
	}
	return CodeUnknown
}

// contextError keeps the two errors a context can have and nothing that was
// attached to it as a cause.
func contextError(ctx context.Context) error {
	switch err := ctx.Err(); {
	case err == nil:
		return nil
	case errors.Is(err, context.DeadlineExceeded):
		return context.DeadlineExceeded
	default:
		return context.Canceled
	}
}
