package kms

import (
	"fmt"

	"github.com/keyhold/keyhold/keypolicy"
)

// Pair is what an enclave must have measured: image and config, 48 bytes each.
type Pair struct{ PCR0, PCR16 []byte }

// DefaultPolicy is a key policy as a deployment has it, with data keys for
// attested enclaves of these pairs, through the principal. An admin role that
// nobody has the credentials of administers the key.
func DefaultPolicy(account, principal string, pairs []Pair) ([]byte, error) {
	spec := keypolicy.Spec{
		Account: account, Parent: principal, Admins: []string{"arn:aws:iam::" + account + ":role/keyhold-admin"},
		Creating: true, Mode: keypolicy.Managed,
	}
	for _, p := range pairs {
		if len(p.PCR0) != len(keypolicy.PCR{}) || len(p.PCR16) != len(keypolicy.PCR{}) {
			return nil, fmt.Errorf("make a key policy: %w", keypolicy.ErrPCR)
		}
		spec.Pairs = append(spec.Pairs, keypolicy.Pair{PCR0: keypolicy.PCR(p.PCR0), PCR16: keypolicy.PCR(p.PCR16)})
	}
	policy, err := keypolicy.Build(spec)
	if err != nil {
		return nil, fmt.Errorf("make a key policy: %w", err)
	}
	return policy.JSON(), nil
}
