package keypolicy

import (
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

// ErrPCR says that a text is no value of a register.
var ErrPCR = errors.New("a PCR has 96 hex digits")

// PCR is the value of a platform configuration register, a SHA-384.
type PCR [48]byte

// ParsePCR reads 96 hex digits of either case. KMS compares them without case,
// and this package writes them in lower case.
func ParsePCR(text string) (PCR, error) {
	var v PCR
	if len(text) != hex.EncodedLen(len(v)) {
		return PCR{}, ErrPCR
	}
	if _, err := hex.Decode(v[:], []byte(text)); err != nil {
		return PCR{}, ErrPCR
	}
	return v, nil
}

// String returns 96 lower-case hex digits.
func (p PCR) String() string { return hex.EncodeToString(p[:]) }

// MarshalText returns what String does.
func (p PCR) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText reads what ParsePCR does.
func (p *PCR) UnmarshalText(text []byte) (err error) {
	*p, err = ParsePCR(string(text))
	return err
}

// Zero reports whether all bits are zero: the value of a register that nothing
// was measured into, and of PCR0 in a debug enclave.
func (p PCR) Zero() bool { return p == PCR{} }

// Pair is an image and a config: what PCR0 and PCR16 must be together.
type Pair struct {
	PCR0  PCR `json:"pcr0"`
	PCR16 PCR `json:"pcr16"`
}

func (p Pair) check() error {
	if p.PCR0.Zero() {
		return errors.New("PCR0 is zero: that is every debug enclave")
	}
	if p.PCR16.Zero() {
		return errors.New("PCR16 is zero: that is an enclave without a config")
	}
	return nil
}

func (p Pair) compare(q Pair) int {
	if c := strings.Compare(string(p.PCR0[:]), string(q.PCR0[:])); c != 0 {
		return c
	}
	return strings.Compare(string(p.PCR16[:]), string(q.PCR16[:]))
}

// ParentPCR3 is PCR3 of an enclave whose parent instance has that role: SHA-384
// of 48 zero bytes and the role's ARN (Nitro Enclaves user guide, "Where to get an
// enclave's measurements").
func ParentPCR3(roleARN string) (PCR, error) {
	if !isRole(roleARN) {
		return PCR{}, fmt.Errorf("PCR3 of a role: %w", ErrPrincipal)
	}
	return sha512.Sum384(append(make([]byte, len(PCR{})), roleARN...)), nil
}
