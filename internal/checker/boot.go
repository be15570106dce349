package checker

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"time"
)

// boot is one boot of an enclave, proven or not.
type boot struct {
	id                  string
	document, statement []byte
	key                 ed25519.PublicKey // of its receipts; nil where the proof failed
}

// wanted is what a boot document must say.
type wanted struct {
	root   *x509.Certificate
	pcr0   []byte
	config []byte
}

// prove walks statement -> document -> root and sets the receipt key.
func (b *boot) prove(w wanted) error {
	payload, err := openDocument(b.document, w.root)
	if err != nil {
		return err
	}
	pcrs, key := field[map[any]any](payload, "pcrs"), field[[]byte](payload, "public_key")
	userData := field[[]byte](payload, "user_data")
	if payload.bad || len(key) != ed25519.PublicKeySize {
		return errors.New("the document misses a field")
	}
	measured := sha512.Sum384(append([]byte("keyhold-config-v1"), w.config...))
	pcr16 := sha512.Sum384(append(make([]byte, 48), measured[:]...))
	for n, want := range map[uint64][]byte{0: w.pcr0, 16: pcr16[:]} {
		if got, ok := pcrs[n].([]byte); !ok || string(got) != string(want) {
			return fmt.Errorf("PCR%d of the document is not the wanted one", n)
		}
	}
	hash := sha512.Sum384(b.statement)
	if string(userData) != "keyhold-attestation-v1:boot\x00"+string(hash[:]) {
		return errors.New("the document does not vouch for the statement")
	}
	st, err := decodeFields(b.statement)
	if err != nil {
		return fmt.Errorf("statement: %w", err)
	}
	domain, kind := field[string](st, "domain"), field[string](st, "kind")
	id, config := field[[]byte](st, "boot_id"), field[[]byte](st, "config_hash")
	wantID := sha256.Sum256(append([]byte("keyhold-boot-id-v1\x00"), key...))
	wantConfig := sha256.Sum256(w.config)
	if st.bad || domain != "keyhold-boot-statement-v1" || kind != "boot" || string(config) != string(wantConfig[:]) ||
		string(id) != string(wantID[:]) || b.id != string(id) {
		return errors.New("the statement is of another boot or config")
	}
	b.key = key
	return nil
}

// openDocument verifies an attestation document: ES384 over its payload by a certificate that leads to root
// at the document's own time.
func openDocument(document []byte, root *x509.Certificate) (*fields, error) {
	protected, body, signature, err := splitCOSE(document)
	if err != nil {
		return nil, err
	}
	payload, err := decodeFields(body)
	if err != nil {
		return nil, fmt.Errorf("document: %w", err)
	}
	key, err := certifiedKey(payload, root)
	if err != nil {
		return nil, err
	}
	signed := append([]byte{0x84}, cborText("Signature1")...)
	for _, part := range [][]byte{protected, {}, body} {
		signed = append(signed, cborBytes(part)...)
	}
	sum := sha512.Sum384(signed)
	if !ecdsa.Verify(key, sum[:], new(big.Int).SetBytes(signature[:48]), new(big.Int).SetBytes(signature[48:])) {
		return nil, errors.New("the document's signature is not valid")
	}
	return payload, nil
}

// splitCOSE returns the parts of a COSE_Sign1 structure whose header says ES384 and nothing else.
func splitCOSE(document []byte) (protected, body, signature []byte, err error) {
	v, err := decodeCBOR(document)
	if t, is := v.(tagged); is && t.tag == 18 {
		v = t.value
	}
	parts, ok := v.([]any)
	if err != nil || !ok || len(parts) != 4 {
		return nil, nil, nil, errors.New("the document is no COSE signature")
	}
	for i, to := range map[int]*[]byte{0: &protected, 2: &body, 3: &signature} {
		*to, ok = parts[i].([]byte)
		if !ok {
			return nil, nil, nil, errors.New("the document is no COSE signature")
		}
	}
	if string(protected) != "\xa1\x01\x38\x22" || len(signature) != 96 { // {1: -35}
		return nil, nil, nil, errors.New("the document is not signed with ES384")
	}
	return protected, body, signature, nil
}

// certifiedKey is the key of the document's certificate, which must lead to root.
func certifiedKey(payload *fields, root *x509.Certificate) (*ecdsa.PublicKey, error) {
	leaf, err := x509.ParseCertificate(field[[]byte](payload, "certificate"))
	if err != nil {
		return nil, fmt.Errorf("certificate of the document: %w", err)
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(root)
	for _, raw := range field[[]any](payload, "cabundle") {
		der, _ := raw.([]byte) // nothing else parses below
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("bundle of the document: %w", err)
		}
		between.AddCert(c)
	}
	at := time.UnixMilli(int64(field[uint64](payload, "timestamp"))) //nolint:gosec // the verification below refuses an odd time
	_, err = leaf.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: between, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil || payload.bad {
		return nil, errors.Join(errors.New("the document's certificate does not lead to the root"), err)
	}
	key, ok := leaf.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P384() {
		return nil, errors.New("the document's key is not of P-384")
	}
	return key, nil
}
