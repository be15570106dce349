package attestation

import "errors"

// Error is the reason of a refusal. Code is stable: programs and operators may
// rely on it. Use errors.Is with the values below, or Code for the string.
type Error struct {
	Code string
	text string
}

// Error returns a fixed text: nothing of the document is in it.
func (e *Error) Error() string { return e.text }

// Code returns the code of the Error that err wraps, or "".
func Code(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// The policy was not usable. Nothing of the document was looked at.
var (
	ErrPolicyRoot  = &Error{"attestation_policy_root", "the policy names no root"}
	ErrPolicyImage = &Error{"attestation_policy_image", "the policy names no image, or one without PCR0, with a malformed register, or with a zero in PCR0 to 2"}
	ErrPolicyNonce = &Error{"attestation_policy_nonce", "the policy has no nonce of 16 to 1024 bytes"}
	ErrPolicyTime  = &Error{"attestation_policy_time", "the policy has no current time, or a negative duration"}
)

// The form is wrong. Parse makes these checks, in this order.
var (
	ErrSize          = &Error{"attestation_size", "the document is empty or longer than 16 KiB"}
	ErrCOSE          = &Error{"attestation_cose", "the document is not one strictly encoded COSE_Sign1"}
	ErrProtected     = &Error{"attestation_protected", "the protected header is not exactly ES384"}
	ErrUnprotected   = &Error{"attestation_unprotected", "the unprotected header is not empty"}
	ErrSignatureSize = &Error{"attestation_signature_size", "the signature has not 96 bytes"}
	ErrPayload       = &Error{"attestation_payload", "the payload is not one strictly encoded CBOR map of the known fields"}
	ErrMissing       = &Error{"attestation_field_missing", "a mandatory field is missing or null"}
	ErrModuleID      = &Error{"attestation_module_id", "module_id is not of 1 to 128 letters, digits, '-' or '_'"}
	ErrDigest        = &Error{"attestation_digest", "digest is not SHA384"}
	ErrTimestamp     = &Error{"attestation_timestamp", "timestamp is zero or after the year 9999"}
	ErrPCRs          = &Error{"attestation_pcrs", "pcrs are not registers 0 to 15 and up to 16 more, of 48 bytes each"}
	ErrFieldSize     = &Error{"attestation_field_size", "public_key, user_data or nonce is longer than 1024 bytes"}
	ErrCABundle      = &Error{"attestation_cabundle", "cabundle has not 1 to 8 certificates, or a certificate not 1 to 1024 bytes"}
)

// AWS, or the root that the policy names, did not sign it. For each certificate
// from the root to the leaf these checks run in this order.
var (
	ErrRoot              = &Error{"attestation_root", "the first certificate is not the trusted root"}
	ErrCertificate       = &Error{"attestation_certificate", "a certificate is malformed"}
	ErrCertificateKey    = &Error{"attestation_certificate_key", "a certificate is not P-384 signed with ECDSA-SHA384"}
	ErrCriticalExtension = &Error{"attestation_critical_extension", "a certificate has an unknown critical extension"}
	ErrLeaf              = &Error{"attestation_leaf", "the leaf is a CA certificate"}
	ErrNotCA             = &Error{"attestation_not_ca", "a certificate above the leaf is not a CA"}
	ErrKeyUsage          = &Error{"attestation_key_usage", "a certificate's key usage does not permit its place in the chain"}
	ErrPathLen           = &Error{"attestation_path_len", "the chain is longer than a certificate permits"}
	ErrChain             = &Error{"attestation_chain", "a certificate was not issued by the one before it"}
	ErrCertificateTime   = &Error{"attestation_certificate_time", "a certificate is not valid at the time of verification"}
	ErrRevoked           = &Error{"attestation_revoked", "a certificate is revoked"}
	ErrLeafName          = &Error{"attestation_leaf_name", "the leaf is not of the document's module"}
	ErrSignature         = &Error{"attestation_signature", "the document's signature is wrong"}
	ErrSecondOpinion     = &Error{"attestation_second_opinion", "the second verifier refused the document"}
)

// AWS signed it, but it is not what the policy wants.
var (
	ErrDebug       = &Error{"attestation_debug", "the enclave runs in debug mode: PCR0, 1 or 2 is zero"}
	ErrPCRMismatch = &Error{"attestation_pcr_mismatch", "the registers are those of no wanted image"}
	ErrNonce       = &Error{"attestation_nonce", "the nonce is not the one that was asked for"}
	ErrFuture      = &Error{"attestation_future", "the document is from the future"}
	ErrStale       = &Error{"attestation_stale", "the document is too old"}
)

// ErrUnverified is what the accessors of a zero Live or Recorded return.
var ErrUnverified = &Error{"attestation_unverified", "no verified document"}
