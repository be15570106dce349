// Package receipt defines what an enclave signs about its own work: boot
// statements, receipts and lane heads, and verifies them. It holds no private
// key and trusts none of what it reads until it is verified.
package receipt

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"

	"github.com/keyhold/keyhold/internal/canonical"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/keypolicy"
)

// Domain strings: the first thing that is hashed or signed of each form.
const (
	StatementDomain = "keyhold-boot-statement-v1"
	ReceiptDomain   = "keyhold-receipt-v1"
	HeadsDomain     = "keyhold-heads-v1"
	bootIDDomain    = "keyhold-boot-id-v1\x00"
	chainDomain     = "keyhold-receipt-chain-v1\x00"
)

// MaxLen bounds each of the forms in bytes.
const MaxLen = 64 << 10

const maxPairs = 2 // of images and configs that a key policy may admit

// Errors of this package.
var (
	ErrMalformed = errors.New("receipt: malformed")
	ErrSignature = errors.New("receipt: signature does not verify")
	ErrChain     = errors.New("receipt: chain is broken")
)

// Kinds of attestation documents, the first part of their user_data.
const (
	KindKMS       = "kms"
	KindBoot      = "boot"
	KindChallenge = "challenge"
)

// Pair is an image and a config that the key policy admits.
type Pair struct {
	PCR0  [48]byte `cbor:"pcr0"`
	PCR16 [48]byte `cbor:"pcr16"`
}

// Statement is what an enclave says about one boot. Its hash is in user_data of
// the boot document, whose public_key is the receipt key.
type Statement struct {
	Domain      string         `cbor:"domain"` // StatementDomain
	Version     uint8          `cbor:"v"`      // 1
	Kind        string         `cbor:"kind"`   // KindBoot
	BootID      record.BootID  `cbor:"boot_id"`
	ConfigHash  [32]byte       `cbor:"config_hash"` // SHA-256 of the measured bytes
	Keyring     string         `cbor:"keyring"`
	Fingerprint [32]byte       `cbor:"fingerprint"`
	Epoch       uint32         `cbor:"epoch"`
	KMSKeyARN   string         `cbor:"kms_key_arn"`
	PolicyHash  [32]byte       `cbor:"key_policy_hash"` // keypolicy.Policy.Hash of what KMS answered
	Pairs       []Pair         `cbor:"pairs"`           // that it admitted, one or two
	Mode        keypolicy.Mode `cbor:"mode"`            // proved of it
}

// Subject says what a receipt is about.
type Subject string

// The subjects.
const (
	SubjectBatch Subject = "batch" // a signed batch
	SubjectKeys  Subject = "keys"  // keys were created
)

// Receipt says what one enclave signed, in the order of its lane.
type Receipt struct {
	Domain      string           `cbor:"domain"` // ReceiptDomain
	Version     uint8            `cbor:"v"`      // 1
	Subject     Subject          `cbor:"subject"`
	BootID      record.BootID    `cbor:"boot_id"`
	Lane        uint32           `cbor:"lane"`
	Seq         uint64           `cbor:"seq"`  // from 1 in each lane, without gaps
	Prev        [32]byte         `cbor:"prev"` // ChainHash of the lane's receipt before, zero for the first
	BatchID     record.BatchID   `cbor:"batch_id"`
	ImportID    record.ImportID  `cbor:"import_id"`
	KeyID       record.KeyID     `cbor:"key_id"`
	Algorithm   record.Algorithm `cbor:"algorithm"`
	PublicKey   []byte           `cbor:"public_key"`
	PolicyHash  [32]byte         `cbor:"policy_hash"` // of the key's policy in the measured config
	BatchFence  record.Fence     `cbor:"batch_fence"`
	KeyFence    record.Fence     `cbor:"key_fence"`
	Count       uint32           `cbor:"count"` // records of the batch, or keys made
	PayloadRoot [32]byte         `cbor:"payload_root"`
	ResultRoot  [32]byte         `cbor:"result_root"`
	TimeMS      int64            `cbor:"time_ms"` // Unix milliseconds: the NSM's clock, carried on
}

// Head is the newest receipt of one lane.
type Head struct {
	Lane uint32   `cbor:"lane"`
	Seq  uint64   `cbor:"seq"`
	Hash [32]byte `cbor:"hash"` // ChainHash of that receipt
}

// Heads answers a challenge: what every lane has come to, for witnesses outside.
type Heads struct {
	Domain string        `cbor:"domain"` // HeadsDomain
	BootID record.BootID `cbor:"boot_id"`
	Nonce  []byte        `cbor:"nonce"`
	TimeMS int64         `cbor:"time_ms"`
	Lanes  []Head        `cbor:"lanes"` // ascending
}

