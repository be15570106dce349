// Package keypolicy builds, reads and proves the policy of the KMS key that a
// keyring's data key is wrapped with. It refuses every policy of which it would
// have to guess a part, and every one that lets the key out to anybody but an
// attested enclave of one or two named pairs of image and config.
//
// It needs the standard library alone and does no I/O, so that the enclave can
// link it and judge, before it asks for any key, what KMS itself answers.
//
// Where AWS's documents leave room, an Allow is read as wide and a Deny as narrow
// as they permit. IAM is taken to allow everything: a statement for an account
// is one for each of its principals.
package keypolicy
