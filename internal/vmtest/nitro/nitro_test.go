package nitro_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/image"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/signclient"
)

// The program is the shipped one. Command line and kernel are the machine's.
const (
	program  = "../../../bin/keyhold-enclave"
	cmdline  = "reboot=k panic=-1 oops=panic console=ttyS0 no_timer_check"
	beatPort = 9000
)

// build makes a signed image, so that PCR8 is judged as well.
func build(t *testing.T) eif.Image {
	t.Helper()
	kernel, modules, err := image.ReadKernel(filepath.Join(machineFolder(t), "kernel"), eif.AMD64)
	if err != nil {
		t.Fatal(err)
	}
	init, err := os.ReadFile(program)
	if err != nil {
		t.Fatalf("make vm-test-nitro builds it: %v", err)
	}
	m, err := image.Build(image.Parts{
		Arch: eif.AMD64, Kernel: kernel, Cmdline: cmdline, Modules: modules, NSMBuiltIn: true, Init: init, BuildTime: time.Unix(0, 0),
	})
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "image signer"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Sign(key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})); err != nil {
		t.Fatal(err)
	}
	return m
}

func enclaveConfig(t *testing.T) []byte {
	t.Helper()
	raw, err := config.Encode(&config.Config{
		Version: 1, KMSKeyARN: "arn:aws:kms:us-east-1:000000000000:key/00000000-0000-4000-8000-000000000000",
		Keyring: "nitro", Epochs: []uint32{1}, SealEpoch: 1,
		Policies:  []config.Policy{{Name: "default", Kinds: []record.Kind{record.Message}}},
		Create:    []config.Create{{Algorithm: record.Secp256k1, Policy: "default", Max: 1}},
		Lease:     config.LeaseLimit{MaxMS: config.DefaultLeaseMaxMS, MarginMS: config.DefaultLeaseMarginMS},
		KeyPolicy: config.DefaultKeyPolicy(),
	})
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// heartbeat answers the one that an enclave gives as it boots.
func (m *machine) heartbeat(t *testing.T) {
	t.Helper()
	l, err := m.vsock.Listen(beatPort)
	if err != nil {
		t.Fatal(err)
	}
	defer context.AfterFunc(t.Context(), func() { _ = l.Close() })()
	got := make(chan byte, 1)
	go func() {
		defer close(got)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		var b [1]byte
		if _, err := io.ReadFull(c, b[:]); err == nil {
			_, _ = c.Write(b[:])
			got <- b[0]
		}
	}()
	select {
	case b := <-got:
		if b != 0xb7 {
			t.Fatalf("the heartbeat is %#x", b)
		}
	case <-m.ended:
		t.Fatal("the machine ended before its heartbeat")
	case <-time.After(patience):
		t.Fatal("no heartbeat")
	}
	_ = l.Close()
}

// challenge configures the enclave and returns the registers of a fresh document,
// which nobody signed.
func (m *machine) challenge(t *testing.T, raw []byte) map[int][]byte {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, err := signclient.Connect(ctx, m.dial, signclient.Options{Logger: slog.New(slog.DiscardHandler)})
	for err != nil {
		select {
		case <-time.After(50 * time.Millisecond):
			c, err = signclient.Connect(ctx, m.dial, signclient.Options{Logger: slog.New(slog.DiscardHandler)})
		case <-ctx.Done():
			t.Fatalf("the enclave does not listen: %v", err)
		}
	}
	defer c.Close()
	if _, err := c.Configure(ctx, &wire.Configure{Config: raw}); err != nil {
		t.Fatal(err)
	}
	nonce := []byte("from the parent of a machine")
	reply, err := c.Attest(ctx, &wire.Attest{Nonce: nonce})
	if err != nil {
		t.Fatal(err)
	}
	var sign1 struct {
		_           struct{} `cbor:",toarray"`
		Protected   []byte
		Unprotected cbor.RawMessage
		Payload     []byte
		Signature   []byte
	}
	if err := cbor.Unmarshal(reply.Document, &sign1); err != nil {
		t.Fatal(err)
	}
	var document struct {
		PCRs  map[int][]byte `cbor:"pcrs"`
		Nonce []byte         `cbor:"nonce"`
	}
	if err := cbor.Unmarshal(sign1.Payload, &document); err != nil {
		t.Fatal(err)
	}
	if string(document.Nonce) != string(nonce) {
		t.Errorf("nonce %q", document.Nonce)
	}
	return document.PCRs
}

func TestQEMUMeasuresWhatKeyholdMeasures(t *testing.T) {
	img := build(t)
	want, err := img.Measure()
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	m := start(t, encode(t, img))
	m.heartbeat(t)
	t.Logf("heartbeat after %s", time.Since(began).Round(time.Millisecond))
	raw := enclaveConfig(t)
	got := m.challenge(t, raw)
	pcr16 := config.PCR16(raw)
	for register, want := range map[int]string{0: want.PCR0, 1: want.PCR1, 2: want.PCR2, 8: want.PCR8, 16: hex.EncodeToString(pcr16[:])} {
		if hex.EncodeToString(got[register]) != want {
			t.Errorf("PCR%d is %x in QEMU, %s here", register, got[register], want)
		} else {
			t.Logf("PCR%-2d %s, both", register, want)
		}
	}
}

func TestQEMURefusesADamagedImage(t *testing.T) {
	file := encode(t, build(t))
	file[len(file)/2] ^= 1
	m := start(t, file)
	select {
	case <-m.ended:
	case <-time.After(patience):
		t.Fatal("QEMU runs it")
	}
	if text := m.console.String(); !strings.Contains(text, "CRC") {
		t.Errorf("QEMU says %q", text)
	} else {
		t.Logf("QEMU says %q", strings.TrimSpace(text))
	}
	if _, err := eif.Parse(file); err == nil {
		t.Error("Keyhold takes it")
	}
}
