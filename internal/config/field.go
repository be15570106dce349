package config

import (
	"errors"
	"strings"
)

// FieldError is one reason to refuse a config, and the field that it is about.
// It wraps ErrInvalid.
type FieldError struct {
	Field string // top-level key of the JSON, as kms_key_arn or lease
	Text  string // names the field first; holds nothing of the config
}

// Error returns the text as Validate and Parse report it.
func (e *FieldError) Error() string { return ErrInvalid.Error() + ": " + e.Text }

// Unwrap makes errors.Is find ErrInvalid.
func (e *FieldError) Unwrap() error { return ErrInvalid }

// newFieldError takes the field from the start of text: "lease.max_ms must be".
func newFieldError(text string) *FieldError {
	end := strings.IndexAny(text, " .[")
	if end < 0 {
		end = len(text)
	}
	return &FieldError{Field: text[:end], Text: text}
}

// FieldErrors returns what Validate joined into err, in its order.
func FieldErrors(err error) []*FieldError {
	var joined interface{ Unwrap() []error }
	if !errors.As(err, &joined) {
		return nil
	}
	var out []*FieldError
	for _, e := range joined.Unwrap() {
		if f, ok := errors.AsType[*FieldError](e); ok {
			out = append(out, f)
		}
	}
	return out
}
