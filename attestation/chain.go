package attestation

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"strings"
	"time"
)

// awsRootSHA256 is the SHA-256 of the DER of "AWS Nitro Enclaves Root G1"
// (design). The certificate itself comes with every document.
const awsRootSHA256 = "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"

// Root is the one root certificate that a policy trusts. The zero value trusts
// none.
type Root struct {
	sum [sha256.Size]byte
	set bool
}

// AWSRoot is the root of the commercial AWS regions, valid until 2049.
func AWSRoot() Root {
	sum, err := hex.DecodeString(awsRootSHA256)
	if err != nil {
		panic("attestation: fixed root hash: " + err.Error())
	}
	return Root{sum: [sha256.Size]byte(sum), set: true}
}

// TestRoot trusts another root than Amazon's, and with it whoever holds its
// key. It is for tests and local mode. A nil certificate gives the zero Root.
func TestRoot(cert *x509.Certificate) Root {
	if cert == nil || len(cert.Raw) == 0 {
		return Root{}
	}
	return Root{sum: sha256.Sum256(cert.Raw), set: true}
}

func (r Root) matches(der []byte) bool {
	sum := sha256.Sum256(der)
	return r.set && subtle.ConstantTimeCompare(r.sum[:], sum[:]) == 1
}

// checkChain verifies the certificates of a document at time t, from the root
// to the leaf, each issued by the one before it: no path is searched. It
// returns root and leaf. Source: AWS 3.2.3.
func checkChain(doc *Document, root Root, t time.Time, revoked func(*x509.Certificate) bool) (first, leaf *x509.Certificate, err error) {
	if !root.matches(doc.CABundle[0]) {
		return nil, nil, ErrRoot
	}
	var parent *x509.Certificate
	for i, der := range append(append([][]byte{}, doc.CABundle...), doc.Certificate) {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, nil, fmt.Errorf("certificate %d: %w", i, ErrCertificate)
		}
		if i == 0 {
			first, parent = cert, cert // the root issued itself
		}
		below := len(doc.CABundle) - i // certificates that follow; 0 for the leaf
		if err := checkCertificate(cert, parent, below, t); err != nil {
			return nil, nil, fmt.Errorf("certificate %d: %w", i, err)
		}
		if revoked != nil && revoked(cert) {
			return nil, nil, fmt.Errorf("certificate %d: %w", i, ErrRevoked)
		}
		parent = cert
	}
	if !strings.HasPrefix(parent.Subject.CommonName, doc.ModuleID+".") { // as AWS names its leaves
		return nil, nil, ErrLeafName
	}
	return first, parent, nil
}

func checkCertificate(cert, parent *x509.Certificate, below int, t time.Time) error {
	key, ok := cert.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P384() || cert.SignatureAlgorithm != x509.ECDSAWithSHA384 {
		return ErrCertificateKey
	}
	if len(cert.UnhandledCriticalExtensions) > 0 {
		return ErrCriticalExtension
	}
	if err := checkPlace(cert, below); err != nil {
		return err
	}
	if !issuedBy(cert, parent) {
		return ErrChain
	}
	if t.Before(cert.NotBefore) || t.After(cert.NotAfter) {
		return ErrCertificateTime
	}
	return nil
}

// checkPlace compares basic constraints and key usage with the place in the
// chain: below certificates follow, the last of them the leaf. Source: AWS
// 3.2.3.2 and 3.2.3.3; RFC 5280, sections 4.2.1.3 and 4.2.1.9.
func checkPlace(cert *x509.Certificate, below int) error {
	if below == 0 {
		switch {
		case cert.IsCA:
			return ErrLeaf
		case cert.KeyUsage&x509.KeyUsageDigitalSignature == 0 || cert.KeyUsage&x509.KeyUsageCertSign != 0:
			return ErrKeyUsage
		case cert.BasicConstraintsValid && cert.MaxPathLen != -1:
			return ErrPathLen
		}
		return nil
	}
	intermediates := below - 1 // self-issued ones count too, stricter than RFC 5280
	switch {
	case !cert.BasicConstraintsValid || !cert.IsCA:
		return ErrNotCA
	case cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return ErrKeyUsage
	case cert.MaxPathLen >= 0 && intermediates > cert.MaxPathLen: // -1 is absent
		return ErrPathLen
	}
	return nil
}

// issuedBy compares names and key identifiers, then verifies the signature.
func issuedBy(cert, parent *x509.Certificate) bool {
	if string(cert.RawIssuer) != string(parent.RawSubject) {
		return false
	}
	if len(cert.AuthorityKeyId) > 0 && len(parent.SubjectKeyId) > 0 &&
		string(cert.AuthorityKeyId) != string(parent.SubjectKeyId) {
		return false
	}
	return cert.CheckSignatureFrom(parent) == nil
}
