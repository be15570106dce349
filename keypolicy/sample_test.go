package keypolicy_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/keyhold/keyhold/keypolicy"
)

const condImage = `{"StringEqualsIgnoreCase":{"kms:RecipientAttestation:ImageSha384":"@"}}`

// Policies as they are published for enclaves, each told by its statements.
func TestPublishedSamplesAreLoose(t *testing.T) {
	image := strings.ReplaceAll(condImage, "@", pcr(t, "a1").String())
	who := func(arn string) string { return `{"AWS":"` + arn + `"}` }
	everything := statement("Allow", who(rootUser), `"kms:*"`, "")
	for name, tc := range map[string]struct {
		statements []string
		leaks      []string // questions that must be among the leaks: "who / shown / action"
	}{
		"what KMS gives a key without a policy: all for the account's root": {
			[]string{everything},
			[]string{
				"another principal of the account / no attestation document / kms:Decrypt",
				"another principal of the account / / kms:CreateGrant",
				"the account's root user / / kms:PutKeyPolicy",
			},
		},
		"enclave developer guide: all for the root, Decrypt for the instance role under a condition on the image": {
			[]string{everything, statement("Allow", who(parent), `"kms:Decrypt"`, image)},
			[]string{
				"another principal of the account / no attestation document / kms:Decrypt",
				"another principal of the account / a debug enclave, PCR0 of zeros / kms:GenerateDataKey",
			},
		},
		"wallet guidance: Create* and administration for the root, GenerateDataKey* and Encrypt for roles, Decrypt with the image": {
			[]string{
				statement("Allow", who(rootUser), `["kms:Create*","kms:Describe*","kms:Enable*","kms:List*","kms:Put*","kms:Update*","kms:Revoke*","kms:Disable*","kms:Get*","kms:Delete*","kms:TagResource","kms:UntagResource","kms:ScheduleKeyDeletion","kms:CancelKeyDeletion"]`, ""),
				statement("Allow", who(stranger), `["kms:Encrypt","kms:GenerateDataKey*"]`, ""),
				statement("Allow", who(parent), `"kms:Decrypt"`, image),
			},
			[]string{
				"another principal of the account / / kms:CreateGrant",
				"another principal of the account / / kms:Encrypt",
				"another principal of the account / no attestation document / kms:GenerateDataKey",
			},
		},
		"attestation workshop: administration for a role, Encrypt open, Decrypt under a condition on PCR0 alone": {
			[]string{
				statement("Allow", who(admin), `["kms:Put*","kms:Describe*"]`, ""),
				statement("Allow", who(parent), `"kms:Encrypt"`, ""),
				statement("Allow", who(parent), `"kms:Decrypt"`, strings.ReplaceAll(image, "ImageSha384", "PCR0")),
			},
			[]string{
				"the parent role / another image / kms:Decrypt", // with any config
				"the parent role / / kms:Encrypt",
			},
		},
		"a Deny of what shows no document, with Null, and all for the root": {
			[]string{
				everything,
				statement("Deny", `"*"`, `"kms:Decrypt"`, `{"Null":{"kms:RecipientAttestation:PCR0":"true"}}`),
			},
			[]string{"another principal of the account / another image / kms:Decrypt"},
		},
		"two lists that multiply": {
			[]string{statement("Allow", who(parent), `"kms:Decrypt"`, `{"StringEqualsIgnoreCase":{`+
				`"kms:RecipientAttestation:PCR0":["`+pcr(t, "a1").String()+`","`+pcr(t, "a2").String()+`"],`+
				`"kms:RecipientAttestation:PCR16":["`+pcr(t, "c1").String()+`","`+pcr(t, "c2").String()+`"]}}`)},
			[]string{" / / "}, // more than two pairs
		},
		"S3's sample: a service may use the key for requests of the account": {
			[]string{statement("Allow", `{"Service":"s3.amazonaws.com"}`, `["kms:Decrypt","kms:GenerateDataKey*"]`,
				`{"StringEquals":{"kms:CallerAccount":"`+account+`"}}`)},
			[]string{"an AWS service / no attestation document / kms:GenerateDataKey"},
		},
		"a key shared with another account": {
			[]string{everything, statement("Allow", who("arn:aws:iam::"+foreign+":root"), `["kms:Encrypt","kms:Decrypt","kms:ReEncrypt*"]`, "")},
			[]string{"another account / no attestation document / kms:Decrypt", "another account / / kms:ReEncryptFrom"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			mine := pair(t, "a1", "c1")
			r, err := keypolicy.Prove([]byte(policyOf(tc.statements...)), keypolicy.Expectation{Account: account, Mine: &mine, Parent: parent})
			if !errors.Is(err, keypolicy.ErrLoose) {
				t.Fatalf("proved: %v", err)
			}
			var leaks []string
			for _, f := range r.Findings {
				if f.Kind == keypolicy.Leak {
					leaks = append(leaks, f.Question.Who+" / "+f.Question.Shown+" / "+f.Question.Action)
				}
			}
			for _, want := range tc.leaks {
				if want = strings.ReplaceAll(want, "/ /", "/  /"); !slices.Contains(leaks, want) {
					t.Errorf("not found: %s\namong:\n%s", want, strings.Join(leaks, "\n"))
				}
			}
			t.Logf("%v", err)
		})
	}
}

