// Package wire frames and encodes the messages between parent and enclave. It
// refuses whatever is not the one canonical encoding of a known message.
package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/fxamacker/cbor/v2"

	"github.com/keyhold/keyhold/internal/canonical"
	"github.com/keyhold/keyhold/internal/refusal"
)

// Limits and constants of the protocol.
const (
	Version     = 1
	MaxFrame    = 1 << 20 // bytes after the length prefix
	MaxInFlight = 2       // requests on one connection that are not answered yet
	MaxUnacked  = 2       // receipts of one lane that are not acknowledged yet
	MaxNonce    = 64      // bytes of a challenge's nonce
	MaxAddKeys  = 500     // keys made by one add_keys
	MaxLoadKeys = 500     // sealed keys in one load; RSA entries of 2 KB fit the frame
	MaxLogLines = 256     // in one status; 4 KiB each at most
	EnclavePort = 5000    // vsock port the enclave listens on
	KMSPort     = 8443    // vsock port of the parent that forwards to KMS
	CredsPort   = 8444    // vsock port of the parent that serves credentials
	ParentCID   = 3       // context id of the parent instance
	headerLen   = 4
)

// Type names a message.
type Type string

// The messages. An answer carries the type of its request, or TypeError.
const (
	TypeHello         Type = "hello"
	TypeConfigure     Type = "configure"
	TypeCreateKeyring Type = "create_keyring"
	TypeLoad          Type = "load"
	TypeAddKeys       Type = "add_keys"
	TypeTicket        Type = "ticket"
	TypeSign          Type = "sign"
	TypeCancel        Type = "cancel"
	TypeFence         Type = "fence"
	TypeReceipts      Type = "receipts"
	TypeAttest        Type = "attest"
	TypeStatus        Type = "status"
	TypeError         Type = "error"
)

// Message is one frame's content. An answer repeats the id of its request.
type Message struct {
	V    uint8           `cbor:"v"`
	ID   uint64          `cbor:"id"`
	Type Type            `cbor:"type"`
	Body cbor.RawMessage `cbor:"body"`
}

// Encode returns the payload of a frame: the canonical CBOR of a message with
// that body. It fails with refusal.TooLarge where the frame would pass MaxFrame.
func Encode(id uint64, t Type, body any) ([]byte, error) {
	b := canonical.Encode(&Message{V: Version, ID: id, Type: t, Body: canonical.Encode(body)})
	if len(b) > MaxFrame {
		return nil, fmt.Errorf("encode %s: %w", t, refusal.TooLarge)
	}
	return b, nil
}

// Decode reads the payload of a frame. The body stays encoded until DecodeBody.
func Decode(b []byte) (*Message, error) {
	var m Message
	if err := strict(b, &m); err != nil {
		return nil, err
	}
	if m.V != Version {
		return nil, refusal.BadVersion
	}
	return &m, nil
}

// DecodeBody reads the body of a message into v, a pointer to the struct of its
// type.
func DecodeBody(m *Message, v any) error { return strict(m.Body, v) }

func strict(b []byte, v any) error {
	if canonical.Decode(b, v) != nil {
		return refusal.BadMessage
	}
	return nil
}

// WriteFrame writes one frame in a single Write.
func WriteFrame(w io.Writer, payload []byte) error {
	if len(payload) == 0 || len(payload) > MaxFrame {
		return refusal.BadFrame
	}
	b := make([]byte, headerLen, headerLen+len(payload))
	binary.BigEndian.PutUint32(b, uint32(len(payload))) //nolint:gosec // at most MaxFrame
	if _, err := w.Write(append(b, payload...)); err != nil {
		return fmt.Errorf("write frame: %w", err)
	}
	return nil
}

// ReadFrame reads one frame. The length is checked before anything is
// allocated. io.EOF means the peer closed between frames; a frame that is cut
// off is refusal.BadFrame.
func ReadFrame(r io.Reader) ([]byte, error) {
	var h [headerLen]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, io.EOF
		}
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, refusal.BadFrame
		}
		return nil, fmt.Errorf("read frame: %w", err)
	}
	n := binary.BigEndian.Uint32(h[:])
	if n == 0 || n > MaxFrame {
		return nil, refusal.BadFrame
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, refusal.BadFrame
		}
		return nil, fmt.Errorf("read frame: %w", err)
	}
	return b, nil
}
