package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/image/imagetest"
)

// TestImage builds images of parts that no machine can run; internal/image/golden
// does it with real ones.
func TestImage(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/image", RequireExplicitExec: true, RequireUniqueNames: true,
		Setup: func(e *testscript.Env) error { return writeParts(e.WorkDir) },
		Cmds:  map[string]func(*testscript.TestScript, bool, []string){"exits": exits, "flip": flipBit, "cut": cutFile},
	})
}

const testRelease = "6.12.0-test"

// writeParts lays out what keyhold image build reads by default, AWS's blobs, and
// keys with certificates.
func writeParts(folder string) error {
	const arch = eif.AMD64
	kernel := imagetest.Kernel(arch, testRelease)
	nsm := imagetest.Module(arch, "nsm", testRelease)
	files := map[string][]byte{
		"dist/kernel/amd64/bzImage":             kernel,
		"dist/kernel/amd64/version":             []byte(testRelease + "\nlinux-image-test\n6.12.0-1\nabcd\n"),
		"dist/kernel/amd64/modules/01-vsock.ko": imagetest.Module(arch, "vsock", testRelease),
		"dist/kernel/amd64/modules/02-nsm.ko":   nsm,
		"dist/kernel/arm64/Image":               imagetest.Kernel(eif.ARM64, testRelease),
		"dist/kernel/arm64/modules/01-nsm.ko":   imagetest.Module(eif.ARM64, "nsm", testRelease),
		"built-in/bzImage":                      kernel,
		"another/bzImage":                       kernel,
		"another/modules/01-vsock.ko":           imagetest.Module(arch, "vsock", testRelease, "missing_one"),
		"another/modules/02-nsm.ko":             nsm,
		"aws/bzImage":                           imagetest.Kernel(arch, "4.14.256"),
		"aws/nsm.ko":                            imagetest.Module(arch, "nsm", "4.14.256"),
		"aws/cmdline":                           []byte("reboot=k panic=30 pci=off nomodules console=ttyS0 random.trust_cpu=on\n"),
		"bin/keyhold-enclave":                   imagetest.Program(arch),
		"arm64-enclave":                         imagetest.Program(eif.ARM64),
		"dynamic-enclave":                       imagetest.Dynamic(arch),
	}
	now := time.Now()
	for name, s := range map[string]struct {
		curve elliptic.Curve
		until time.Time
	}{
		"good": {elliptic.P384(), now.Add(time.Hour)}, "other": {elliptic.P384(), now.Add(time.Hour)},
		"old": {elliptic.P384(), now.Add(-time.Hour)}, "p256": {elliptic.P256(), now.Add(time.Hour)},
	} {
		key, cert, err := makeSigner(s.curve, s.until)
		if err != nil {
			return err
		}
		files["signer/"+name+"-key.pem"], files["signer/"+name+"-cert.pem"] = key, cert
	}
	for name, data := range files {
		path := filepath.Join(folder, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o600)); err != nil {
			return err
		}
	}
	return nil
}

func makeSigner(curve elliptic.Curve, until time.Time) (key, cert []byte, err error) {
	k, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "image signer"},
		NotBefore: until.Add(-24 * time.Hour), NotAfter: until,
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, &k.PublicKey, k)
	if err != nil {
		return nil, nil, err
	}
	raw, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

// flipBit is flip FILE OFFSET COPY: it copies a file with one bit changed.
func flipBit(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: flip FILE OFFSET COPY")
	}
	at, err := strconv.Atoi(args[1])
	ts.Check(err)
	b := []byte(ts.ReadFile(args[0]))
	b[at] ^= 1
	ts.Check(os.WriteFile(ts.MkAbs(args[2]), b, 0o600))
}

// cutFile is cut FILE LENGTH COPY: it copies the beginning of a file.
func cutFile(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: cut FILE LENGTH COPY")
	}
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[2]), []byte(ts.ReadFile(args[0]))[:n], 0o600))
}
