package kms

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"strconv"
	"time"

	"github.com/keyhold/keyhold/attestation"
)

// maxDocumentAge is how long AWS takes an attestation document, and how far it
// may lie in the future.
const maxDocumentAge = 5 * time.Minute

// recipient is a verified attestation document and the key in it.
type recipient struct {
	public *rsa.PublicKey
	pcrs   map[int][]byte
}

type recipientInput struct {
	KeyEncryptionAlgorithm string
	AttestationDocument    []byte
}

// verifyRecipient checks the document as KMS does: who signed it, how old it is,
// and that it holds an RSA key. What it measured is for the key policy to judge,
// except that a debug enclave is always denied.
func (s *Server) verifyRecipient(in *recipientInput) (*recipient, *apiError) {
	if in.KeyEncryptionAlgorithm != "RSAES_OAEP_SHA_256" {
		return nil, invalid("KeyEncryptionAlgorithm must be RSAES_OAEP_SHA_256")
	}
	stated, err := attestation.Parse(in.AttestationDocument)
	if err != nil {
		return nil, invalid("the attestation document is malformed")
	}
	for i := range 3 {
		if zero(stated.PCRs[i]) {
			return nil, refuse("AccessDeniedException", "the attestation document is that of a debug enclave")
		}
	}
	recorded, err := attestation.VerifyRecorded(in.AttestationDocument, attestation.RecordedPolicy{
		Root:   attestation.TestRoot(s.opt.Root),
		Images: []attestation.Image{{PCRs: map[int][]byte{0: stated.PCRs[0]}}},
	})
	if err != nil {
		return nil, invalid("the attestation document does not verify")
	}
	doc, err := recorded.Document()
	if err != nil {
		return nil, invalid("the attestation document does not verify")
	}
	if age := s.opt.Now().Sub(doc.Timestamp); age > maxDocumentAge || age < -maxDocumentAge {
		return nil, invalid("the attestation document is too old or from the future")
	}
	parsed, err := x509.ParsePKIXPublicKey(doc.PublicKey)
	public, ok := parsed.(*rsa.PublicKey)
	if err != nil || !ok || public.N.BitLen() < 2048 {
		return nil, invalid("the attestation document holds no RSA public key of 2048 bits or more")
	}
	return &recipient{public: public, pcrs: doc.PCRs}, nil
}

func zero(b []byte) bool {
	for _, v := range b {
		if v != 0 {
			return false
		}
	}
	return true
}

// addConditions adds the condition keys that the document gives, with values as
// AWS writes them: lower-case hex.
func (r *recipient) addConditions(context map[string]string) {
	if r == nil {
		return
	}
	for i, value := range r.pcrs {
		context["kms:recipientattestation:pcr"+strconv.Itoa(i)] = hex.EncodeToString(value)
	}
	context["kms:recipientattestation:imagesha384"] = hex.EncodeToString(r.pcrs[0])
}

// Encoding is how CiphertextForRecipient writes its encrypted content. AWS has
// been seen to use both.
type Encoding uint8

// The encodings.
const (
	Alternate   Encoding = iota // one after the other
	Constructed                 // indefinite length, an octet string inside
	Primitive                   // one value of definite length
)

// seal makes the CMS EnvelopedData that KMS answers for plaintext.
func (r *recipient) seal(plaintext []byte, enc Encoding) ([]byte, error) {
	contentKey, iv := make([]byte, 32), make([]byte, aes.BlockSize)
	_, _ = rand.Read(contentKey) // never fails, crypto/rand
	_, _ = rand.Read(iv)
	wrapped, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, r.public, contentKey, nil)
	if err != nil {
		return nil, fmt.Errorf("wrap the content key: %w", err)
	}
	spki, err := x509.MarshalPKIXPublicKey(r.public)
	if err != nil {
		return nil, fmt.Errorf("encode the recipient's key: %w", err)
	}
	id := sha256.Sum256(spki)
	content, err := encryptCBC(contentKey, iv, plaintext)
	if err != nil {
		return nil, err
	}
	encoded := value(0x80, content)
	if enc == Constructed {
		encoded = indefinite(0xa0, value(0x04, content))
	}
	recipients := value(0x31, value(0x30, version2, value(0x80, id[:]), oaepSHA256, value(0x04, wrapped)))
	encrypted := indefinite(0x30, oid(1, 2, 840, 113549, 1, 7, 1),
		value(0x30, oid(2, 16, 840, 1, 101, 3, 4, 1, 42), value(0x04, iv)), encoded)
	enveloped := indefinite(0x30, version2, recipients, encrypted)
	return indefinite(0x30, oid(1, 2, 840, 113549, 1, 7, 3), indefinite(0xa0, enveloped)), nil
}

func encryptCBC(key, iv, plaintext []byte) ([]byte, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("set up AES: %w", err)
	}
	padding := aes.BlockSize - len(plaintext)%aes.BlockSize
	out := make([]byte, len(plaintext)+padding)
	copy(out, plaintext)
	for i := len(plaintext); i < len(out); i++ {
		out[i] = byte(padding)
	}
	cipher.NewCBCEncrypter(block, iv).CryptBlocks(out, out)
	return out, nil
}

var (
	version2   = []byte{0x02, 0x01, 0x02}
	sha256Alg  = value(0x30, oid(2, 16, 840, 1, 101, 3, 4, 2, 1), []byte{0x05, 0x00})
	oaepSHA256 = value(0x30, oid(1, 2, 840, 113549, 1, 1, 7), value(0x30,
		value(0xa0, sha256Alg),
		value(0xa1, value(0x30, oid(1, 2, 840, 113549, 1, 1, 8), sha256Alg))))
)

func oid(arcs ...int) []byte {
	der, err := asn1.Marshal(asn1.ObjectIdentifier(arcs))
	if err != nil {
		panic(err) // the arcs are constants of this file
	}
	return der
}

// value encodes a value of definite length, below 64 KB.
func value(tag byte, content ...[]byte) []byte {
	n := 0
	for _, c := range content {
		n += len(c)
	}
	out := []byte{tag}
	switch {
	case n < 0x80:
		out = append(out, byte(n))
	case n < 0x100:
		out = append(out, 0x81, byte(n))
	default:
		out = append(out, 0x82, byte(n>>8), byte(n))
	}
	for _, c := range content {
		out = append(out, c...)
	}
	return out
}

func indefinite(tag byte, content ...[]byte) []byte {
	out := []byte{tag, 0x80}
	for _, c := range content {
		out = append(out, c...)
	}
	return append(out, 0, 0)
}
