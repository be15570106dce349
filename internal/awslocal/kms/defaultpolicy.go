package kms

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
)

// Pair is what an enclave must have measured: image and config, 48 bytes each.
type Pair struct{ PCR0, PCR16 []byte }

// policyDocument writes the elements in the order in which people read them.
type policyDocument struct {
	Version   string
	Statement []policyStatement
}

type policyStatement struct {
	Sid       string
	Effect    string
	Principal any
	Action    []string
	Resource  string
	Condition map[string]map[string]any `json:",omitempty"`
}

// DefaultPolicy is a key policy for local mode: the account's root administers,
// principal may look, and gets data keys from attested enclaves of one or two
// pairs. Nobody may use the key in another way. What a deployment uses is made
// and proved elsewhere.
func DefaultPolicy(account, principal string, pairs []Pair) ([]byte, error) {
	if len(pairs) < 1 || len(pairs) > 2 {
		return nil, errors.New("make a key policy: want one or two pairs of PCR0 and PCR16")
	}
	who := func(arn string) map[string]string { return map[string]string{"AWS": arn} }
	use := []string{"kms:Decrypt", "kms:GenerateDataKey"}
	look := []string{"kms:DescribeKey", "kms:GetKeyPolicy", "kms:ListGrants"}
	doc := policyDocument{Version: "2012-10-17", Statement: []policyStatement{
		{
			Sid: "Administer", Effect: "Allow", Principal: who("arn:aws:iam::" + account + ":root"), Resource: "*",
			Action: append([]string{"kms:PutKeyPolicy"}, look...),
		},
		{Sid: "Look", Effect: "Allow", Principal: who(principal), Action: look, Resource: "*"},
	}}
	for i, p := range pairs {
		if len(p.PCR0) != 48 || len(p.PCR16) != 48 || zero(p.PCR0) || zero(p.PCR16) {
			return nil, errors.New("make a key policy: PCR0 and PCR16 must have 48 bytes that are not all zero")
		}
		doc.Statement = append(doc.Statement, policyStatement{
			Sid: fmt.Sprintf("Enclave%d", i), Effect: "Allow", Principal: who(principal), Action: use, Resource: "*",
			Condition: map[string]map[string]any{"StringEqualsIgnoreCase": {
				"kms:RecipientAttestation:PCR0":  hex.EncodeToString(p.PCR0),
				"kms:RecipientAttestation:PCR16": hex.EncodeToString(p.PCR16),
			}},
		})
	}
	doc.Statement = append(doc.Statement,
		policyStatement{
			Sid: "OnlyAttested", Effect: "Deny", Principal: "*", Action: use, Resource: "*",
			Condition: map[string]map[string]any{"Null": {"kms:RecipientAttestation:PCR0": "true"}},
		},
		policyStatement{
			Sid: "OnlyThePrincipal", Effect: "Deny", Principal: "*", Action: use, Resource: "*",
			Condition: map[string]map[string]any{"ArnNotEquals": {"aws:PrincipalArn": principal}},
		},
		policyStatement{
			Sid: "NoOtherUse", Effect: "Deny", Principal: "*", Resource: "*",
			Action: []string{"kms:CreateGrant", "kms:Encrypt", "kms:GenerateDataKeyPair*", "kms:GenerateDataKeyWithoutPlaintext", "kms:ReEncrypt*"},
		},
	)
	out, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("make a key policy: %w", err)
	}
	return out, nil
}
