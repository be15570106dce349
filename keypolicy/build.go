package keypolicy

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
)

// Mode says who can change the policy.
type Mode string

// The modes.
const (
	Managed Mode = "managed" // administrators can: the proof is about now, not about history
	Sealed  Mode = "sealed"  // nobody but AWS can, ever: no new image, no new config, no way back
)

// Spec is what a key policy shall say.
type Spec struct {
	Account string // 12 digits; the one that owns the key

	// Pairs are the images and configs that get the key: none before there is
	// one, one, or two while rolling from one to the next. Sealed takes one.
	Pairs []Pair

	Parent   string   // ARN of the role of the parent instances, with whose credentials enclaves ask
	Admins   []string // ARNs of the roles that administer the key, that of deployments among them; at least one
	Creating bool     // GenerateDataKey is open to the pairs: while keyrings are created
	Mode     Mode

	// PCR8 and PCR3, where set, are asked of both pairs: the certificate that
	// signed the image, and the parent's role (ParentPCR3).
	PCR8, PCR3 *PCR
}

const maxPairs = 2

// maxAdmins bounds the policy; key administration is the work of a few.
const maxAdmins = 8

// check joins everything that is wrong with the spec.
func (s *Spec) check() error {
	var bad []error
	add := func(format string, args ...any) { bad = append(bad, fmt.Errorf(format, args...)) }
	if !accountForm.MatchString(s.Account) {
		add("account: want 12 digits")
	}
	if len(s.Pairs) > maxPairs {
		add("pairs: at most two, the current and the next")
	}
	for i, p := range s.Pairs {
		if err := p.check(); err != nil {
			add("pair %d: %w", i+1, err)
		}
		if slices.Contains(s.Pairs[:i], p) {
			add("pair %d: it is given twice", i+1)
		}
	}
	s.checkRoles(add)
	for name, v := range map[string]*PCR{"PCR3": s.PCR3, "PCR8": s.PCR8} {
		if v != nil && v.Zero() {
			add("%s is zero: nothing was measured into it", name)
		}
	}
	switch {
	case s.Mode != Managed && s.Mode != Sealed:
		add("mode: want managed or sealed")
	case s.Mode == Sealed && len(s.Pairs) != 1:
		add("mode sealed: want exactly one pair, which can then never be changed")
	case s.Creating && len(s.Pairs) == 0:
		add("creating: nobody can create a keyring where no pair is admitted")
	}
	return errors.Join(bad...)
}

func (s *Spec) checkRoles(add func(format string, args ...any)) {
	role := func(what, arn string) {
		switch {
		case !isRole(arn):
			add("%s: %w", what, ErrPrincipal)
		case accountOf(arn) != s.Account:
			add("%s: it is not of the account that owns the key", what)
		}
	}
	role("parent role", s.Parent)
	if len(s.Admins) == 0 || len(s.Admins) > maxAdmins {
		add("administrators: want 1 to %d roles", maxAdmins)
	}
	for i, arn := range s.Admins {
		what := fmt.Sprintf("administrator %d", i+1)
		role(what, arn)
		switch {
		case arn == s.Parent:
			add("%s: key administration and key use must be two roles", what)
		case slices.Contains(s.Admins[:i], arn):
			add("%s: it is given twice", what)
		}
	}
}

// Build makes the policy of a spec, and proves it before it gives it away.
//
// It is two locks. The Allows alone let nobody have more than he needs; the Denies
// alone hold back everybody else, whatever Allows are added by mistake.
func Build(s Spec) (Policy, error) {
	if err := s.check(); err != nil {
		return Policy{}, fmt.Errorf("build a key policy: %w", err)
	}
	p := Policy{statements: s.allows()}
	p.statements = append(p.statements, s.denies()...)
	p, err := Parse(p.JSON())
	if err != nil {
		return Policy{}, fmt.Errorf("build a key policy: %w", err)
	}
	if _, err := Prove(p.JSON(), s.Expectation()); err != nil {
		return Policy{}, fmt.Errorf("build a key policy: %w", err)
	}
	return p, nil
}

// administration are the actions of administrators that do not change the policy.
func administration() []string { return named(Administering, Reading) }

// inspection is what the enclave asks about its own lock, as the parent's role.
func inspection() []string { return []string{describeKey, getKeyPolicy, listGrants} }

// release are the actions that give the key to an attested enclave.
func (s *Spec) release() []string {
	if s.Creating {
		return []string{decrypt, generateDataKey}
	}
	return []string{decrypt}
}

// never are the actions that nobody may use.
func (s *Spec) never() []string {
	list := named(Releasing, Moving, Using)
	if s.Mode == Sealed {
		list = append(list, putKeyPolicy)
	}
	if len(s.Pairs) == 0 {
		return list
	}
	return slices.DeleteFunc(list, func(a string) bool { return slices.Contains(s.release(), a) })
}

