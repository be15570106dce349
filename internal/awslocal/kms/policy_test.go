package kms_test

import (
	"strings"
	"testing"

	"github.com/keyhold/keyhold/internal/awslocal/kms"
)

const (
	testARN   = "arn:aws:kms:eu-central-1:111122223333:key/01234567-89ab-4def-8123-456789abcdef"
	roleARN   = "arn:aws:iam::111122223333:role/parent"
	rootARN   = "arn:aws:iam::111122223333:root"
	adminARN  = "arn:aws:iam::111122223333:role/keyhold-admin"
	strangerA = "arn:aws:iam::999999999999:role/parent"
)

// policyOf wraps statements.
func policyOf(statements ...string) string {
	return `{"Version":"2012-10-17","Statement":[` + strings.Join(statements, ",") + `]}`
}

// allow is a statement that allows role Decrypt under a condition.
func allow(condition string) string {
	return `{"Effect":"Allow","Principal":{"AWS":"` + roleARN + `"},"Action":"kms:Decrypt","Resource":"*","Condition":` + condition + `}`
}

func TestPoliciesDecideAsIAMDoes(t *testing.T) {
	const (
		pcr0    = "kms:recipientattestation:pcr0"
		context = "kms:encryptioncontext:keyring"
	)
	all := `{"Effect":"Allow","Principal":"*","Action":"kms:*","Resource":"*"}`
	tests := []struct {
		name, policy, principal, action string
		context                         map[string]string
		want                            string
	}{
		{"no statement for the action", policyOf(allow(`{}`)), roleARN, "kms:Encrypt", nil, "implicit deny"},
		{"the action by name", policyOf(allow(`{}`)), roleARN, "kms:Decrypt", nil, "allowed"},
		{"another principal", policyOf(allow(`{}`)), strangerA, "kms:Decrypt", nil, "implicit deny"},
		{"actions by wildcard", policyOf(`{"Effect":"Allow","Principal":"*","Action":["kms:Dec*","kms:Re?ncrypt"],"Resource":"*"}`), roleARN, "kms:Decrypt", nil, "allowed"},
		{"a wildcard that does not match", policyOf(`{"Effect":"Allow","Principal":"*","Action":"kms:Dec?","Resource":"*"}`), roleARN, "kms:Decrypt", nil, "implicit deny"},
		{"actions in another case", policyOf(`{"Effect":"Allow","Principal":"*","Action":"kms:DECRYPT","Resource":"*"}`), roleARN, "kms:Decrypt", nil, "allowed"},
		{"every action", policyOf(`{"Effect":"Allow","Principal":"*","Action":"*","Resource":"` + testARN + `"}`), roleARN, "kms:Decrypt", nil, "allowed"},
		{"a single statement without a list", `{"Version":"2012-10-17","Id":"x","Statement":` + all + `}`, roleARN, "kms:Decrypt", nil, "allowed"},
		{"deny wins whatever the order", policyOf(all, strings.Replace(allow(`{}`), "Allow", "Deny", 1)), roleARN, "kms:Decrypt", nil, "explicit deny"},
		{"deny wins in front", policyOf(strings.Replace(allow(`{}`), "Allow", "Deny", 1), all), roleARN, "kms:Decrypt", nil, "explicit deny"},
		{"the account delegates to nobody", policyOf(strings.Replace(allow(`{}`), roleARN, rootARN, 1)), roleARN, "kms:Decrypt", nil, "implicit deny"},
		{"the account's root itself", policyOf(strings.Replace(allow(`{}`), roleARN, "111122223333", 1)), rootARN, "kms:Decrypt", nil, "allowed"},
		{"denying the account denies its roles", policyOf(all, strings.NewReplacer("Allow", "Deny", roleARN, rootARN).Replace(allow(`{}`))), roleARN, "kms:Decrypt", nil, "explicit deny"},
		{"denying another account does not", policyOf(all, strings.NewReplacer("Allow", "Deny", roleARN, "999999999999").Replace(allow(`{}`))), roleARN, "kms:Decrypt", nil, "allowed"},
		{"one of several principals", policyOf(strings.Replace(allow(`{}`), `"`+roleARN+`"`, `["`+strangerA+`","`+roleARN+`"]`, 1)), roleARN, "kms:Decrypt", nil, "allowed"},

		{"StringEquals", policyOf(allow(`{"StringEquals":{"kms:RecipientAttestation:PCR0":"aa"}}`)), roleARN, "kms:Decrypt", map[string]string{pcr0: "aa"}, "allowed"},
		{"StringEquals in another case", policyOf(allow(`{"StringEquals":{"kms:RecipientAttestation:PCR0":"AA"}}`)), roleARN, "kms:Decrypt", map[string]string{pcr0: "aa"}, "implicit deny"},
		{"StringEquals on an absent key", policyOf(allow(`{"StringEquals":{"kms:RecipientAttestation:PCR0":"aa"}}`)), roleARN, "kms:Decrypt", nil, "implicit deny"},
		{"StringEqualsIgnoreCase", policyOf(allow(`{"StringEqualsIgnoreCase":{"kms:RecipientAttestation:PCR0":"AA"}}`)), roleARN, "kms:Decrypt", map[string]string{pcr0: "aa"}, "allowed"},
		{"one of several values", policyOf(allow(`{"StringEquals":{"kms:RecipientAttestation:PCR0":["bb","aa"]}}`)), roleARN, "kms:Decrypt", map[string]string{pcr0: "aa"}, "allowed"},
		{"StringNotEquals on an absent key", policyOf(allow(`{"StringNotEquals":{"kms:RecipientAttestation:PCR0":"aa"}}`)), roleARN, "kms:Decrypt", nil, "allowed"},
		{"StringNotEquals against several", policyOf(allow(`{"StringNotEquals":{"kms:RecipientAttestation:PCR0":["bb","aa"]}}`)), roleARN, "kms:Decrypt", map[string]string{pcr0: "aa"}, "implicit deny"},
		{"StringNotEqualsIgnoreCase", policyOf(allow(`{"StringNotEqualsIgnoreCase":{"kms:RecipientAttestation:PCR0":"AA"}}`)), roleARN, "kms:Decrypt", map[string]string{pcr0: "aa"}, "implicit deny"},
		{"StringLike", policyOf(allow(`{"StringLike":{"kms:EncryptionContext:keyring":"ma?n*"}}`)), roleARN, "kms:Decrypt", map[string]string{context: "main-2"}, "allowed"},
		{"StringNotLike", policyOf(allow(`{"StringNotLike":{"kms:EncryptionContext:keyring":"main*"}}`)), roleARN, "kms:Decrypt", map[string]string{context: "main-2"}, "implicit deny"},
		{"condition keys in another case", policyOf(allow(`{"StringEquals":{"KMS:encryptioncontext:KeyRing":"main"}}`)), roleARN, "kms:Decrypt", map[string]string{context: "main"}, "allowed"},
		{"ArnEquals", policyOf(allow(`{"ArnEquals":{"aws:PrincipalArn":"arn:aws:iam::*:role/par*"}}`)), roleARN, "kms:Decrypt", map[string]string{"aws:principalarn": roleARN}, "allowed"},
		{"ArnNotEquals", policyOf(allow(`{"ArnNotEquals":{"aws:PrincipalArn":"` + roleARN + `"}}`)), roleARN, "kms:Decrypt", map[string]string{"aws:principalarn": roleARN}, "implicit deny"},
		{"Null true on an absent key", policyOf(allow(`{"Null":{"kms:RecipientAttestation:PCR31":"true"}}`)), roleARN, "kms:Decrypt", nil, "allowed"},
		{"Null true on a present key", policyOf(allow(`{"Null":{"kms:RecipientAttestation:PCR0":true}}`)), roleARN, "kms:Decrypt", map[string]string{pcr0: "aa"}, "implicit deny"},
		{"Null false on a present key", policyOf(allow(`{"Null":{"kms:RecipientAttestation:PCR0":"false"}}`)), roleARN, "kms:Decrypt", map[string]string{pcr0: "aa"}, "allowed"},
		{"all conditions must hold", policyOf(allow(`{"StringEquals":{"kms:RecipientAttestation:PCR0":"aa","kms:EncryptionContext:keyring":"x"}}`)), roleARN, "kms:Decrypt", map[string]string{pcr0: "aa", context: "main"}, "implicit deny"},
		{"all operators must hold", policyOf(allow(`{"StringEquals":{"kms:RecipientAttestation:PCR0":"aa"},"Null":{"kms:EncryptionContext:keyring":"true"}}`)), roleARN, "kms:Decrypt", map[string]string{pcr0: "aa", context: "main"}, "implicit deny"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := kms.TestingOnlyDecide(tt.policy, testARN, tt.principal, tt.action, tt.context)
			if err != nil || got != tt.want {
				t.Errorf("got %s, %v, want %s", got, err, tt.want)
			}
		})
	}
}

