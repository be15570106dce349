// Package attest builds the user_data of the attestation documents that the
// enclave asks the NSM for. A document of one kind cannot pass for another.
package attest

import "crypto/sha512"

// Domain starts the user_data of every document of ours.
const Domain = "keyhold-attestation-v1"

// Kind says what a document is for. Kinds hold no NUL byte.
type Kind string

const (
	KindKMS       Kind = "kms"       // public_key is a fresh RSA key, used for one KMS request
	KindBoot      Kind = "boot"      // public_key is the receipt key
	KindChallenge Kind = "challenge" // public_key is the receipt key, nonce the caller's
)

// UserData is Domain || 0x00 || kind || 0x00 || SHA-384(statement), less than
// 100 bytes of the 1024 that the NSM admits. A kind without a statement hashes
// the empty string.
func UserData(kind Kind, statement []byte) []byte {
	digest := sha512.Sum384(statement)
	out := make([]byte, 0, len(Domain)+len(kind)+2+len(digest))
	out = append(out, Domain...)
	out = append(out, 0)
	out = append(out, kind...)
	out = append(out, 0)
	return append(out, digest[:]...)
}
