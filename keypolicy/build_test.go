package keypolicy_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/keypolicy"
)

func TestWhatIsBuiltSaysWhatWasAskedFor(t *testing.T) {
	for name, s := range specs(t) {
		t.Run(name, func(t *testing.T) {
			p := build(t, s)
			r, err := p.Prove(s.Expectation())
			if err != nil {
				t.Fatalf("%v\n%s", err, p.JSON())
			}
			want := keypolicy.Result{Hash: p.Hash(), Mode: s.Mode, Pairs: s.Pairs, Parent: parent, Admins: s.Admins, Creating: s.Creating}
			got := r
			got.Questions, got.Findings, got.Requests = nil, nil, 0
			if len(got.Pairs) == 0 {
				got.Pairs = nil
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
			t.Logf("%d statements, %d bytes, %d questions, %d requests", len(p.Statements()), len(p.JSON()), len(r.Questions), r.Requests)
		})
	}
}

// What an operator's tool reads without being told anything is what was built.
func TestTheSpecIsReadFromThePolicyAlone(t *testing.T) {
	for name, s := range specs(t) {
		t.Run(name, func(t *testing.T) {
			r, err := build(t, s).Prove(keypolicy.Expectation{Account: account, Exact: true})
			if err != nil {
				t.Fatal(err)
			}
			if r.Parent != parent || r.Mode != s.Mode || r.Creating != s.Creating || len(r.Pairs) != len(s.Pairs) {
				t.Errorf("read %+v", r)
			}
		})
	}
}

func TestTheSameSpecGivesTheSameBytes(t *testing.T) {
	for name, s := range specs(t) {
		first := string(build(t, s).JSON())
		for range 5 {
			if again := string(build(t, s).JSON()); again != first {
				t.Fatalf("%s: %s", name, cmp.Diff(first, again))
			}
		}
	}
}

func TestASpecThatWouldBeLooseIsRefused(t *testing.T) {
	zero := keypolicy.PCR{}
	for name, tc := range map[string]struct {
		change func(*keypolicy.Spec)
		want   string
	}{
		"zero PCR0":           {func(s *keypolicy.Spec) { s.Pairs[0].PCR0 = zero }, "PCR0 is zero"},
		"zero PCR16":          {func(s *keypolicy.Spec) { s.Pairs[0].PCR16 = zero }, "PCR16 is zero"},
		"zero PCR8":           {func(s *keypolicy.Spec) { s.PCR8 = &zero }, "PCR8 is zero"},
		"zero PCR3":           {func(s *keypolicy.Spec) { s.PCR3 = &zero }, "PCR3 is zero"},
		"the same pair twice": {func(s *keypolicy.Spec) { s.Pairs = append(s.Pairs, s.Pairs[0]) }, "given twice"},
		"three pairs": {func(s *keypolicy.Spec) {
			s.Pairs = append(s.Pairs, pair(t, "a2", "c2"), pair(t, "a3", "c3"))
		}, "at most two"},
		"no account":          {func(s *keypolicy.Spec) { s.Account = "" }, "12 digits"},
		"no parent":           {func(s *keypolicy.Spec) { s.Parent = "" }, "parent role"},
		"a user as parent":    {func(s *keypolicy.Spec) { s.Parent = "arn:aws:iam::" + account + ":user/joe" }, "parent role"},
		"the root as parent":  {func(s *keypolicy.Spec) { s.Parent = rootUser }, "parent role"},
		"a parent of others":  {func(s *keypolicy.Spec) { s.Parent = strings.Replace(parent, account, foreign, 1) }, "not of the account"},
		"a wildcard":          {func(s *keypolicy.Spec) { s.Parent = "arn:aws:iam::" + account + ":role/*" }, "parent role"},
		"no administrator":    {func(s *keypolicy.Spec) { s.Admins = nil }, "administrators"},
		"many administrators": {func(s *keypolicy.Spec) { s.Admins = make([]string, 9) }, "administrators"},
		"the root administers": {func(s *keypolicy.Spec) {
			s.Admins = []string{rootUser}
		}, "administrator 1"},
		"one role for both":    {func(s *keypolicy.Spec) { s.Admins = append(s.Admins, parent) }, "two roles"},
		"an admin twice":       {func(s *keypolicy.Spec) { s.Admins = append(s.Admins, admin) }, "given twice"},
		"no mode":              {func(s *keypolicy.Spec) { s.Mode = "" }, "mode"},
		"an unknown mode":      {func(s *keypolicy.Spec) { s.Mode = "open" }, "mode"},
		"sealed to nobody":     {func(s *keypolicy.Spec) { s.Mode, s.Pairs = keypolicy.Sealed, nil }, "exactly one pair"},
		"sealed to two":        {func(s *keypolicy.Spec) { s.Mode, s.Pairs = keypolicy.Sealed, append(s.Pairs, pair(t, "a2", "c2")) }, "exactly one pair"},
		"creating for nobody":  {func(s *keypolicy.Spec) { s.Creating, s.Pairs = true, nil }, "nobody can create"},
		"a role with new line": {func(s *keypolicy.Spec) { s.Parent += "\n" }, "parent role"},
	} {
		t.Run(name, func(t *testing.T) {
			s := specs(t)["one pair"]
			s.Pairs = append([]keypolicy.Pair{}, s.Pairs...)
			s.Admins = append([]string{}, s.Admins...)
			tc.change(&s)
			_, err := keypolicy.Build(s)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want it to say %q", err, tc.want)
			}
		})
	}
}

func TestAllFaultsOfASpecAreNamedAtOnce(t *testing.T) {
	_, err := keypolicy.Build(keypolicy.Spec{Account: "x", Pairs: make([]keypolicy.Pair, 1)})
	for _, want := range []string{"12 digits", "PCR0 is zero", "parent role", "administrators", "mode"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want it to say %q", err, want)
		}
	}
}

func TestARegisterHas96HexDigits(t *testing.T) {
	good := strings.Repeat("aF", 48)
	v, err := keypolicy.ParsePCR(good)
	if err != nil || v.String() != strings.ToLower(good) {
		t.Errorf("%v, %v", v, err)
	}
	for name, text := range map[string]string{
		"nothing": "", "short": good[2:], "long": good + "aa", "no hex": "g" + good[1:], "spaces": " " + good[1:], "0x": "0x" + good[2:],
	} {
		if _, err := keypolicy.ParsePCR(text); !errors.Is(err, keypolicy.ErrPCR) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Computed with another language's library: SHA-384 of 48 zero bytes and the ARN.
func TestPCR3IsThatOfTheParentsRole(t *testing.T) {
	v, err := keypolicy.ParentPCR3(parent)
	if err != nil {
		t.Fatal(err)
	}
	if want := "b64f23b6bedc066173f5b78ce600510b7af8861d8ba8c39021c1bdff815cef3c12c61dda9037fa960d7436fe4c387eb5"; v.String() != want {
		t.Errorf("PCR3 is %s, want %s", v, want)
	}
	if _, err := keypolicy.ParentPCR3(rootUser); !errors.Is(err, keypolicy.ErrPrincipal) {
		t.Errorf("the root user has no role: %v", err)
	}
}