func TestPoliciesThatAreNotUnderstoodAreRefused(t *testing.T) {
	good := allow(`{}`)
	replace := func(old, with string) string { return policyOf(strings.Replace(good, old, with, 1)) }
	tests := map[string]string{
		"no JSON":                                `x`,
		"empty":                                  ``,
		"a list":                                 `[]`,
		"trailing data":                          policyOf(good) + `{}`,
		"cut":                                    policyOf(good)[:40],
		"no version":                             `{"Statement":[` + good + `]}`,
		"the old version":                        `{"Version":"2008-10-17","Statement":[` + good + `]}`,
		"no statement":                           `{"Version":"2012-10-17"}`,
		"an empty list":                          policyOf(),
		"an unknown element":                     `{"Version":"2012-10-17","Statement":[` + good + `],"More":1}`,
		"a repeated element":                     `{"Version":"2012-10-17","Version":"2012-10-17","Statement":[` + good + `]}`,
		"an element in another case":             `{"version":"2012-10-17","Statement":[` + good + `]}`,
		"a repeated effect":                      replace(`"Effect":"Allow"`, `"Effect":"Deny","Effect":"Allow"`),
		"another effect":                         replace(`"Allow"`, `"allow"`),
		"no effect":                              replace(`"Effect":"Allow",`, ``),
		"NotAction":                              replace(`"Action"`, `"NotAction"`),
		"NotPrincipal":                           replace(`"Principal"`, `"NotPrincipal"`),
		"NotResource":                            replace(`"Resource"`, `"NotResource"`),
		"no principal":                           replace(`"Principal":{"AWS":"`+roleARN+`"},`, ``),
		"a service principal":                    replace(`{"AWS":"`+roleARN+`"}`, `{"Service":"ec2.amazonaws.com"}`),
		"a federated principal":                  replace(`{"AWS":"`+roleARN+`"}`, `{"Federated":"x"}`),
		"a principal by wildcard":                replace(roleARN, "arn:aws:iam::111122223333:role/*"),
		"a bare string principal":                replace(`{"AWS":"`+roleARN+`"}`, `"`+roleARN+`"`),
		"a principal that is none":               replace(roleARN, "parent"),
		"no principals":                          replace(`"`+roleARN+`"`, `[]`),
		"an action of s3":                        replace(`kms:Decrypt`, `s3:GetObject`),
		"no action":                              replace(`"Action":"kms:Decrypt",`, ``),
		"a number as action":                     replace(`"kms:Decrypt"`, `7`),
		"another resource":                       replace(`"Resource":"*"`, `"Resource":"`+testARN[:len(testARN)-1]+`0"`),
		"no resource":                            replace(`"Resource":"*",`, ``),
		"an unknown operator":                    policyOf(allow(`{"StringMatches":{"aws:PrincipalArn":"x"}}`)),
		"an operator in lower case":              policyOf(allow(`{"stringequals":{"aws:PrincipalArn":"x"}}`)),
		"Bool":                                   policyOf(allow(`{"Bool":{"kms:GrantIsForAWSResource":"true"}}`)),
		"IfExists":                               policyOf(allow(`{"StringEqualsIfExists":{"aws:PrincipalArn":"x"}}`)),
		"ForAllValues":                           policyOf(allow(`{"ForAllValues:StringEquals":{"kms:EncryptionContextKeys":"x"}}`)),
		"an unknown key":                         policyOf(allow(`{"StringEquals":{"aws:SourceIp":"x"}}`)),
		"PCR32":                                  policyOf(allow(`{"StringEquals":{"kms:RecipientAttestation:PCR32":"x"}}`)),
		"PCR01":                                  policyOf(allow(`{"StringEquals":{"kms:RecipientAttestation:PCR01":"x"}}`)),
		"an encryption context key without name": policyOf(allow(`{"StringEquals":{"kms:EncryptionContext:":"x"}}`)),
		"a policy variable":                      policyOf(allow(`{"StringEquals":{"aws:PrincipalArn":"${aws:PrincipalArn}"}}`)),
		"a number as value":                      policyOf(allow(`{"StringEquals":{"aws:PrincipalArn":1}}`)),
		"no value":                               policyOf(allow(`{"StringEquals":{"aws:PrincipalArn":[]}}`)),
		"Null with another word":                 policyOf(allow(`{"Null":{"aws:PrincipalArn":"yes"}}`)),
		"a repeated condition key":               policyOf(allow(`{"StringEquals":{"aws:PrincipalArn":"x","aws:PrincipalArn":"y"}}`)),
		"longer than 32 KB":                      policyOf(good) + strings.Repeat(" ", 32<<10),
	}
	if _, err := kms.TestingOnlyDecide(policyOf(good), testARN, roleARN, "kms:Decrypt", nil); err != nil {
		t.Fatalf("the policy that the others are made of is refused: %v", err)
	}
	for name, policy := range tests {
		t.Run(name, func(t *testing.T) {
			if got, err := kms.TestingOnlyDecide(policy, testARN, roleARN, "kms:Decrypt", nil); err == nil {
				t.Errorf("accepted, and decided: %s", got)
			}
		})
	}
}

