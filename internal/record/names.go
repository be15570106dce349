package record

import "fmt"

// Algorithm is a signature algorithm. All are deterministic: signing again
// gives the same bytes.
type Algorithm string

// The algorithms.
const (
	Secp256k1 Algorithm = "secp256k1" // ECDSA, RFC 6979, low s, 65 bytes r||s||v with v 27 or 28 for messages
	Ed25519   Algorithm = "ed25519"   // RFC 8032, 64 bytes
	P256      Algorithm = "p256"      // ECDSA with SHA-256, RFC 6979, 64 bytes r||s
	RSA2048   Algorithm = "rsa2048"   // PKCS #1 v1.5 with SHA-256, 256 bytes
)

// Algorithms lists every algorithm in a fixed order.
func Algorithms() []Algorithm { return []Algorithm{Secp256k1, Ed25519, P256, RSA2048} }

// SignatureLen returns the bytes of one signature, 0 for an unknown algorithm.
func (a Algorithm) SignatureLen() int {
	switch a {
	case Secp256k1:
		return 65
	case Ed25519, P256:
		return 64
	case RSA2048:
		return 256
	}
	return 0
}

// ParseAlgorithm refuses unknown names.
func ParseAlgorithm(s string) (Algorithm, error) {
	if a := Algorithm(s); a.SignatureLen() != 0 {
		return a, nil
	}
	return "", fmt.Errorf("%w: algorithm: want one of %v", ErrUnknown, Algorithms())
}

// Kind says what is signed of a payload; package payload computes it.
type Kind string

// The kinds. Transactions and EIP-712 typed data join them later; until then
// their names are unknown and refused.
const (
	Message Kind = "message" // EIP-191 for secp256k1, the same idea with our own prefix for the others
	Raw     Kind = "raw"     // the payload as it is; only where the key's policy grants it
	Digest  Kind = "digest"  // a 32-byte digest, ECDSA and RSA; only where the key's policy grants it
)

// Kinds lists every kind in a fixed order.
func Kinds() []Kind { return []Kind{Message, Raw, Digest} }

// ParseKind refuses unknown names.
func ParseKind(s string) (Kind, error) {
	switch k := Kind(s); k {
	case Message, Raw, Digest:
		return k, nil
	}
	return "", fmt.Errorf("%w: kind: want one of %v", ErrUnknown, Kinds())
}

// State is the state of a batch, and what an export says of its records.
type State string

// The states of a batch. A record of a SIGNED batch is Signed or Refused.
const (
	Ready       State = "READY"       // may be claimed
	Claimed     State = "CLAIMED"     // some parent holds it under its fence
	Signed      State = "SIGNED"      // final: the result segment is there
	Quarantined State = "QUARANTINED" // taken out after too many attempts, until an operator retries it
	Refused     State = "REFUSED"     // of a record only: it has a reason instead of a signature
)

// CheckPool refuses what is not a pool name: 1 to 64 lower-case letters,
// digits and hyphens.
func CheckPool(s string) error {
	if CheckImportID(ImportID(s)) != nil {
		return fmt.Errorf("%w: a pool name has 1 to 64 lower-case letters, digits and hyphens", ErrID)
	}
	return nil
}
