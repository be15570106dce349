// Package attestation verifies attestation documents of AWS Nitro Enclaves. It
// refuses every document that is not exactly of the form AWS writes, not signed
// under the pinned root, from a debug enclave, or not of a wanted image.
//
// There are two policies with a result type each, so that one cannot be taken
// for the other. VerifyLive shows that an enclave is there now: it needs a
// nonce. VerifyRecorded shows what an enclave said when it booted, years later
// too: it trusts the AWS PKI at the document's own time and shows nothing about
// the present.
//
// The checks run in the order of the error list in errors.go. The last before
// the policy is a second opinion by github.com/hf/nitrite, at the same time.
//
// The bytes of a valid document are not unique (tag 18, CBOR length forms and
// ECDSA allow others with the same content): never use them or their hash as an
// identity.
//
// Sources, as the comments name them: "AWS" is attestation_process.md of
// github.com/aws/aws-nitro-enclaves-nsm-api with its sections, "design" is
// docs/design.md of this repository, section 4.
package attestation

import (
	"bytes"
	"maps"
	"slices"
	"time"
)

// Document is the content of an attestation document. On its own it says
// nothing about who signed it: only Live and Recorded do.
type Document struct {
	ModuleID    string         // instance and enclave, as i-...-enc...
	Timestamp   time.Time      // the NSM's clock, in milliseconds, UTC
	Digest      string         // always "SHA384"
	PCRs        map[int][]byte // the locked registers, 48 bytes each
	PublicKey   []byte         // nil where the document has none
	UserData    []byte         // nil where the document has none
	Nonce       []byte         // nil where the document has none
	Certificate []byte         // DER of the leaf
	CABundle    [][]byte       // DER, the root first
}

// clone keeps callers of the accessors from changing each other's documents.
func (d *Document) clone() Document {
	out := *d
	out.PCRs = maps.Clone(d.PCRs)
	for i, v := range out.PCRs {
		out.PCRs[i] = bytes.Clone(v)
	}
	out.PublicKey = bytes.Clone(d.PublicKey)
	out.UserData = bytes.Clone(d.UserData)
	out.Nonce = bytes.Clone(d.Nonce)
	out.Certificate = bytes.Clone(d.Certificate)
	out.CABundle = slices.Clone(d.CABundle)
	for i, c := range out.CABundle {
		out.CABundle[i] = bytes.Clone(c)
	}
	return out
}

// Live is a document that VerifyLive accepted. Its zero value holds none.
type Live struct{ doc *Document }

// Document returns a copy of the verified content; the zero Live has none and
// fails with ErrUnverified.
func (l Live) Document() (Document, error) {
	if l.doc == nil {
		return Document{}, ErrUnverified
	}
	return l.doc.clone(), nil
}

// Recorded is a document that VerifyRecorded accepted. Its zero value holds
// none. It shows what was said at the document's own time, and nothing since.
type Recorded struct{ doc *Document }

// Document returns a copy of the verified content; the zero Recorded has none
// and fails with ErrUnverified.
func (r Recorded) Document() (Document, error) {
	if r.doc == nil {
		return Document{}, ErrUnverified
	}
	return r.doc.clone(), nil
}
