package keypolicy

import "encoding/json"

// addition is what somebody adds to a policy.
type addition struct {
	name       string
	statements []Statement
}

// careless are Allows as they are added by mistake, each put behind the policy in
// turn. The last one contains all others: a policy that holds with it holds with
// each of them, since an Allow that is taken away gives nothing. The others tell,
// of a policy that does not hold, how little it takes.
func careless(account, parent, stranger string) ([]addition, error) {
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
	out := make([]addition, len(additions))
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
		out[i] = addition{a.name, p.statements}
	}
	return out, nil
}
