package keypolicy_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/keyhold/keyhold/keypolicy"
)

const (
	account  = "111122223333"
	foreign  = "444455556666"
	parent   = "arn:aws:iam::" + account + ":role/keyhold/parent"
	admin    = "arn:aws:iam::" + account + ":role/key-admin"
	deployer = "arn:aws:iam::" + account + ":role/cdk-exec"
	stranger = "arn:aws:iam::" + account + ":role/dashboard"
	rootUser = "arn:aws:iam::" + account + ":root"
)

func pcr(t testing.TB, digits string) keypolicy.PCR {
	t.Helper()
	v, err := keypolicy.ParsePCR(strings.Repeat(digits, 96/len(digits)))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func pair(t testing.TB, image, config string) keypolicy.Pair {
	t.Helper()
	return keypolicy.Pair{PCR0: pcr(t, image), PCR16: pcr(t, config)}
}

// specs are one of each shape that a policy has.
func specs(t testing.TB) map[string]keypolicy.Spec {
	t.Helper()
	signer, role := pcr(t, "e8"), pcr(t, "e3")
	current, next := pair(t, "a1", "c1"), pair(t, "a2", "c2")
	base := keypolicy.Spec{Account: account, Parent: parent, Admins: []string{admin, deployer}, Mode: keypolicy.Managed}
	with := func(change func(*keypolicy.Spec)) keypolicy.Spec {
		s := base
		change(&s)
		return s
	}
	return map[string]keypolicy.Spec{
		"nobody":     base,
		"one pair":   with(func(s *keypolicy.Spec) { s.Pairs = []keypolicy.Pair{current} }),
		"two pairs":  with(func(s *keypolicy.Spec) { s.Pairs = []keypolicy.Pair{current, next} }),
		"new image":  with(func(s *keypolicy.Spec) { s.Pairs = []keypolicy.Pair{current, pair(t, "a2", "c1")} }),
		"new config": with(func(s *keypolicy.Spec) { s.Pairs = []keypolicy.Pair{current, pair(t, "a1", "c2")} }),
		"creating": with(func(s *keypolicy.Spec) {
			s.Pairs, s.Creating = []keypolicy.Pair{current}, true
		}),
		"creating with two pairs": with(func(s *keypolicy.Spec) {
			s.Pairs, s.Creating = []keypolicy.Pair{current, next}, true
		}),
		"signed images and parent role": with(func(s *keypolicy.Spec) {
			s.Pairs, s.PCR8, s.PCR3 = []keypolicy.Pair{current, next}, &signer, &role
		}),
		"sealed": with(func(s *keypolicy.Spec) {
			s.Pairs, s.Mode, s.Admins = []keypolicy.Pair{current}, keypolicy.Sealed, []string{admin}
		}),
		"sealed while creating": with(func(s *keypolicy.Spec) {
			s.Pairs, s.Mode, s.Creating = []keypolicy.Pair{current}, keypolicy.Sealed, true
		}),
	}
}

func build(t testing.TB, s keypolicy.Spec) keypolicy.Policy {
	t.Helper()
	p, err := keypolicy.Build(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func parse(t testing.TB, text string) keypolicy.Policy {
	t.Helper()
	p, err := keypolicy.Parse([]byte(text))
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return p
}

// add puts statements, written as JSON objects, behind those of p.
func add(t testing.TB, p keypolicy.Policy, statements ...string) keypolicy.Policy {
	t.Helper()
	doc := tree(t, p)
	for _, text := range statements {
		var s any
		if err := json.Unmarshal([]byte(text), &s); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		doc["Statement"] = append(doc["Statement"].([]any), s)
	}
	return parse(t, text(t, doc))
}

// tree is a policy as encoding/json sees it: a form that mutants are made of.
func tree(t testing.TB, p keypolicy.Policy) map[string]any {
	t.Helper()
	var doc map[string]any
	if err := json.Unmarshal(p.JSON(), &doc); err != nil {
		t.Fatal(err)
	}
	return doc
}

func text(t testing.TB, doc any) string {
	t.Helper()
	raw, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func statement(effect, principal, action, condition string) string {
	s := `{"Effect":"` + effect + `","Principal":` + principal + `,"Action":` + action + `,"Resource":"*"`
	if condition != "" {
		s += `,"Condition":` + condition
	}
	return s + "}"
}

func policyOf(statements ...string) string {
	return `{"Version":"2012-10-17","Statement":[` + strings.Join(statements, ",") + `]}`
}