// A policy without any Deny lets nobody through today. One Allow more would.
func TestAPolicyThatHoldsOnlyWithoutMistakesIsLoose(t *testing.T) {
	s := specs(t)["two pairs"]
	var allows []string
	for _, st := range build(t, s).Statements() {
		if !st.Deny {
			allows = append(allows, st.Text())
		}
	}
	r, err := keypolicy.Prove([]byte(policyOf(allows...)), keypolicy.Expectation{Account: account})
	if !errors.Is(err, keypolicy.ErrLoose) || r.Findings[0].Kind != keypolicy.Bare {
		t.Fatalf("%v", err)
	}
	for _, f := range r.Findings {
		if f.Kind != keypolicy.Bare || f.Added == "" {
			t.Errorf("%s: %s", f.Kind, f.Text)
		}
	}
}

// The denies hold against Allows that somebody adds, so an enclave goes on; an
// operator is told.
func TestACarelessAllowLetsNobodyThrough(t *testing.T) {
	who := func(arn string) string { return `{"AWS":"` + arn + `"}` }
	additions := map[string]string{
		"grantDecrypt to the parent":        statement("Allow", who(parent), `"kms:Decrypt"`, ""),
		"grantDecrypt to another role":      statement("Allow", who(stranger), `"kms:Decrypt"`, ""),
		"grantEncryptDecrypt":               statement("Allow", who(stranger), `["kms:Decrypt","kms:Encrypt","kms:ReEncrypt*","kms:GenerateDataKey*"]`, ""),
		"all for the root":                  statement("Allow", who(rootUser), `"kms:*"`, ""),
		"De* for everybody":                 statement("Allow", `"*"`, `"kms:De*"`, ""),
		"all for everybody":                 statement("Allow", `{"AWS":"*"}`, `"*"`, ""),
		"a grant for a service":             statement("Allow", `{"Service":"ec2.amazonaws.com"}`, `"kms:CreateGrant"`, ""),
		"another account":                   statement("Allow", who(foreign), `"kms:*"`, ""),
		"administration for the parent":     statement("Allow", who(parent), `["kms:PutKeyPolicy","kms:CreateGrant","kms:ScheduleKeyDeletion"]`, ""),
		"any image of the parent's account": statement("Allow", `"*"`, `"kms:Decrypt"`, `{"StringEquals":{"aws:PrincipalAccount":"`+account+`"}}`),
	}
	for name, s := range specs(t) {
		built := build(t, s)
		for added, text := range additions {
			p := add(t, built, text)
			want := keypolicy.Expectation{Account: account, Mode: s.Mode, Pairs: s.Pairs, Parent: parent, Admins: s.Admins}
			r, err := p.Prove(want)
			if err != nil {
				t.Errorf("%s, %s: %v", name, added, err)
			}
			if len(r.Pairs) != len(s.Pairs) {
				t.Errorf("%s, %s: pairs %v", name, added, r.Pairs)
			}
			want.Exact = true
			if _, err := p.Prove(want); !errors.Is(err, keypolicy.ErrLoose) {
				t.Errorf("%s, %s: an operator is not told: %v", name, added, err)
			}
		}
	}
}

func TestAnEnclaveFindsItselfAmongThePairs(t *testing.T) {
	for name, s := range specs(t) {
		p := build(t, s)
		for i, mine := range s.Pairs {
			r, err := p.Prove(keypolicy.Expectation{Account: account, Mine: &mine})
			if err != nil || !slices.Contains(r.Pairs, mine) {
				t.Errorf("%s, pair %d: %v", name, i, err)
			}
		}
		others := []keypolicy.Pair{pair(t, "a9", "c1"), pair(t, "a1", "c9"), pair(t, "a9", "c9"), {}}
		if name == "two pairs" {
			others = append(others, pair(t, "a1", "c2"), pair(t, "a2", "c1"))
		}
		for _, other := range others {
			r, err := p.Prove(keypolicy.Expectation{Account: account, Mine: &other})
			if !errors.Is(err, keypolicy.ErrNotAdmitted) || errors.Is(err, keypolicy.ErrLoose) || len(r.Pairs) != len(s.Pairs) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

func TestAPolicyOfAnotherAccountIsLoose(t *testing.T) {
	p := build(t, specs(t)["one pair"])
	if _, err := p.Prove(keypolicy.Expectation{Account: foreign}); !errors.Is(err, keypolicy.ErrLoose) {
		t.Error(err)
	}
	if _, err := p.Prove(keypolicy.Expectation{}); !errors.Is(err, keypolicy.ErrRequest) {
		t.Error(err)
	}
	if _, err := (keypolicy.Policy{}).Prove(keypolicy.Expectation{Account: account}); !errors.Is(err, keypolicy.ErrNotUnderstood) {
		t.Error(err)
	}
}

// A finding names the statement by its number in the policy, wherever the Denies stand.
func TestAFindingNamesTheRightStatement(t *testing.T) {
	s := specs(t)["one pair"]
	doc := tree(t, add(t, build(t, s), statement("Allow", `{"AWS":"`+stranger+`"}`, `"kms:Decrypt"`, "")))
	list := doc["Statement"].([]any)
	number := len(list)
	r, err := keypolicy.Prove([]byte(text(t, doc)), s.Expectation())
	if want := fmt.Sprintf("statement %d lets another principal of the account", number); !errors.Is(err, keypolicy.ErrLoose) || !strings.HasPrefix(r.Findings[0].Text, want) {
		t.Errorf("%v, want %s", err, want)
	}
	slices.Reverse(list)
	r, err = keypolicy.Prove([]byte(text(t, doc)), s.Expectation())
	if want := "statement 1 lets another principal of the account"; !errors.Is(err, keypolicy.ErrLoose) || !strings.HasPrefix(r.Findings[0].Text, want) {
		t.Errorf("%v, want %s", err, want)
	}
}
