package attestation

import (
	"crypto/ecdsa"
	"crypto/sha512"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/hf/nitrite"
)

// VerifyLive accepts a document that an enclave of a wanted image made for
// p.Nonce, about p.Now.
func VerifyLive(raw []byte, p LivePolicy) (Live, error) {
	doc, err := verifyLive(raw, p)
	if err != nil {
		return Live{}, fmt.Errorf("verify live attestation document: %w", err)
	}
	return Live{doc}, nil
}

func verifyLive(raw []byte, p LivePolicy) (*Document, error) {
	if err := p.check(); err != nil {
		return nil, err
	}
	parsed, err := parse(raw)
	if err != nil {
		return nil, err
	}
	if err := parsed.verify(p.Root, p.Now, p.Revoked); err != nil {
		return nil, err
	}
	if err := wanted(parsed.doc, p.Images); err != nil {
		return nil, err
	}
	if err := p.fresh(parsed.doc); err != nil {
		return nil, err
	}
	return parsed.doc, nil
}

// VerifyRecorded accepts a document that an enclave of a wanted image made at
// some time, which the document names itself. It says nothing about liveness:
// whoever has the document can show it again.
func VerifyRecorded(raw []byte, p RecordedPolicy) (Recorded, error) {
	doc, err := verifyRecorded(raw, p)
	if err != nil {
		return Recorded{}, fmt.Errorf("verify recorded attestation document: %w", err)
	}
	return Recorded{doc}, nil
}

func verifyRecorded(raw []byte, p RecordedPolicy) (*Document, error) {
	if err := p.check(); err != nil {
		return nil, err
	}
	parsed, err := parse(raw)
	if err != nil {
		return nil, err
	}
	if err := parsed.verify(p.Root, parsed.doc.Timestamp, p.Revoked); err != nil {
		return nil, err
	}
	if err := wanted(parsed.doc, p.Images); err != nil {
		return nil, err
	}
	return parsed.doc, nil
}

// verify shows that the holder of the root's key let the document be signed.
func (p *parsed) verify(root Root, t time.Time, revoked func(*x509.Certificate) bool) error {
	first, leaf, err := checkChain(p.doc, root, t, revoked)
	if err != nil {
		return err
	}
	if !p.signedBy(leaf) {
		return ErrSignature
	}
	return secondOpinion(p.untagged, first, t)
}

// signedBy verifies ES384 over the Sig_structure of RFC 9052, section 4.4.
func (p *parsed) signedBy(leaf *x509.Certificate) bool {
	key, ok := leaf.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return false
	}
	signed, err := cbor.Marshal([]any{"Signature1", []byte(protectedES384), []byte{}, p.payload})
	if err != nil {
		return false
	}
	return verifyES384(key, signed, p.signature)
}

// verifyES384 verifies r || s of RFC 9053, section 2.1.
func verifyES384(key *ecdsa.PublicKey, signed, signature []byte) bool {
	if len(signature) != signatureSize {
		return false
	}
	digest := sha512.Sum384(signed)
	r := new(big.Int).SetBytes(signature[:signatureSize/2])
	s := new(big.Int).SetBytes(signature[signatureSize/2:])
	return ecdsa.Verify(key, digest[:], r, s)
}

var errPanic = errors.New("panic")

// secondOpinion asks hf/nitrite, which verifies independently but checks less.
// It panics on a leaf whose curve it does not know (P-521, commit c2d5d3c4f303)
// and returns a result together with an error on an untrusted chain.
func secondOpinion(untagged []byte, root *x509.Certificate, t time.Time) (err error) {
	defer func() {
		if recover() != nil {
			err = fmt.Errorf("%w: %w", ErrSecondOpinion, errPanic)
		}
	}()
	pool := x509.NewCertPool()
	pool.AddCert(root)
	res, refused := nitrite.Verify(untagged, nitrite.VerifyOptions{Roots: pool, CurrentTime: t})
	if refused != nil || res == nil || !res.SignatureOK {
		return ErrSecondOpinion // nitrite's text can hold bytes of the document
	}
	return nil
}
