// Package secret holds key material in memory and refuses to print, log or
// encode it.
package secret

import (
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"sync"
)

const redacted = "[secret]"

// ErrEncode is the answer to every attempt to encode a secret.
var ErrEncode = errors.New("secret: refuses to be encoded")

// ErrDestroyed means that the secret has been erased.
var ErrDestroyed = errors.New("secret: already destroyed")

// Bytes is a secret byte string. It is safe for concurrent use.
//
// The content sits behind a function. In an unexported field fmt calls no
// methods, and for a verb that does not fit it follows a pointer once more, so
// a plain pointer prints what it points to under %s or %q; a function prints as
// an address under every verb.
type Bytes struct{ in func() *content }

type content struct {
	mu sync.RWMutex
	b  []byte // nil once destroyed
}

// New takes ownership of b: the caller neither reads nor writes it afterwards.
func New(b []byte) *Bytes {
	if b == nil {
		b = []byte{}
	}
	c := &content{b: b}
	return &Bytes{in: func() *content { return c }}
}

// Use calls f with the secret, which f must neither change nor keep.
// It returns what f returns, or ErrDestroyed without calling f. Destroy waits
// for f, so f must not call it.
func (s *Bytes) Use(f func(b []byte) error) error {
	c := s.content()
	if c == nil {
		return ErrDestroyed
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.b == nil {
		return ErrDestroyed
	}
	return f(c.b)
}

// Len is the length in bytes, 0 once destroyed.
func (s *Bytes) Len() int {
	n := 0
	// ErrDestroyed leaves 0, which is the answer.
	_ = s.Use(func(b []byte) error { n = len(b); return nil })
	return n
}

// Equal compares in constant time for equal lengths. A destroyed secret equals
// nothing, not even itself. It works on a copy, which it erases: holding both
// locks could deadlock with Destroy.
func (s *Bytes) Equal(other *Bytes) bool {
	var mine []byte
	defer func() { clear(mine) }()
	if err := s.Use(func(b []byte) error { mine = append(mine, b...); return nil }); err != nil {
		return false
	}
	equal := false
	err := other.Use(func(b []byte) error {
		equal = subtle.ConstantTimeCompare(mine, b) == 1
		return nil
	})
	return err == nil && equal
}

func (s *Bytes) content() *content {
	if s == nil || s.in == nil {
		return nil
	}
	return s.in()
}

// Destroy overwrites the secret. It may be called more than once and on nil.
// Copies that libraries made while using the secret stay until they are
// garbage collected and overwritten.
func (s *Bytes) Destroy() {
	c := s.content()
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.b)
	c.b = nil
}

// Format prints the same fixed text for every verb and flag.
func (s Bytes) Format(f fmt.State, _ rune) {
	// A writer that fails is the business of whoever gave it to fmt.
	_, _ = f.Write([]byte(redacted))
}

// String is for the few packages that look for a Stringer without fmt.
func (s Bytes) String() string { return redacted }

// LogValue logs the same fixed text under every handler.
func (s Bytes) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText always fails with ErrEncode.
func (s Bytes) MarshalText() ([]byte, error) { return nil, ErrEncode }

// MarshalJSON always fails with ErrEncode.
func (s Bytes) MarshalJSON() ([]byte, error) { return nil, ErrEncode }

// MarshalBinary always fails with ErrEncode.
func (s Bytes) MarshalBinary() ([]byte, error) { return nil, ErrEncode }

// MarshalCBOR always fails with ErrEncode.
func (s Bytes) MarshalCBOR() ([]byte, error) { return nil, ErrEncode }

// GobEncode always fails with ErrEncode.
func (s Bytes) GobEncode() ([]byte, error) { return nil, ErrEncode }
