package keypolicy

import (
	"errors"
)

// What may be wrong with a key whose policy is sound.
var (
	ErrOtherKey    = errors.New("KMS answered about another key than the one in the config")
	ErrKeyManager  = errors.New("key is not managed by the customer")
	ErrKeyState    = errors.New("key is not enabled")
	ErrMultiRegion = errors.New("key is multi-region: its replicas have policies of their own")
	ErrKeyOrigin   = errors.New("key material was not made by KMS: somebody else may have it")
	ErrKeySpec     = errors.New("key is not a symmetric one for encryption")
	ErrGrants      = errors.New("key has grants, which allow more than its policy does")
)

// KeyFacts are what DescribeKey and ListGrants say of a key, in the words of the
// KMS API.
type KeyFacts struct {
	ARN         string // KeyMetadata.Arn
	Account     string // AWSAccountId
	KeyManager  string // CUSTOMER or AWS
	KeyState    string // Enabled, Disabled, PendingDeletion, ...
	Enabled     bool
	MultiRegion *bool // nil where KMS said nothing, which is refused
	Origin      string
	KeySpec     string
	KeyUsage    string
	Grants      int // on all pages of ListGrants
}

// CheckKey refuses a key that can be reached past its policy, or that is not the
// one named by keyARN. It joins everything that is wrong. A grant is refused
// whatever it permits: it is no part of the policy, and constraints on it cannot
// ask for an attestation document.
func CheckKey(f KeyFacts, keyARN string) error {
	var bad []error
	for _, c := range []struct {
		ok  bool
		err error
	}{
		{keyARN != "" && f.ARN == keyARN && f.Account == accountOf(keyARN), ErrOtherKey},
		{f.KeyManager == "CUSTOMER", ErrKeyManager},
		{f.Enabled && f.KeyState == "Enabled", ErrKeyState},
		{f.MultiRegion != nil && !*f.MultiRegion, ErrMultiRegion},
		{f.Origin == "AWS_KMS", ErrKeyOrigin},
		{f.KeySpec == "SYMMETRIC_DEFAULT" && f.KeyUsage == "ENCRYPT_DECRYPT", ErrKeySpec},
		{f.Grants == 0, ErrGrants},
	} {
		if !c.ok {
			bad = append(bad, c.err)
		}
	}
	return errors.Join(bad...)
}
