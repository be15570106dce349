package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/image"
)

var (
	errSigningKey  = errors.New("the signing key is not one PEM block with a P-384 key, PKCS #8 or SEC 1, without a passphrase")
	errSigningTime = errors.New("the signing certificate is not valid now, and nitro-cli run-enclave would refuse the image")
)

// sign adds the signature section, as nitro-cli build-enclave does.
func (p *imageParts) sign(m *eif.Image, now time.Time) error {
	text, err := image.ReadFile(p.cert)
	if err != nil {
		return err
	}
	cert, err := eif.ParseCertificate(text)
	if err != nil {
		return fmt.Errorf("%s: %w", p.cert, err)
	}
	if now.Before(cert.NotBefore) || now.After(cert.NotAfter) {
		return fmt.Errorf("%s: %w", p.cert, errSigningTime)
	}
	key, err := readSigningKey(p.key)
	if err != nil {
		return err
	}
	if err := m.Sign(key, text); err != nil {
		return fmt.Errorf("sign the image: %w", err)
	}
	return nil
}

func readSigningKey(name string) (*ecdsa.PrivateKey, error) {
	text, err := image.ReadFile(name)
	if err != nil {
		return nil, err
	}
	defer clear(text)
	// openssl ecparam -genkey writes a block of parameters before the key.
	block, rest := pem.Decode(text)
	if block != nil && block.Type == "EC PARAMETERS" {
		block, _ = pem.Decode(rest)
	}
	if block == nil {
		return nil, errSigningKey
	}
	defer clear(block.Bytes)
	var key any
	switch block.Type {
	case "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	default:
		return nil, errSigningKey
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if err != nil || !ok || ec.Curve != elliptic.P384() {
		return nil, errSigningKey // the cause could quote parts of the key
	}
	return ec, nil
}
