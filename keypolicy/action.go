package keypolicy

import (
	"slices"
	"strings"
)

// Class says what an action does with a key.
type Class int

// The classes, gravest first.
const (
	Releasing     Class = iota + 1 // answers with plaintext, or with a secret that the key decides
	Moving                         // carries key, ciphertext or the right to use them elsewhere, or brings one in
	Changing                       // replaces the policy
	Using                          // uses of keys of other specs
	Administering                  // changes the key's state, names and tags; lets nothing out
	Reading                        // tells about the key
	Account                        // is not about a key: no key policy is asked
)

func (c Class) String() string {
	names := [...]string{"", "releasing", "moving", "changing", "using", "administering", "reading", "account"}
	if c < 1 || int(c) >= len(names) {
		return "unknown"
	}
	return names[c]
}

// Action is one row of the table of KMS actions.
type Action struct {
	Name     string // as kms:Decrypt
	Class    Class
	Attested bool // takes an attestation document, so that kms:RecipientAttestation keys are in its requests
}

// The actions that Keyhold itself uses.
const (
	decrypt         = "kms:Decrypt"
	generateDataKey = "kms:GenerateDataKey"
	putKeyPolicy    = "kms:PutKeyPolicy"
	describeKey     = "kms:DescribeKey"
	getKeyPolicy    = "kms:GetKeyPolicy"
	listGrants      = "kms:ListGrants"
)

// actions is the whole of KMS: the 56 operations of the API as the SDK of
// 2026-11-04 has them (service/kms v1.62.3, with ML-KEM), where ReEncrypt is
// authorized as two actions, and the one permission-only action of the service
// authorization reference (docs.aws.amazon.com/service-authorization, list_kms,
// read on 2026-11-21). Which of them take an attestation document is in the
// developer guide, "Condition keys for Nitro Enclaves". A test compares the
// table with the SDK.
//
//nolint:gochecknoglobals // the one table; never written after start
var actions = []Action{
	{"kms:CancelKeyDeletion", Administering, false},
	{"kms:ConnectCustomKeyStore", Account, false},
	{"kms:CreateAlias", Administering, false},
	{"kms:CreateCustomKeyStore", Account, false},
	{"kms:CreateGrant", Moving, false},
	{"kms:CreateKey", Account, false},
	{"kms:Decapsulate", Releasing, false},
	{decrypt, Releasing, true},
	{"kms:DeleteAlias", Administering, false},
	{"kms:DeleteCustomKeyStore", Account, false},
	{"kms:DeleteImportedKeyMaterial", Moving, false},
	{"kms:DeriveSharedSecret", Releasing, true},
	{"kms:DescribeCustomKeyStores", Account, false},
	{describeKey, Reading, false},
	{"kms:DisableKey", Administering, false},
	{"kms:DisableKeyRotation", Administering, false},
	{"kms:DisconnectCustomKeyStore", Account, false},
	{"kms:EnableKey", Administering, false},
	{"kms:EnableKeyRotation", Administering, false},
	{"kms:Encapsulate", Using, false},
	{"kms:Encrypt", Moving, false}, // would feed the enclave a data key that somebody knows
	{generateDataKey, Releasing, true},
	{"kms:GenerateDataKeyPair", Releasing, true},
	{"kms:GenerateDataKeyPairWithoutPlaintext", Moving, false},
	{"kms:GenerateDataKeyWithoutPlaintext", Moving, false},
	{"kms:GenerateMac", Using, false},
	{"kms:GenerateRandom", Account, true},
	{"kms:GetKeyLastUsage", Reading, false},
	{getKeyPolicy, Reading, false},
	{"kms:GetKeyRotationStatus", Reading, false},
	{"kms:GetParametersForImport", Moving, false},
	{"kms:GetPublicKey", Reading, false},
	{"kms:ImportKeyMaterial", Moving, false},
	{"kms:ListAliases", Account, false},
	{listGrants, Reading, false},
	{"kms:ListKeyPolicies", Reading, false},
	{"kms:ListKeyRotations", Reading, false},
	{"kms:ListKeys", Account, false},
	{"kms:ListResourceTags", Reading, false},
	{"kms:ListRetirableGrants", Account, false},
	{putKeyPolicy, Changing, false},
	{"kms:ReEncryptFrom", Moving, false},
	{"kms:ReEncryptTo", Moving, false},
	{"kms:ReplicateKey", Moving, false},
	{"kms:RetireGrant", Administering, false},
	{"kms:RevokeGrant", Administering, false},
	{"kms:RotateKeyOnDemand", Administering, false},
	{"kms:ScheduleKeyDeletion", Administering, false},
	{"kms:Sign", Using, false},
	{"kms:SynchronizeMultiRegionKey", Moving, false}, // permission only
	{"kms:TagResource", Administering, false},
	{"kms:UntagResource", Administering, false},
	{"kms:UpdateAlias", Administering, false},
	{"kms:UpdateCustomKeyStore", Account, false},
	{"kms:UpdateKeyDescription", Administering, false},
	{"kms:UpdatePrimaryRegion", Moving, false},
	{"kms:Verify", Using, false},
	{"kms:VerifyMac", Using, false},
}

// lowered are the names of the table in lower case.
//
//nolint:gochecknoglobals // derived from the table; never written after start
var lowered = func() (names []string) {
	for _, a := range actions {
		names = append(names, strings.ToLower(a.Name))
	}
	return names
}()

// Actions returns the table of all KMS actions, sorted by name.
func Actions() []Action { return slices.Clone(actions) }

// named returns the names of the actions of these classes.
func named(classes ...Class) []string {
	var names []string
	for _, a := range actions {
		if slices.Contains(classes, a.Class) {
			names = append(names, a.Name)
		}
	}
	return names
}

func actionIndex(name string) int {
	return slices.IndexFunc(actions, func(a Action) bool { return strings.EqualFold(a.Name, name) })
}

// covered returns which rows of the table a policy's Action text covers. Actions
// are compared without case. None is covered by a text that means nothing here.
func covered(text string) (rows [64]bool, some bool) {
	text = strings.ToLower(text)
	for i := range actions {
		if glob(text, lowered[i]) {
			rows[i], some = true, true
		}
	}
	return rows, some
}

// glob matches with * for any run and ? for one byte, in time that is the product
// of the lengths.
func glob(pattern, text string) bool {
	p, t, star, mark := 0, 0, -1, 0
	for t < len(text) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, mark = p, t
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == text[t]):
			p++
			t++
		case star >= 0:
			mark++
			p, t = star+1, mark
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}
