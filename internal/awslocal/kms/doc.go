// Package kms emulates AWS KMS on one machine: the JSON 1.1 API over TLS, with
// signatures, attestation documents and key policies really checked. It refuses
// what it does not know instead of guessing, and its keys protect nothing: it is
// for tests and local mode, never for an image.
//
// What differs from AWS: there are no identity policies or aliases, and
// grants are listed and permit nothing; so a
// statement that allows the account (arn:aws:iam::<account>:root) admits the
// account's root alone and delegates to nobody; requests with fields that are
// not emulated are refused.
package kms
