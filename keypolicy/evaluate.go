package keypolicy

import (
	"errors"
	"fmt"
	"maps"
	"slices"
)

// ErrRequest says that a request cannot be asked about.
var ErrRequest = errors.New("request is not understood")

// Shown is what an attestation document says: values of registers in lower-case
// hex. A register that is missing is absent from the request; nil is a request
// without a document.
type Shown map[int]string

// Request is one call of KMS on the key.
type Request struct {
	Caller Caller
	Action string // as kms:Decrypt
	Shown  Shown
}

// Outcome of an evaluation.
type Outcome int

// The outcomes. Only Allowed lets the call through.
const (
	NotAllowed Outcome = iota // no statement allows it
	Denied                    // a statement denies it
	Allowed
)

func (o Outcome) String() string {
	return [...]string{"not allowed", "denied", "allowed"}[o]
}

// Decision is the answer to a request.
type Decision struct {
	Outcome   Outcome
	Statement int // index of the one that decided; -1 where none did
}

// Evaluate answers as KMS does with this key policy, if IAM allows everything in
// every account: a Deny that applies decides, else an Allow that applies, else
// the answer is no. Keys of the attestation document are absent from actions that
// take none, and an absent key fails every operator except the negated ones and
// Null.
func Evaluate(p Policy, r Request) (Decision, error) {
	i := actionIndex(r.Action)
	switch {
	case len(p.statements) == 0:
		return Decision{}, unknown("it has no statement")
	case i < 0:
		return Decision{}, fmt.Errorf("%w: KMS has no such action", ErrRequest)
	case !r.Caller.understood():
		return Decision{}, fmt.Errorf("%w: the caller is no role, user, root user or service", ErrRequest)
	}
	shown := Shown{}
	if actions[i].Attested {
		for register, text := range r.Shown {
			v, err := ParsePCR(text)
			if err != nil || register < 0 || register >= registers {
				return Decision{}, fmt.Errorf("%w: PCR%d: %w", ErrRequest, register, ErrPCR)
			}
			shown[register] = v.String()
		}
	}
	var among []int
	for k := range p.statements {
		if s := &p.statements[k]; s.covers[i] && s.about(r.Caller) {
			among = append(among, k)
		}
	}
	return decide(p.statements, among, func(k int) bool { return p.statements[k].fits(shown) }), nil
}

// about reports whether a statement is about the caller.
func (s *Statement) about(c Caller) bool { return s.Principal.name(c, s.Deny) && s.suits(c) }

// suits reports whether the conditions on the caller hold.
func (s *Statement) suits(caller Caller) bool {
	for i := range s.Conditions {
		c := &s.Conditions[i]
		got := ""
		switch c.kind {
		case keyRegister:
			continue
		case keyARN:
			got = caller.ARN
		case keyAccount:
			got = caller.account()
		}
		if caller.Service != "" && (c.kind == keyAccount || c.Operator == operatorNull) {
			// Which account KMS sees behind a service, and whether it sees an ARN, is not
			// documented: an Allow is taken to apply, a Deny not to.
			if s.Deny {
				return false
			}
			continue
		}
		if !c.holds(got) {
			return false
		}
	}
	return true
}

// fits reports whether the conditions on the attestation document hold.
func (s *Statement) fits(shown Shown) bool {
	for i := range s.Conditions {
		if c := &s.Conditions[i]; c.kind == keyRegister && !c.holds(shown[c.register]) {
			return false
		}
	}
	return true
}

// decide looks at the statements that are about a caller and an action, by their
// indexes, and for which fits says that the document fits.
func decide(statements []Statement, among []int, fits func(k int) bool) Decision {
	d := Decision{Outcome: NotAllowed, Statement: -1}
	for _, k := range among {
		switch {
		case !fits(k):
		case statements[k].Deny:
			return Decision{Outcome: Denied, Statement: k}
		case d.Outcome == NotAllowed:
			d = Decision{Outcome: Allowed, Statement: k}
		}
	}
	return d
}

// holds compares with the request's value, "" where it has none.
func (c *Condition) holds(got string) bool {
	if c.Operator == operatorNull {
		return (c.Values[0] == "true") == (got == "")
	}
	op := operators[c.Operator]
	return (got != "" && slices.Contains(c.Values, got)) != op.negated
}

// constants returns the values that the policy compares a register with.
func constants(statements []Statement, register int) map[string]bool {
	found := map[string]bool{}
	for _, s := range statements {
		for _, c := range s.Conditions {
			if c.kind == keyRegister && c.register == register && c.Operator != operatorNull {
				for _, v := range c.Values {
					found[v] = true
				}
			}
		}
	}
	return found
}

// compared returns the registers that the policy looks at, ascending.
func compared(statements []Statement) []int {
	found := map[int]bool{}
	for _, s := range statements {
		for _, c := range s.Conditions {
			if c.kind == keyRegister {
				found[c.register] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(found))
}
