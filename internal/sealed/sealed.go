// Package sealed reads and writes sealed keyrings: the public header, the
// wrapped data key and one ciphertext per key. It cannot open them.
package sealed

import (
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/keyhold/keyhold/internal/canonical"
	"github.com/keyhold/keyhold/internal/record"
)

// Limits of the parts, in bytes.
const (
	MaxWrappedLen = 6144 // KMS: a CiphertextBlob has 1 to 6144 bytes
	MaxHeaderLen  = 8 << 10
	MaxEntryLen   = 4 << 10 // an RSA-2048 entry has about 2 KB
)

// NonceLen is the length of the AES-256-GCM nonce of an entry.
const NonceLen = 12

const keyIDDomain = "keyhold-key-id-v1\x00"

// ErrMalformed wraps every reason to refuse bytes as a header or entry.
var ErrMalformed = errors.New("sealed: malformed")

// Header is the public part of a keyring epoch.
type Header struct {
	Version    uint8  `cbor:"v"` // 1
	Keyring    string `cbor:"keyring"`
	Epoch      uint32 `cbor:"epoch"`
	KMSKeyARN  string `cbor:"kms_key_arn"`
	WrappedDEK []byte `cbor:"wrapped_dek"` // CiphertextBlob of KMS GenerateDataKey
}

// Fingerprint is the SHA-256 of the wrapped data key: a second keyring of the
// same name is another keyring.
type Fingerprint [32]byte

// Fingerprint of h.
func (h *Header) Fingerprint() Fingerprint { return sha256.Sum256(h.WrappedDEK) }

// ID names the keyring epoch in the keyrings table: "<name>#<epoch>".
func (h *Header) ID() string { return KeyringID(h.Keyring, h.Epoch) }

// KeyringID names epoch of keyring in the keyrings table.
func KeyringID(keyring string, epoch uint32) string { return fmt.Sprintf("%s#%d", keyring, epoch) }

// EncryptionContext is what KMS binds the data key to.
func EncryptionContext(keyring string, epoch uint32) map[string]string {
	return map[string]string{"keyhold:keyring": keyring, "keyhold:epoch": fmt.Sprint(epoch)}
}

// Public is everything of an entry but the ciphertext. Its canonical CBOR is the
// additional data of the seal, so no field can be edited.
type Public struct {
	Version     uint8            `cbor:"v"` // 1
	Keyring     string           `cbor:"keyring"`
	Fingerprint Fingerprint      `cbor:"fingerprint"`
	Epoch       uint32           `cbor:"epoch"`
	KeyID       record.KeyID     `cbor:"key_id"`
	Algorithm   record.Algorithm `cbor:"algorithm"`
	PublicKey   []byte           `cbor:"public_key"` // 65-byte uncompressed point, 32 bytes for Ed25519, PKIX DER for RSA
	Address     string           `cbor:"address"`    // EIP-55 for secp256k1, else empty
	Policy      string           `cbor:"policy"`
}

// Entry is one sealed key.
type Entry struct {
	Public     Public `cbor:"public"`
	Nonce      []byte `cbor:"nonce"`      // 12 random bytes
	Ciphertext []byte `cbor:"ciphertext"` // scalar, Ed25519 seed or PKCS #8, sealed with AES-256-GCM
}

// KeyID returns the id of a key: the hash of its algorithm and public key.
func KeyID(a record.Algorithm, public []byte) record.KeyID {
	b := append([]byte(keyIDDomain), a...)
	b = append(b, 0)
	return sha256.Sum256(append(b, public...))
}

// AAD returns the canonical CBOR of p.
func (p *Public) AAD() []byte { return canonical.Encode(p) }

// EncodeHeader returns the canonical CBOR of h.
func EncodeHeader(h *Header) []byte { return canonical.Encode(h) }

// EncodeEntry returns the canonical CBOR of e.
func EncodeEntry(e *Entry) []byte { return canonical.Encode(e) }

// DecodeHeader reads what EncodeHeader wrote and nothing else.
func DecodeHeader(b []byte) (*Header, error) {
	var h Header
	if err := decode(b, MaxHeaderLen, &h); err != nil {
		return nil, fmt.Errorf("keyring header: %w", err)
	}
	if h.Version != 1 || len(h.WrappedDEK) == 0 || len(h.WrappedDEK) > MaxWrappedLen || h.Epoch == 0 || h.Keyring == "" {
		return nil, fmt.Errorf("keyring header: %w", ErrMalformed)
	}
	return &h, nil
}

// DecodeEntry reads what EncodeEntry wrote and nothing else. It checks the form
// and that the key id belongs to the public key; only the enclave can tell
// whether the ciphertext does.
func DecodeEntry(b []byte) (*Entry, error) {
	var e Entry
	if err := decode(b, MaxEntryLen, &e); err != nil {
		return nil, fmt.Errorf("sealed key: %w", err)
	}
	p := &e.Public
	if p.Version != 1 || p.Algorithm.SignatureLen() == 0 || len(e.Nonce) != NonceLen || len(e.Ciphertext) < 16 ||
		p.Policy == "" || p.KeyID != KeyID(p.Algorithm, p.PublicKey) {
		return nil, fmt.Errorf("sealed key: %w", ErrMalformed)
	}
	return &e, nil
}

func decode(b []byte, limit int, v any) error {
	if len(b) > limit {
		return fmt.Errorf("%w: longer than %d bytes", ErrMalformed, limit)
	}
	if err := canonical.Decode(b, v); err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return nil
}
