// Package nsm talks to the Nitro Security Module of the enclave it runs in. It
// verifies no document: what it returns comes from the local device.
package nsm

import (
	"errors"
	"fmt"
)

// Limits of the device. The register count and width are those of every Nitro
// enclave; the field limit is the attestation document's (AWS
// attestation_process.md, section 2.2).
const (
	PCRCount      = 32   // registers 0..31
	PCRSize       = 48   // bytes, SHA-384
	BootPCRs      = 16   // registers 0..15 are locked before the enclave runs
	MaxFieldSize  = 1024 // bytes of public_key, user_data and nonce, each
	MaxExtendData = 1024 // bytes, far below the driver's request limit of 4096
)

// AttestRequest holds what the caller may put into a document. An empty field
// is left out of it.
type AttestRequest struct {
	PublicKey, UserData, Nonce []byte // up to MaxFieldSize each
}

// Session is an open NSM. Its methods may be called from several goroutines.
//
// A refusal of the device is a Refusal inside the error and is final: the same
// call will be refused again. ErrClosed means the session was closed before.
// Any other error means that the device could not be asked or answered
// something malformed; ExtendPCR and LockPCRs may then have taken effect, so
// ask DescribePCR before trying again.
type Session interface {
	// Attest returns a signed attestation document (COSE_Sign1) over the
	// request, the registers that are locked now, and the device's clock.
	Attest(AttestRequest) ([]byte, error)

	// ExtendPCR replaces the register by SHA-384(old value || data) and returns
	// the new value. A locked register is refused with ErrReadOnlyIndex.
	ExtendPCR(index uint16, data []byte) (value []byte, err error)

	// LockPCRs locks registers 0 to below-1 until the enclave ends. Locking a
	// locked register again is no error.
	LockPCRs(below uint16) error

	// DescribePCR returns the value of a register and whether it is locked.
	DescribePCR(index uint16) (value []byte, locked bool, err error)

	// Random fills p from the NSM's generator. On an error p holds nothing that
	// may be used.
	Random(p []byte) error

	// Close releases the device. Closing twice is no error.
	Close() error
}

// Refusal is the NSM's own error code.
type Refusal string

// The codes of the NSM interface.
const (
	ErrInvalidArgument  Refusal = "InvalidArgument"
	ErrInvalidIndex     Refusal = "InvalidIndex"
	ErrInvalidResponse  Refusal = "InvalidResponse"
	ErrReadOnlyIndex    Refusal = "ReadOnlyIndex"
	ErrInvalidOperation Refusal = "InvalidOperation"
	ErrBufferTooSmall   Refusal = "BufferTooSmall"
	ErrInputTooLarge    Refusal = "InputTooLarge"
	ErrInternal         Refusal = "InternalError"
	ErrUnknownCode      Refusal = "UnknownCode" // a code that is not in this list
)

// Error returns the code.
func (r Refusal) Error() string { return "NSM refused: " + string(r) }

var (
	// ErrClosed is returned by every call after Close.
	ErrClosed = errors.New("NSM session is closed")

	// ErrMalformed is returned when the device's answer has not the form that
	// was asked for.
	ErrMalformed = errors.New("NSM answer is malformed")
)

// Check refuses a request that the device would refuse for its size.
func (r AttestRequest) Check() error {
	for _, f := range []struct {
		name  string
		value []byte
	}{{"public_key", r.PublicKey}, {"user_data", r.UserData}, {"nonce", r.Nonce}} {
		if len(f.value) > MaxFieldSize {
			return fmt.Errorf("%s has %d bytes, limit %d: %w", f.name, len(f.value), MaxFieldSize, ErrInputTooLarge)
		}
	}
	return nil
}