func TestGlob(t *testing.T) {
	for _, tt := range []struct {
		pattern, text string
		want          bool
	}{
		{"", "", true},
		{"", "a", false},
		{"*", "", true},
		{"*", "abc", true},
		{"a*c", "abc", true},
		{"a*c", "ab", false},
		{"a?c", "abc", true},
		{"a?c", "ac", false},
		{"*b*", "abc", true},
		{"**", "x", true},
		{"a*b*c", "aXbYbZc", true},
		{"a*b", "aab", true},
		{"ab", "abc", false},
		{"?", "", false},
		{strings.Repeat("a*", 50) + "b", strings.Repeat("a", 5000), false}, // would take ages with backtracking
	} {
		if got := kms.TestingOnlyGlob(tt.pattern, tt.text); got != tt.want {
			t.Errorf("%.20q on %.20q: %t", tt.pattern, tt.text, got)
		}
	}
}

func TestArnWildcardsStayInTheirPart(t *testing.T) {
	for _, tt := range []struct {
		pattern string
		want    bool
	}{
		{roleARN, true},
		{"arn:aws:iam::*:role/parent", true},
		{"arn:aws:iam::111122223333:*", true},
		{"arn:*:role/parent", false},
		{"*", false},
		{"arn:aws:iam::111122223333:role/Parent", false},
	} {
		if got := kms.TestingOnlyArnLike(tt.pattern, roleARN); got != tt.want {
			t.Errorf("%s: %t", tt.pattern, got)
		}
	}
}

func FuzzPolicy(f *testing.F) {
	f.Add(policyOf(allow(`{"Null":{"kms:RecipientAttestation:PCR0":"true"}}`)))
	f.Add(policyOf(allow(`{"StringEquals":{"kms:EncryptionContext:x":["a","b"]}}`)))
	f.Fuzz(func(t *testing.T, policy string) {
		got, err := kms.TestingOnlyDecide(policy, testARN, roleARN, "kms:Decrypt", nil)
		if (err == nil) != (got != "") {
			t.Errorf("%q, %v", got, err)
		}
	})
}
