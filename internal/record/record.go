// Package record names the things that Keyhold signs and moves: records,
// batches, keys, kinds, algorithms, states and fences. It does no I/O, hashes
// nothing and imports nothing but the standard library.
package record

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Limits of one record and one batch.
const (
	MaxIDLen      = 256       // bytes of a record id that came from outside
	MaxPayloadLen = 64 << 10  // bytes of one payload
	MaxSegmentLen = 350 << 10 // bytes of a payload or result segment; DynamoDB items end at 400 KiB
	MaxBatchSize  = 5000      // records; keeps the result segment of 65-byte signatures under MaxSegmentLen
)

// ImportID names one import. It is made of lower-case letters, digits and
// hyphens, 1 to 64 of them.
type ImportID string

// BatchID names one batch: "<import id>-b<number, 7 digits or more>".
type BatchID string

// Fence is a number that only grows. Whoever holds an older one has lost its
// claim. Zero is no fence.
type Fence uint64

// KeyID is the hash of a key's algorithm and public key, computed by the
// enclave. The zero value names no key.
type KeyID [32]byte

// BootID is the hash of the receipt key of one enclave boot. The zero value
// names no boot.
type BootID [32]byte

// Errors of this package.
var (
	ErrID      = errors.New("record: malformed id")
	ErrSegment = errors.New("record: malformed segment")
	ErrUnknown = errors.New("record: unknown name")
)

// String returns id as 64 hex digits.
func (id KeyID) String() string { return hex.EncodeToString(id[:]) }

// IsZero reports whether id names no key.
func (id KeyID) IsZero() bool { return id == KeyID{} }

// MarshalText returns id as 64 hex digits.
func (id KeyID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText reads 64 lower-case hex digits.
func (id *KeyID) UnmarshalText(b []byte) error { return unhex(id[:], b) }

// ParseKeyID reads 64 lower-case hex digits.
func ParseKeyID(s string) (id KeyID, err error) {
	err = unhex(id[:], []byte(s))
	return id, err
}

// String returns id as 64 hex digits.
func (id BootID) String() string { return hex.EncodeToString(id[:]) }

// IsZero reports whether id names no boot.
func (id BootID) IsZero() bool { return id == BootID{} }

// MarshalText returns id as 64 hex digits.
func (id BootID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText reads 64 lower-case hex digits.
func (id *BootID) UnmarshalText(b []byte) error { return unhex(id[:], b) }

// ParseBootID reads 64 lower-case hex digits.
func ParseBootID(s string) (id BootID, err error) {
	err = unhex(id[:], []byte(s))
	return id, err
}

func unhex(dst, src []byte) error {
	if len(src) != 2*len(dst) {
		return fmt.Errorf("%w: want %d hex digits, got %d characters", ErrID, 2*len(dst), len(src))
	}
	for _, c := range src {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return fmt.Errorf("%w: want lower-case hex digits", ErrID)
		}
	}
	if _, err := hex.Decode(dst, src); err != nil {
		return fmt.Errorf("%w: want lower-case hex digits", ErrID)
	}
	return nil
}

// CheckImportID refuses what is not an import id.
func CheckImportID(id ImportID) error {
	if len(id) == 0 || len(id) > 64 {
		return fmt.Errorf("%w: an import id has 1 to 64 characters, got %d", ErrID, len(id))
	}
	for _, c := range []byte(id) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return fmt.Errorf("%w: an import id holds lower-case letters, digits and hyphens only", ErrID)
		}
	}
	return nil
}

// MakeBatchID returns the id of batch n, counted from 0, of an import.
func MakeBatchID(id ImportID, n int) BatchID {
	return BatchID(fmt.Sprintf("%s-b%07d", id, n))
}

// Split returns the import and the number that id was made of.
func (id BatchID) Split() (ImportID, int, error) {
	i := strings.LastIndex(string(id), "-b")
	if i < 1 || len(id)-i-2 < 7 || len(id)-i-2 > 10 {
		return "", 0, fmt.Errorf("%w: want <import>-b<number>", ErrID)
	}
	n, err := strconv.Atoi(string(id[i+2:]))
	imp := ImportID(id[:i])
	if err != nil || n < 0 || CheckImportID(imp) != nil || MakeBatchID(imp, n) != id {
		return "", 0, fmt.Errorf("%w: want <import>-b<number>", ErrID)
	}
	return imp, n, nil
}

// DefaultID names the record at index i of batch b when it came without an id.
func DefaultID(b BatchID, i int) string { return string(b) + "." + strconv.Itoa(i) }

// CheckID refuses an id from outside that is empty, longer than MaxIDLen, holds
// anything but letters, digits and . _ : / @ + = - or has the form that
// DefaultID gives, so that no outside id can be taken for another record's.
func CheckID(id string) error {
	if id == "" || len(id) > MaxIDLen {
		return fmt.Errorf("%w: a record id has 1 to %d bytes, got %d", ErrID, MaxIDLen, len(id))
	}
	for _, c := range []byte(id) {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !letter && !strings.ContainsRune("._:/@+=-", rune(c)) {
			return fmt.Errorf("%w: a record id holds letters, digits and . _ : / @ + = - only", ErrID)
		}
	}
	if dot := strings.LastIndexByte(id, '.'); dot >= 0 {
		if _, err := strconv.Atoi(id[dot+1:]); err == nil {
			if _, _, err := BatchID(id[:dot]).Split(); err == nil {
				return fmt.Errorf("%w: the form <batch>.<number> is kept for records without an id", ErrID)
			}
		}
	}
	return nil
}