func (s *Spec) allows() []Statement {
	administer := administration()
	if s.Mode == Managed {
		administer = append(administer, putKeyPolicy)
	}
	out := []Statement{
		{Sid: "AdministerWithoutUse", Principal: roles(s.Admins...), Actions: unique(administer)},
		{Sid: "EnclaveReadsItsOwnLock", Principal: roles(s.Parent), Actions: inspection()},
	}
	for i, p := range s.Pairs {
		out = append(out, Statement{
			Sid: "ReleaseToPair" + strconv.Itoa(i+1), Principal: roles(s.Parent), Actions: s.release(),
			Conditions: append(registersAre("StringEqualsIgnoreCase", p), s.others("StringEqualsIgnoreCase")...),
		})
	}
	return out
}

func (s *Spec) denies() []Statement {
	everybody := Principals{Everybody: true}
	deny := func(sid string, actions []string, conditions ...Condition) Statement {
		return Statement{Sid: sid, Deny: true, Principal: everybody, Actions: unique(actions), Conditions: conditions}
	}
	administer := named(Administering)
	if s.Mode == Managed {
		administer = append(administer, putKeyPolicy)
	}
	out := []Statement{
		deny("NobodyEver", s.never()),
		deny("OnlyAdministratorsAdminister", administer, condition("ArnNotEquals", keyPrincipalARN, s.Admins...)),
	}
	if len(s.Pairs) == 0 {
		return out
	}
	out = append(out, deny("OnlyTheParentRole", s.release(), condition("ArnNotEquals", keyPrincipalARN, s.Parent)))
	for _, c := range s.otherPairs() {
		out = append(out, deny(c.sid, s.release(), c.conditions...))
	}
	for _, c := range s.others("StringNotEqualsIgnoreCase") {
		out = append(out, deny("NoOtherPCR"+strconv.Itoa(c.register), s.release(), c))
	}
	return out
}

type exclusion struct {
	sid        string
	conditions []Condition
}

// otherPairs are the conditions of two Denies that together refuse every
// (PCR0, PCR16) but the pairs.
//
// Where the pairs have a register in common, one Deny for each register does it.
// Two pairs (a, c) and (b, d) with nothing in common must not become the four of
// {a, b} x {c, d}. "Neither image a nor config d" and "neither image b nor config
// c" refuse a with d by the second, b with c by the first, a third image by one
// of them, since no config is c and d, and a third config likewise. Each negated
// comparison holds for an absent register too, so no document is refused as well.
func (s *Spec) otherPairs() []exclusion {
	const differs = "StringNotEqualsIgnoreCase"
	p := s.Pairs
	if len(p) == 2 && p[0].PCR0 != p[1].PCR0 && p[0].PCR16 != p[1].PCR16 {
		return []exclusion{
			{"NoImageButPair1UnlessConfigOfPair2", registersAre(differs, Pair{p[0].PCR0, p[1].PCR16})},
			{"NoImageButPair2UnlessConfigOfPair1", registersAre(differs, Pair{p[1].PCR0, p[0].PCR16})},
		}
	}
	var images, configs []string
	for _, q := range p {
		images, configs = append(images, q.PCR0.String()), append(configs, q.PCR16.String())
	}
	return []exclusion{
		{"NoOtherImage", []Condition{condition(differs, keyPCR+"0", images...)}},
		{"NoOtherConfig", []Condition{condition(differs, keyPCR+"16", configs...)}},
	}
}

// others are the conditions on PCR3 and PCR8, where they are set.
func (s *Spec) others(operator string) []Condition {
	var out []Condition
	for _, r := range []struct {
		register int
		value    *PCR
	}{{3, s.PCR3}, {8, s.PCR8}} {
		if r.value != nil {
			out = append(out, condition(operator, keyPCR+strconv.Itoa(r.register), r.value.String()))
		}
	}
	return out
}

func registersAre(operator string, p Pair) []Condition {
	return []Condition{
		condition(operator, keyPCR+"0", p.PCR0.String()),
		condition(operator, keyPCR+"16", p.PCR16.String()),
	}
}

func condition(operator, key string, values ...string) Condition {
	kind, register, _ := keyOf(key)
	return Condition{Operator: operator, Key: key, Values: unique(values), kind: kind, register: register}
}

func roles(arns ...string) Principals { return Principals{AWS: unique(arns)} }

// Expectation is that of a policy which says exactly what the spec does.
func (s *Spec) Expectation() Expectation {
	creating := s.Creating
	return Expectation{
		Account: s.Account, Exact: true, Pairs: slices.Clone(s.Pairs), Parent: s.Parent, Admins: slices.Clone(s.Admins),
		Mode: s.Mode, Creating: &creating, PCR8: s.PCR8, PCR3: s.PCR3,
	}
}
