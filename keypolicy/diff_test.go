package keypolicy_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/keypolicy"
)

func diff(t *testing.T, before, after keypolicy.Policy) keypolicy.Difference {
	t.Helper()
	d, err := keypolicy.Diff(before, after, account)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// The three deploys of a roll, each with what it gives and takes.
func TestARollToANewImageChangesOnlyWhoIsLetThrough(t *testing.T) {
	current := specs(t)["one pair"]
	both, next := current, current
	both.Pairs = []keypolicy.Pair{pair(t, "a1", "c1"), pair(t, "a2", "c2")}
	next.Pairs = []keypolicy.Pair{pair(t, "a2", "c2")}
	showing := func(p keypolicy.Pair) []keypolicy.Access {
		return []keypolicy.Access{{Who: parent, Showing: "PCR0 " + p.PCR0.String() + ", PCR16 " + p.PCR16.String(), Actions: []string{"kms:Decrypt"}}}
	}
	admit := diff(t, build(t, current), build(t, both))
	if d := cmp.Diff(showing(next.Pairs[0]), admit.Gains); d != "" || len(admit.Loses) != 0 {
		t.Errorf("%s\nloses %v", d, admit.Loses)
	}
	if len(admit.Removed) != 2 || len(admit.Added) != 3 {
		t.Errorf("removed %d, added %d", len(admit.Removed), len(admit.Added))
	}
	retire := diff(t, build(t, both), build(t, next))
	if d := cmp.Diff(showing(current.Pairs[0]), retire.Loses); d != "" || len(retire.Gains) != 0 {
		t.Errorf("%s\ngains %v", d, retire.Gains)
	}
}

func TestTheSamePolicyHasNoDifference(t *testing.T) {
	for name, s := range specs(t) {
		d := diff(t, build(t, s), build(t, s))
		if !d.Same() {
			t.Errorf("%s: %+v", name, d)
		}
	}
	reordered := specs(t)["one pair"]
	p := tree(t, build(t, reordered))
	slices.Reverse(p["Statement"].([]any))
	if d := diff(t, build(t, reordered), parse(t, text(t, p))); !d.Same() {
		t.Errorf("in another order: %+v", d)
	}
}

func TestADifferenceTellsWhoGainsWhat(t *testing.T) {
	base := `{"AWS":"` + admin + `"}`
	before := parse(t, policyOf(statement("Allow", base, `"kms:DescribeKey"`, "")))
	for name, tc := range map[string]struct {
		added string
		want  []keypolicy.Access
	}{
		"a role without conditions": {
			statement("Allow", `{"AWS":"`+parent+`"}`, `["kms:Decrypt","kms:Encrypt"]`, ""),
			[]keypolicy.Access{{parent, "whatever is shown or not", []string{"kms:Decrypt"}}, {parent, "", []string{"kms:Encrypt"}}},
		},
		"a service": {
			statement("Allow", `{"Service":"s3.amazonaws.com"}`, `"kms:CreateGrant"`, ""),
			[]keypolicy.Access{{"s3.amazonaws.com", "", []string{"kms:CreateGrant"}}},
		},
		"a session": {
			statement("Allow", `{"AWS":"arn:aws:sts::`+account+`:assumed-role/a/bcd"}`, `"kms:Sign"`, ""),
			[]keypolicy.Access{{"arn:aws:sts::" + account + ":assumed-role/a/bcd", "", []string{"kms:Sign"}}},
		},
		"one register": {
			statement("Allow", `{"AWS":"`+parent+`"}`, `"kms:Decrypt"`, `{"StringEquals":{"kms:RecipientAttestation:PCR8":"`+pcr(t, "e8").String()+`"}}`),
			[]keypolicy.Access{{parent, "PCR8 " + pcr(t, "e8").String(), []string{"kms:Decrypt"}}},
		},
	} {
		d := diff(t, before, add(t, before, tc.added))
		if diff := cmp.Diff(tc.want, d.Gains); diff != "" || len(d.Loses) > 0 || len(d.Added) != 1 {
			t.Errorf("%s: %s\n%+v", name, diff, d)
		}
	}
	all := diff(t, before, add(t, before, statement("Allow", `"*"`, `"kms:Decrypt"`, "")))
	var who []string
	for _, g := range all.Gains {
		who = append(who, g.Who)
	}
	want := []string{"any other account", rootUser, "any other principal of the account", admin, "any other AWS service"}
	slices.Sort(who)
	who = slices.Compact(who)
	slices.Sort(want)
	if diff := cmp.Diff(want, who); diff != "" {
		t.Error(diff)
	}
	if _, err := keypolicy.Diff(before, parse(t, tooMuch(t)), account); err == nil {
		t.Error("compared what is too much to go through")
	}
}

func tooMuch(t *testing.T) string {
	t.Helper()
	var registers []string
	for i := range 10 {
		registers = append(registers, `"kms:RecipientAttestation:PCR`+string(rune('0'+i))+`":"`+pcr(t, "ab").String()+`"`)
	}
	return policyOf(statement("Allow", `"*"`, `"kms:Decrypt"`, `{"StringEquals":{`+strings.Join(registers, ",")+`}}`))
}
