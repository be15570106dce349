package attestation

import (
	"crypto/subtle"
	"crypto/x509"
	"time"
)

// Defaults and limits of LivePolicy.
const (
	DefaultMaxAge = 5 * time.Minute // as KMS (design)
	DefaultSkew   = time.Minute

	// minNonce keeps a verifier from asking with something that repeats.
	minNonce = 16 // bytes
)

// Image is what an enclave must have measured: register to value, 48 bytes
// each. PCR0, the image, is needed; registers that are not named may have any
// value, except that PCR0 to 2 of a document are never zero.
//
// Whoever verifies a Keyhold enclave names PCR16, its config, too.
type Image struct {
	PCRs map[int][]byte
}

// LivePolicy is what a live document must satisfy.
type LivePolicy struct {
	Root   Root
	Images []Image // any one must match, with all its registers
	Nonce  []byte  // what the enclave was asked with, 16 to 1024 bytes, never used before
	Now    time.Time

	MaxAge time.Duration // of the document; 0 is DefaultMaxAge
	Skew   time.Duration // how far its clock may be ahead; 0 is DefaultSkew

	// Revoked, when set, is asked for each certificate. AWS publishes
	// revocation lists but does not ask verifiers to use them (AWS 3.2.4).
	Revoked func(*x509.Certificate) bool
}

// RecordedPolicy is what a recorded document must satisfy.
type RecordedPolicy struct {
	Root    Root
	Images  []Image // any one must match, with all its registers
	Revoked func(*x509.Certificate) bool
}

func (p *RecordedPolicy) check() error {
	if !p.Root.set {
		return ErrPolicyRoot
	}
	return checkImages(p.Images)
}

func (p *LivePolicy) check() error {
	switch {
	case !p.Root.set:
		return ErrPolicyRoot
	case len(p.Nonce) < minNonce || len(p.Nonce) > maxField:
		return ErrPolicyNonce
	case p.Now.IsZero() || p.MaxAge < 0 || p.Skew < 0:
		return ErrPolicyTime
	}
	return checkImages(p.Images)
}

func checkImages(images []Image) error {
	for _, img := range images {
		if _, ok := img.PCRs[0]; !ok {
			return ErrPolicyImage
		}
		for i, v := range img.PCRs {
			if i < 0 || i >= maxPCRs || len(v) != pcrSize || (i <= 2 && isZero(v)) {
				return ErrPolicyImage
			}
		}
	}
	if len(images) == 0 {
		return ErrPolicyImage
	}
	return nil
}

// wanted refuses debug enclaves, whose PCR0 to 2 are zero, and every image but
// those of the policy.
func wanted(doc *Document, images []Image) error {
	for i := range 3 {
		if isZero(doc.PCRs[i]) {
			return ErrDebug
		}
	}
	found := 0
	for _, img := range images {
		same := 1
		for i, want := range img.PCRs {
			// A register that the document does not show has length 0 here.
			same &= subtle.ConstantTimeCompare(want, doc.PCRs[i])
		}
		found |= same
	}
	if found != 1 {
		return ErrPCRMismatch
	}
	return nil
}

// fresh compares the nonce, then the document's clock with ours.
func (p *LivePolicy) fresh(doc *Document) error {
	maxAge, skew := p.MaxAge, p.Skew
	if maxAge == 0 {
		maxAge = DefaultMaxAge
	}
	if skew == 0 {
		skew = DefaultSkew
	}
	switch {
	case subtle.ConstantTimeCompare(p.Nonce, doc.Nonce) != 1:
		return ErrNonce
	case doc.Timestamp.After(p.Now.Add(skew)):
		return ErrFuture
	case doc.Timestamp.Before(p.Now.Add(-maxAge)):
		return ErrStale
	}
	return nil
}

func isZero(b []byte) bool {
	var zero [pcrSize]byte
	return subtle.ConstantTimeCompare(b, zero[:]) == 1
}
