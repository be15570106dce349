package kms

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"errors"
)

// ErrEnvelope is the only error of OpenEnvelope: whoever feeds it envelopes
// learns that one was refused, never at which step.
var ErrEnvelope = errors.New("kms: envelope refused")

// maxEnvelope is the longest CiphertextForRecipient in the API of KMS
// (CiphertextType). For a data key of 32 bytes it has 493 bytes.
const maxEnvelope = 6144

// DER contents of the object identifiers, from RFC 5652, RFC 8017 and NIST's
// registry of algorithms.
const (
	oidEnvelopedData = "\x2a\x86\x48\x86\xf7\x0d\x01\x07\x03"
	oidData          = "\x2a\x86\x48\x86\xf7\x0d\x01\x07\x01"
	oidRSAESOAEP     = "\x2a\x86\x48\x86\xf7\x0d\x01\x01\x07"
	oidMGF1          = "\x2a\x86\x48\x86\xf7\x0d\x01\x01\x08"
	oidSHA256        = "\x60\x86\x48\x01\x65\x03\x04\x02\x01"
	oidAES256CBC     = "\x60\x86\x48\x01\x65\x03\x04\x01\x2a"
	versionTwo       = "\x02"
)

// envelope is what is left of a CMS EnvelopedData once everything that has one
// permitted value was compared with it.
type envelope struct {
	recipient    []byte // subject key identifier
	encryptedKey []byte
	iv           []byte
	ciphertext   []byte
}

// OpenEnvelope decrypts the CiphertextForRecipient that KMS made for key: CMS
// EnvelopedData version 2 in BER, one recipient named by SHA-256 of the public
// key, RSAES-OAEP with SHA-256, AES-256-CBC. It does not authenticate who made
// the envelope: the caller must have got it over its own TLS.
func OpenEnvelope(key *rsa.PrivateKey, raw []byte) ([]byte, error) {
	env, ok := parseEnvelope(raw)
	if !ok {
		return nil, ErrEnvelope
	}
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return nil, ErrEnvelope
	}
	id := sha256.Sum256(spki)
	if subtle.ConstantTimeCompare(id[:], env.recipient) != 1 {
		return nil, ErrEnvelope
	}
	contentKey, err := unwrapKey(key, env.encryptedKey)
	if err != nil {
		return nil, ErrEnvelope
	}
	defer clear(contentKey)
	if len(contentKey) != 32 {
		return nil, ErrEnvelope
	}
	return decryptCBC(contentKey, env.iv, env.ciphertext)
}

func parseEnvelope(raw []byte) (env envelope, ok bool) {
	if len(raw) > maxEnvelope {
		return envelope{}, false
	}
	r := &ber{in: raw}
	r.open(tagSequence) // ContentInfo
	r.exactly(tagOID, oidEnvelopedData)
	r.open(tagContext0 | constructed)
	r.open(tagSequence) // EnvelopedData
	r.exactly(tagInteger, versionTwo)
	r.open(tagSet)
	env.recipient, env.encryptedKey = readRecipient(r)
	r.shut() // a second recipient fails here
	r.open(tagSequence)
	r.exactly(tagOID, oidData)
	r.open(tagSequence)
	r.exactly(tagOID, oidAES256CBC)
	env.iv = r.primitive(tagOctetString)
	r.shut()
	env.ciphertext = readContent(r)
	r.shut()
	r.shut()
	r.shut()
	r.shut()
	if !r.ok() || r.pos != len(raw) || len(env.iv) != aes.BlockSize {
		return envelope{}, false
	}
	return env, true
}

// readRecipient reads a KeyTransRecipientInfo: version 2, because it names its
// recipient by a subject key identifier.
func readRecipient(r *ber) (id, encryptedKey []byte) {
	r.open(tagSequence)
	r.exactly(tagInteger, versionTwo)
	id = r.primitive(tagContext0)
	r.open(tagSequence)
	r.exactly(tagOID, oidRSAESOAEP)
	r.open(tagSequence)
	r.open(tagContext0 | constructed) // hashAlgorithm
	readSHA256(r)
	r.shut()
	r.open(tagContext0 | constructed | 1) // maskGenAlgorithm
	r.open(tagSequence)
	r.exactly(tagOID, oidMGF1)
	readSHA256(r)
	r.shut()
	r.shut()
	r.shut() // a pSourceAlgorithm, so a label, fails here
	r.shut()
	encryptedKey = r.primitive(tagOctetString)
	r.shut()
	return id, encryptedKey
}

// readSHA256 accepts parameters NULL, as AWS writes them, or none: RFC 4055
// asks readers to take both.
func readSHA256(r *ber) {
	r.open(tagSequence)
	r.exactly(tagOID, oidSHA256)
	if r.more() {
		r.exactly(tagNull, "")
	}
	r.shut()
}

// readContent reads encryptedContent: an implicitly tagged octet string, in one
// piece or in several.
func readContent(r *ber) []byte {
	if r.next(tagContext0) {
		return r.primitive(tagContext0)
	}
	var content []byte
	r.open(tagContext0 | constructed)
	for r.more() {
		content = append(content, r.primitive(tagOctetString)...)
	}
	r.shut()
	return content
}

// unwrapKey undoes RSAES-OAEP with SHA-256 in both places and no label.
func unwrapKey(key *rsa.PrivateKey, encrypted []byte) ([]byte, error) {
	contentKey, err := rsa.DecryptOAEP(sha256.New(), nil, key, encrypted, nil)
	if err != nil {
		return nil, ErrEnvelope
	}
	return contentKey, nil
}

func decryptCBC(key, iv, ciphertext []byte) ([]byte, error) {
	if len(ciphertext) == 0 || len(ciphertext)%aes.BlockSize != 0 {
		return nil, ErrEnvelope
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, ErrEnvelope
	}
	plaintext := make([]byte, len(ciphertext))
	cipher.NewCBCDecrypter(block, iv).CryptBlocks(plaintext, ciphertext)
	length, ok := unpad(plaintext)
	if ok != 1 {
		clear(plaintext)
		return nil, ErrEnvelope
	}
	return plaintext[:length], nil
}

// unpad checks all of the PKCS #7 padding in time that depends on nothing but
// the length. ok is 1 or 0; p is not empty and a multiple of the block size.
func unpad(p []byte) (length, ok int) {
	last := p[len(p)-1]
	padding := int(last)
	ok = subtle.ConstantTimeLessOrEq(1, padding) & subtle.ConstantTimeLessOrEq(padding, aes.BlockSize)
	for i := 1; i <= aes.BlockSize; i++ {
		inside := subtle.ConstantTimeLessOrEq(i, padding)
		same := subtle.ConstantTimeByteEq(p[len(p)-i], last)
		ok &= subtle.ConstantTimeSelect(inside, same, 1)
	}
	return len(p) - padding, ok
}