// Signed is a receipt or heads with the receipt key's Ed25519 signature over
// exactly Body.
type Signed struct {
	Body      []byte `cbor:"body"`
	Signature []byte `cbor:"signature"`
}

// Encode returns the canonical CBOR of a Statement, Receipt, Heads or Signed.
func Encode[T Statement | Receipt | Heads | Signed](v *T) []byte { return canonical.Encode(v) }

// Decode reads what Encode wrote and nothing else. It verifies nothing.
func Decode[T Statement | Receipt | Heads | Signed](b []byte) (*T, error) {
	if len(b) > MaxLen {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrMalformed, MaxLen)
	}
	v := new(T)
	if err := canonical.Decode(b, v); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return v, nil
}

// BootIDOf returns the id of the boot that has this receipt key.
func BootIDOf(public ed25519.PublicKey) record.BootID {
	return sha256.Sum256(append([]byte(bootIDDomain), public...))
}

// UserData returns what a document of that kind carries in user_data: the kind,
// a zero byte and the SHA-384 of body (48 bytes; the hash of nothing for kinds
// that state nothing).
func UserData(kind string, body []byte) []byte {
	h := sha512.Sum384(body)
	return append(append([]byte("keyhold-attestation-v1:"+kind), 0), h[:]...)
}

// ChainHash of the encoded Signed receipt: the Prev of the next one in its lane.
func ChainHash(signed []byte) [32]byte {
	return sha256.Sum256(append([]byte(chainDomain), signed...))
}

// Sign returns the encoded Signed of body under key, which stays the caller's.
func Sign(key ed25519.PrivateKey, body []byte) []byte {
	return Encode(&Signed{Body: body, Signature: ed25519.Sign(key, body)})
}

// OpenReceipt verifies an encoded Signed receipt of the boot with that receipt
// key. The domain string inside the body keeps heads and receipts apart.
func OpenReceipt(public ed25519.PublicKey, signed []byte) (*Receipt, error) {
	body, err := open(public, signed)
	if err != nil {
		return nil, err
	}
	r, err := Decode[Receipt](body)
	if err != nil {
		return nil, err
	}
	if r.Domain != ReceiptDomain || r.Version != 1 || r.BootID != BootIDOf(public) || r.Seq == 0 {
		return nil, fmt.Errorf("%w: not a receipt of this boot", ErrMalformed)
	}
	return r, nil
}

// OpenHeads verifies encoded Signed heads for that nonce.
func OpenHeads(public ed25519.PublicKey, nonce, signed []byte) (*Heads, error) {
	body, err := open(public, signed)
	if err != nil {
		return nil, err
	}
	h, err := Decode[Heads](body)
	if err != nil {
		return nil, err
	}
	if h.Domain != HeadsDomain || h.BootID != BootIDOf(public) || !bytes.Equal(h.Nonce, nonce) { //nolint:forbidigo // signed and public
		return nil, fmt.Errorf("%w: not the heads of this challenge", ErrMalformed)
	}
	return h, nil
}

func open(public ed25519.PublicKey, signed []byte) ([]byte, error) {
	s, err := Decode[Signed](signed)
	if err != nil {
		return nil, err
	}
	if len(public) != ed25519.PublicKeySize || !ed25519.Verify(public, s.Body, s.Signature) {
		return nil, ErrSignature
	}
	return s.Body, nil
}

// CheckStatement decodes a boot statement and checks it against the receipt key
// and user_data of its boot document, which the caller has verified.
func CheckStatement(statement, publicKey, userData []byte) (*Statement, error) {
	s, err := Decode[Statement](statement)
	if err != nil {
		return nil, err
	}
	if s.Domain != StatementDomain || s.Version != 1 || s.Kind != KindBoot {
		return nil, fmt.Errorf("%w: not a boot statement", ErrMalformed)
	}
	if len(publicKey) != ed25519.PublicKeySize || s.BootID != BootIDOf(publicKey) ||
		!bytes.Equal(userData, UserData(KindBoot, statement)) { //nolint:forbidigo // public bytes
		return nil, fmt.Errorf("%w: the boot document does not vouch for this statement", ErrMalformed)
	}
	if len(s.Pairs) < 1 || len(s.Pairs) > maxPairs || s.PolicyHash == [32]byte{} || s.Mode != keypolicy.Managed && s.Mode != keypolicy.Sealed {
		return nil, fmt.Errorf("%w: the statement tells of no proof of the key policy", ErrMalformed)
	}
	return s, nil
}
