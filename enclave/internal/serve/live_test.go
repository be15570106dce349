package serve_test

import (
	"testing"
	"time"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/config"
)

// live verifies a challenge's document up to the root of the test CA.
func live(t *testing.T, s *enclavetest.Server, raw, nonce []byte) attestation.Document {
	t.Helper()
	pcr16 := config.PCR16(s.Config())
	verified, err := attestation.VerifyLive(raw, attestation.LivePolicy{
		Root:   attestation.TestRoot(s.CA().Root()),
		Images: []attestation.Image{{PCRs: map[int][]byte{0: s.PCR0(), 16: pcr16[:]}}},
		Nonce:  nonce, Now: time.Now(),
	})
	if err != nil {
		t.Fatal(err)
	}
	doc, err := verified.Document()
	if err != nil {
		t.Fatal(err)
	}
	return doc
}
