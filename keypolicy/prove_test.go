package keypolicy_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/keyhold/keyhold/keypolicy"
)

func BenchmarkProve(b *testing.B) {
	for name, s := range specs(b) {
		raw, mine := build(b, s).JSON(), s.Pairs
		want := keypolicy.Expectation{Account: account}
		if len(mine) > 0 {
			want.Mine = &mine[0]
		}
		b.Run(strings.ReplaceAll(name, " ", "_"), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := keypolicy.Prove(raw, want); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func TestEvaluateRefusesARequestThatItDoesNotKnow(t *testing.T) {
	p := build(t, specs(t)["one pair"])
	good := keypolicy.Request{Caller: keypolicy.Caller{ARN: parent}, Action: "kms:Decrypt", Shown: keypolicy.Shown{0: pcr(t, "a1").String()}}
	if d, err := keypolicy.Evaluate(p, good); err != nil || d.Outcome != keypolicy.Denied {
		t.Fatalf("%v, %v", d, err)
	}
	for name, change := range map[string]func(*keypolicy.Request){
		"an unknown action":         func(r *keypolicy.Request) { r.Action = "kms:Melt" },
		"a wildcard":                func(r *keypolicy.Request) { r.Action = "kms:*" },
		"nobody":                    func(r *keypolicy.Request) { r.Caller = keypolicy.Caller{} },
		"a group":                   func(r *keypolicy.Request) { r.Caller.ARN = "arn:aws:iam::" + account + ":group/all" },
		"a session as ARN":          func(r *keypolicy.Request) { r.Caller.ARN = "arn:aws:sts::" + account + ":assumed-role/a/bc" },
		"a session of another":      func(r *keypolicy.Request) { r.Caller.Session = "arn:aws:sts::" + foreign + ":assumed-role/a/bc" },
		"a service and a role":      func(r *keypolicy.Request) { r.Caller.Service = "ec2.amazonaws.com" },
		"no service":                func(r *keypolicy.Request) { r.Caller = keypolicy.Caller{Service: "example.com"} },
		"a short register":          func(r *keypolicy.Request) { r.Shown = keypolicy.Shown{0: "ab"} },
		"a register past the last":  func(r *keypolicy.Request) { r.Shown = keypolicy.Shown{32: pcr(t, "a1").String()} },
		"a register before 0":       func(r *keypolicy.Request) { r.Shown = keypolicy.Shown{-1: pcr(t, "a1").String()} },
		"a register that has blank": func(r *keypolicy.Request) { r.Shown = keypolicy.Shown{0: ""} },
	} {
		r := good
		change(&r)
		if d, err := keypolicy.Evaluate(p, r); !errors.Is(err, keypolicy.ErrRequest) || d.Outcome == keypolicy.Allowed {
			t.Errorf("%s: %v, %v", name, d, err)
		}
	}
	if _, err := keypolicy.Evaluate(keypolicy.Policy{}, good); !errors.Is(err, keypolicy.ErrNotUnderstood) {
		t.Error(err)
	}
}

// What AWS documents of absent keys, operator by operator: a register in a
// request that takes no document, or shows none, is absent.
func TestAnAbsentRegisterFailsWhatIsNotNegated(t *testing.T) {
	value := pcr(t, "a1").String()
	for operator, wants := range map[string][3]bool{ // absent, equal, different
		"StringEquals":              {false, true, false},
		"StringEqualsIgnoreCase":    {false, true, false},
		"StringLike":                {false, true, false},
		"StringNotEquals":           {true, false, true},
		"StringNotEqualsIgnoreCase": {true, false, true},
		"StringNotLike":             {true, false, true},
		"Null true":                 {true, false, false},
		"Null false":                {false, true, true},
	} {
		operator, null, isNull := strings.Cut(operator, " ")
		wanted := value
		if isNull {
			wanted = null
		}
		p := parse(t, policyOf(statement("Allow", `"*"`, `"*"`, `{"`+operator+`":{"kms:RecipientAttestation:PCR4":"`+wanted+`"}}`)))
		for i, shown := range []keypolicy.Shown{{5: value}, {4: strings.ToUpper(value)}, {4: pcr(t, "b1").String()}} {
			for _, a := range keypolicy.Actions() {
				want := wants[i]
				if !a.Attested {
					want = wants[0]
				}
				d, err := keypolicy.Evaluate(p, keypolicy.Request{Caller: keypolicy.Caller{ARN: parent}, Action: a.Name, Shown: shown})
				if err != nil || (d.Outcome == keypolicy.Allowed) != want {
					t.Errorf("%s, %s, %v: %v, %v", operator, a.Name, shown, d.Outcome, err)
				}
			}
		}
	}
}

func TestTheImageDigestIsPCR0(t *testing.T) {
	s := specs(t)["two pairs"]
	p := build(t, s)
	other := parse(t, strings.ReplaceAll(string(p.JSON()), "kms:RecipientAttestation:PCR0", "kms:RecipientAttestation:ImageSha384"))
	if r, err := other.Prove(s.Expectation()); err != nil || len(r.Pairs) != 2 {
		t.Errorf("%v, %v", r.Pairs, err)
	}
}

func TestTheProofSaysWhatLeaksInOneSentence(t *testing.T) {
	built := build(t, specs(t)["one pair"])
	for want, text := range map[string]string{
		"the parent role, showing no attestation document, can kms:Decrypt: statement 1 allows it": policyOf(
			statement("Allow", `{"AWS":"`+parent+`"}`, `"kms:Decrypt"`, "")),
		"another account, showing no attestation document, can kms:GenerateDataKey: statement 1 allows it": policyOf(
			statement("Allow", `{"AWS":"`+foreign+`"}`, `"kms:GenerateDataKey"`, "")),
		"no Deny stands behind": strings.Replace(string(built.JSON()), `"kms:CreateGrant",`, "", 1),
	} {
		_, err := keypolicy.Prove([]byte(text), keypolicy.Expectation{Account: account})
		if !errors.Is(err, keypolicy.ErrLoose) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want it to say %q", err, want)
		}
	}
}

// Sealed means that nobody could change the policy, even after any mistake: for
// which there is no opportunity, since nobody can change the policy.
func TestASealedPolicyCannotBeChangedByAnybody(t *testing.T) {
	sealed := build(t, specs(t)["sealed"])
	for _, a := range []string{"kms:PutKeyPolicy", "kms:CreateGrant", "kms:ReplicateKey", "kms:UpdatePrimaryRegion"} {
		for _, c := range []keypolicy.Caller{{ARN: admin}, {ARN: parent}, {ARN: rootUser}, {ARN: stranger}, {Service: "kms.amazonaws.com"}} {
			d, err := keypolicy.Evaluate(sealed, keypolicy.Request{Caller: c, Action: a})
			if err != nil || d.Outcome != keypolicy.Denied {
				t.Errorf("%+v %s: %v, %v", c, a, d.Outcome, err)
			}
		}
	}
	managed := build(t, specs(t)["one pair"])
	if _, err := managed.Prove(keypolicy.Expectation{Account: account, Mode: keypolicy.Sealed}); !errors.Is(err, keypolicy.ErrLoose) {
		t.Errorf("a managed policy passes for a sealed one: %v", err)
	}
	// Denied to one administrator and not to another is not sealed.
	half := strings.Replace(string(build(t, specs(t)["one pair"]).JSON()), `"kms:PutKeyPolicy",`, "", 1)
	if r, err := keypolicy.Prove([]byte(half), keypolicy.Expectation{Account: account}); err != nil || r.Mode != keypolicy.Managed {
		t.Errorf("%v, %v", r.Mode, err)
	}
	two := strings.Replace(string(build(t, specs(t)["two pairs"]).JSON()), `"kms:CreateGrant",`, `"kms:CreateGrant","kms:PutKeyPolicy",`, 1)
	if _, err := keypolicy.Prove([]byte(two), keypolicy.Expectation{Account: account}); !errors.Is(err, keypolicy.ErrLoose) {
		t.Errorf("sealed with two pairs: %v", err)
	}
}
