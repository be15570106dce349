package keypolicy

import "encoding/json"

// layer is a set of statements that the questions are put to.
type layer struct {
	name       string
	statements []Statement
}

// careless are Allows as they are added by mistake, each put behind the policy in
// turn. The last one contains all others; they are there for what a report says.
func careless(account, parent, stranger string) ([]layer, error) {
	if parent == "" {
		parent = stranger
	}
	root := "arn:aws:iam::" + account + ":root"
	additions := []struct {
		name    string
		who     any
		actions []string
	}{
		{"CDK grantDecrypt to the parent", map[string]string{"AWS": parent}, []string{decrypt}},
		{"CDK grantEncryptDecrypt to another role", map[string]string{"AWS": stranger}, []string{decrypt, "kms:Encrypt", "kms:GenerateDataKey*", "kms:ReEncrypt*"}},
		{"CreateGrant and Decrypt for a service", map[string]string{"Service": freshService(nil)}, []string{"kms:CreateGrant", decrypt}},
		{"kms:* for the account's root", map[string]string{"AWS": root}, []string{"kms:*"}},
		{"kms:De* for everybody", "*", []string{"kms:De*"}},
		{"kms:* for everybody", "*", []string{"kms:*"}},
	}
	out := make([]layer, len(additions))
	for i, a := range additions {
		text, err := json.Marshal(document{Version: version, Statement: []element{
			{Effect: "Allow", Principal: a.who, Action: a.actions, Resource: "*"},
		}})
		if err != nil {
			return nil, err
		}
		p, err := Parse(text)
		if err != nil {
			return nil, err
		}
		out[i] = layer{a.name, p.statements}
	}
	return out, nil
}
