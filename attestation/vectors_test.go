package attestation_test

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/attestation/nsm"
)

// vectors is beside the module root and no part of the repository: real
// documents that others published.
var vectors = filepath.Join("..", "..", "shared", "vectors", "attestation")

type vector struct {
	File      string `json:"file"`
	Bytes     int    `json:"bytes"`
	ModuleID  string `json:"module_id"`
	Timestamp int64  `json:"timestamp_ms"`
	PCR0      string `json:"pcr0"`
	PCR1      string `json:"pcr1"`
	PCR2      string `json:"pcr2"`
	Nonce     string `json:"nonce"`
	raw       []byte
}

func needVectors(t *testing.T) []vector {
	t.Helper()
	out := readVectors(t)
	if out == nil {
		t.Skip("no real documents: put the folder shared/vectors beside the module root")
	}
	return out
}

// readVectors returns none where the folder is missing.
func readVectors(t testing.TB) []vector {
	t.Helper()
	file, err := os.Open(filepath.Join(vectors, "manifest.jsonl"))
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var out []vector
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		var v vector
		if err := json.Unmarshal(lines.Bytes(), &v); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(filepath.Join(vectors, v.File))
		if err != nil {
			t.Fatal(err)
		}
		v.raw, err = base64.StdEncoding.DecodeString(string(bytes.TrimSpace(text)))
		if err != nil || len(v.raw) != v.Bytes {
			t.Fatalf("%s: %d bytes, want %d: %v", v.File, len(v.raw), v.Bytes, err)
		}
		out = append(out, v)
	}
	if err := lines.Err(); err != nil || len(out) == 0 {
		t.Fatalf("%d documents in the manifest: %v", len(out), err)
	}
	return out
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (v vector) debug() bool { return strings.HasPrefix(v.File, "debug") }

// image is the vector's own, or any for a debug document, whose registers no
// policy can name.
func (v vector) image(t testing.TB) attestation.Image {
	t.Helper()
	if v.debug() {
		return attestation.Image{PCRs: map[int][]byte{0: value(7)}}
	}
	return attestation.Image{PCRs: map[int][]byte{0: unhex(t, v.PCR0), 1: unhex(t, v.PCR1), 2: unhex(t, v.PCR2)}}
}

func TestRealDocumentsVerifyAtTheirOwnTimeAndDebugOnesAreRefused(t *testing.T) {
	for _, v := range needVectors(t) {
		t.Run(v.File, func(t *testing.T) {
			images := []attestation.Image{v.image(t)}
			recorded, err := attestation.VerifyRecorded(v.raw, attestation.RecordedPolicy{Root: attestation.AWSRoot(), Images: images})
			if v.debug() {
				check(t, "VerifyRecorded", err, attestation.ErrDebug)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			doc, err := recorded.Document()
			if err != nil {
				t.Fatal(err)
			}
			if doc.ModuleID != v.ModuleID || doc.Timestamp.UnixMilli() != v.Timestamp || hex.EncodeToString(doc.Nonce) != v.Nonce {
				t.Errorf("module %q at %d, nonce of %d bytes", doc.ModuleID, doc.Timestamp.UnixMilli(), len(doc.Nonce))
			}
		})
	}
}

func TestRealDocumentsWithNonceAreLiveAtTheirOwnTimeOnly(t *testing.T) {
	seen := 0
	for _, v := range needVectors(t) {
		if v.Nonce == "" {
			continue
		}
		seen++
		p := attestation.LivePolicy{
			Root: attestation.AWSRoot(), Images: []attestation.Image{v.image(t)},
			Nonce: unhex(t, v.Nonce), Now: time.UnixMilli(v.Timestamp).Add(2 * time.Second),
		}
		_, err := attestation.VerifyLive(v.raw, p)
		if v.debug() {
			check(t, v.File, err, attestation.ErrDebug)
		} else if err != nil {
			t.Errorf("%s: %v", v.File, err)
		}
		p.Now = p.Now.AddDate(1, 0, 0)
		_, err = attestation.VerifyLive(v.raw, p)
		check(t, v.File+", a year later", err, attestation.ErrCertificateTime)
	}
	if seen == 0 {
		t.Error("no document with a nonce")
	}
}

func TestRealDocumentsAreRefusedUnderAnotherRootAndImage(t *testing.T) {
	f := newForger(t)
	for _, v := range needVectors(t) {
		_, err := attestation.VerifyRecorded(v.raw, attestation.RecordedPolicy{Root: f.trusted(), Images: []attestation.Image{v.image(t)}})
		check(t, v.File+", test root", err, attestation.ErrRoot)
		if v.debug() {
			continue
		}
		_, err = attestation.VerifyRecorded(v.raw, attestation.RecordedPolicy{Root: attestation.AWSRoot(), Images: f.images()})
		check(t, v.File+", another image", err, attestation.ErrPCRMismatch)
	}
}

func TestEveryChangedByteOfARealDocumentIsRefused(t *testing.T) {
	for _, v := range needVectors(t) {
		if v.debug() {
			continue
		}
		p := attestation.RecordedPolicy{Root: attestation.AWSRoot(), Images: []attestation.Image{v.image(t)}}
		for i := 0; i < len(v.raw); i += 31 { // a prime step reaches every field
			raw := bytes.Clone(v.raw)
			raw[i] ^= 0x01
			if _, err := attestation.VerifyRecorded(raw, p); err == nil {
				t.Errorf("%s: byte %d changed, and accepted", v.File, i)
			}
		}
		return
	}
}

func TestDeviceClockIsReadFromRealDocuments(t *testing.T) {
	for _, v := range needVectors(t) {
		at, err := nsm.Timestamp(v.raw)
		if err != nil || at.UnixMilli() != v.Timestamp {
			t.Errorf("%s: %v, %v", v.File, at, err)
		}
	}
}
