package nsmtest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Lifetimes of AWS's certificates, read off real documents.
const (
	rootLife     = 30 * 365 * 24 * time.Hour
	regionalLife = 20 * 24 * time.Hour
	zonalLife    = 6 * 24 * time.Hour
	instanceLife = 24 * time.Hour
	leafLife     = 3 * time.Hour

	// backdate is how long before its making a certificate becomes valid, for
	// processes whose clocks differ.
	backdate = time.Minute

	region = "local-1"
)

// CA is the certificate authority that stands in for the AWS Nitro PKI. Its
// documents verify only where its root is given explicitly as the trusted one.
type CA struct {
	root *x509.Certificate
	key  *ecdsa.PrivateKey
	now  func() time.Time
}

// NewCA makes an authority with a fresh root. A nil now is time.Now.
func NewCA(now func() time.Time) (*CA, error) {
	if now == nil {
		now = time.Now
	}
	at := now()
	root, err := certify(&x509.Certificate{
		Subject:   subject("test.nitro-enclaves"),
		NotBefore: at.Add(-24 * time.Hour),
		NotAfter:  at.Add(rootLife),
		KeyUsage:  x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:      true, MaxPathLen: -1,
	}, nil)
	if err != nil {
		return nil, fmt.Errorf("make test root: %w", err)
	}
	return &CA{root: root.cert, key: root.key, now: now}, nil
}

// Root returns the root certificate, for attestation.TestRoot.
func (ca *CA) Root() *x509.Certificate { return ca.root }

// PEM block types of MarshalPEM, in this order.
const (
	pemCertificate = "CERTIFICATE"
	pemPrivateKey  = "PRIVATE KEY"
)

// MarshalPEM returns root and private key, so that several processes can share
// one authority.
func (ca *CA) MarshalPEM() ([]byte, error) {
	key, err := x509.MarshalPKCS8PrivateKey(ca.key)
	if err != nil {
		return nil, fmt.Errorf("encode test CA: %w", err)
	}
	out := pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: ca.root.Raw})
	return append(out, pem.EncodeToMemory(&pem.Block{Type: pemPrivateKey, Bytes: key})...), nil
}

// ParseCA reads what MarshalPEM wrote. It refuses anything else, and a key
// that does not belong to the certificate. A nil now is time.Now.
func ParseCA(data []byte, now func() time.Time) (*CA, error) {
	if now == nil {
		now = time.Now
	}
	certBlock, rest := pem.Decode(data)
	if certBlock == nil || certBlock.Type != pemCertificate {
		return nil, errors.New("parse test CA: the first PEM block is no certificate")
	}
	keyBlock, rest := pem.Decode(rest)
	if keyBlock == nil || keyBlock.Type != pemPrivateKey || len(rest) != 0 {
		return nil, errors.New("parse test CA: the second and last PEM block is no private key")
	}
	root, err := x509.ParseCertificate(certBlock.Bytes)
	if err != nil {
		return nil, errors.New("parse test CA: certificate is malformed")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(keyBlock.Bytes)
	if err != nil {
		return nil, errors.New("parse test CA: private key is malformed")
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P384() || !key.PublicKey.Equal(root.PublicKey) {
		return nil, errors.New("parse test CA: private key does not belong to the certificate")
	}
	return &CA{root: root, key: key, now: now}, nil
}

// issued is a certificate with its private key.
type issued struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// chain is what one enclave's documents carry.
type chain struct {
	bundle [][]byte // DER: root, regional, zonal, instance
	leaf   issued
}

// issue makes new intermediates and a leaf for the module, the way AWS nests
// them.
func (ca *CA) issue(moduleID string, at time.Time) (chain, error) {
	at = at.Truncate(time.Second)
	instance, _, _ := strings.Cut(moduleID, "-enc")
	const caUsage = x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	parent := issued{ca.root, ca.key}
	out := chain{bundle: [][]byte{ca.root.Raw}}
	for _, step := range []struct {
		name    string
		life    time.Duration
		usage   x509.KeyUsage
		pathLen int
	}{
		{"regional." + region + ".test.nitro-enclaves", regionalLife, caUsage, 2},
		{"zonal." + region + ".test.nitro-enclaves", zonalLife, caUsage, 1},
		{instance + "." + region + ".test.nitro-enclaves", instanceLife, x509.KeyUsageCertSign, 0},
	} {
		next, err := certify(&x509.Certificate{
			Subject:   subject(step.name),
			NotBefore: at.Add(-backdate),
			NotAfter:  at.Add(step.life),
			KeyUsage:  step.usage,
			IsCA:      true, MaxPathLen: step.pathLen, MaxPathLenZero: step.pathLen == 0,
		}, &parent)
		if err != nil {
			return chain{}, fmt.Errorf("issue intermediate: %w", err)
		}
		out.bundle = append(out.bundle, next.cert.Raw)
		parent = next
	}
	leaf, err := certify(&x509.Certificate{
		Subject:   subject(moduleID + "." + region + ".test"),
		NotBefore: at.Add(-backdate),
		NotAfter:  at.Add(leafLife),
		KeyUsage:  x509.KeyUsageDigitalSignature | x509.KeyUsageContentCommitment,
	}, &parent)
	if err != nil {
		return chain{}, fmt.Errorf("issue leaf: %w", err)
	}
	out.leaf = leaf
	return out, nil
}

// certify makes a key and has parent certify it; a nil parent makes a root.
func certify(template *x509.Certificate, parent *issued) (issued, error) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return issued{}, fmt.Errorf("generate key: %w", err)
	}
	template.BasicConstraintsValid = true
	template.SignatureAlgorithm = x509.ECDSAWithSHA384
	signer := issued{template, key}
	if parent != nil {
		signer = *parent
	}
	der, err := x509.CreateCertificate(rand.Reader, template, signer.cert, &key.PublicKey, signer.key)
	if err != nil {
		return issued{}, fmt.Errorf("certify: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return issued{}, fmt.Errorf("read own certificate: %w", err)
	}
	return issued{cert, key}, nil
}

func subject(name string) pkix.Name {
	return pkix.Name{
		Country:            []string{"US"},
		Organization:       []string{"Keyhold test, not Amazon"},
		OrganizationalUnit: []string{"Development only"},
		CommonName:         name,
	}
}
