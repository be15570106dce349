package keypolicy

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// ErrNotUnderstood says that a policy has a part whose effect would have to be
// guessed. Such a policy is neither tight nor loose: it is not judged.
var ErrNotUnderstood = errors.New("key policy is not understood")

func unknown(what string) error { return fmt.Errorf("%w: %s", ErrNotUnderstood, what) }

// maxStatements bounds the work that a policy can ask for.
const maxStatements = 64

var sidForm = regexp.MustCompile(`^[ -~]{0,128}$`)

// Parse reads the JSON of a key policy. It refuses whatever is not exactly the
// grammar (ErrMalformed) and whatever Evaluate would have to guess about
// (ErrNotUnderstood): operators and condition keys that it does not know,
// IfExists, set operators, variables, wildcards outside of actions, NotPrincipal,
// NotAction, NotResource, and statements without Principal, Action or Resource.
// Its errors repeat nothing of the text.
func Parse(raw []byte) (Policy, error) {
	v, err := readJSON(raw, maxPolicy)
	if err != nil {
		return Policy{}, err
	}
	return parsePolicy(v)
}

// ParseOutput reads a policy as Parse does, or what aws kms get-key-policy prints
// around one: {"Policy": "..."}, with or without PolicyName.
func ParseOutput(raw []byte) (Policy, error) {
	v, err := readJSON(raw, maxOutput)
	if err != nil {
		return Policy{}, err
	}
	o, ok := v.(object)
	if !ok || o["Policy"] == nil {
		return Parse(raw)
	}
	inner, ok := o["Policy"].(string)
	if !ok {
		return Policy{}, malformed("Policy must be a string that holds JSON")
	}
	for name := range o {
		if name != "Policy" && (name != "PolicyName" || o[name] != "default") {
			return Policy{}, unknown("beside Policy there may only be PolicyName, which is default")
		}
	}
	return Parse([]byte(inner))
}

func parsePolicy(v any) (Policy, error) {
	o, ok := v.(object)
	if !ok {
		return Policy{}, malformed("want an object")
	}
	if err := onlyNames(o, "Version", "Id", "Statement"); err != nil {
		return Policy{}, err
	}
	if o["Version"] != version {
		return Policy{}, unknown("Version must be " + version)
	}
	var p Policy
	if id, given := o["Id"]; given {
		if p.id, ok = id.(string); !ok || p.id == "" || !sidForm.MatchString(p.id) {
			return Policy{}, malformed("Id must be printable ASCII of up to 128 characters")
		}
	}
	list, ok := o["Statement"].([]any)
	if !ok {
		list = []any{o["Statement"]}
	}
	if len(list) == 0 || len(list) > maxStatements {
		return Policy{}, unknown("want 1 to " + strconv.Itoa(maxStatements) + " statements")
	}
	for i, raw := range list {
		s, err := parseStatement(raw)
		if err != nil {
			return Policy{}, fmt.Errorf("statement %d: %w", i+1, err)
		}
		p.statements = append(p.statements, s)
	}
	return p, nil
}

func onlyNames(o object, known ...string) error {
	for name := range o {
		switch {
		case slices.Contains(known, name):
		case strings.HasPrefix(name, "Not"):
			return unknown("an element that negates")
		default:
			return unknown("an element that is none, or in another case")
		}
	}
	return nil
}

func parseStatement(v any) (Statement, error) {
	o, ok := v.(object)
	if !ok {
		return Statement{}, malformed("want an object")
	}
	if err := onlyNames(o, "Sid", "Effect", "Principal", "Action", "Resource", "Condition"); err != nil {
		return Statement{}, err
	}
	for _, name := range []string{"Principal", "Action", "Resource"} {
		if o[name] == nil {
			return Statement{}, unknown("it has no " + name)
		}
	}
	s, err := parseHead(o)
	if err != nil {
		return Statement{}, err
	}
	if s.Principal, err = parsePrincipal(o["Principal"]); err != nil {
		return Statement{}, fmt.Errorf("its Principal: %w", err)
	}
	if s.Actions, s.covers, err = parseActions(o["Action"]); err != nil {
		return Statement{}, fmt.Errorf("its Action: %w", err)
	}
	if resources, err := texts(o["Resource"]); err != nil || len(resources) != 1 || resources[0] != "*" {
		return Statement{}, unknown(`Resource must be "*", which is the key that the policy belongs to`)
	}
	if condition, given := o["Condition"]; given {
		if s.Conditions, err = parseConditions(condition); err != nil {
			return Statement{}, fmt.Errorf("its Condition: %w", err)
		}
	}
	return s, nil
}

// parseHead reads Sid and Effect.
func parseHead(o object) (s Statement, err error) {
	if sid, given := o["Sid"]; given {
		var ok bool
		if s.Sid, ok = sid.(string); !ok || !sidForm.MatchString(s.Sid) {
			return Statement{}, malformed("Sid must be printable ASCII of up to 128 characters")
		}
	}
	switch o["Effect"] {
	case "Allow":
	case "Deny":
		s.Deny = true
	default:
		return Statement{}, malformed("Effect must be Allow or Deny")
	}
	return s, nil
}

func parsePrincipal(v any) (Principals, error) {
	if v == "*" {
		return Principals{Everybody: true}, nil
	}
	o, ok := v.(object)
	if !ok || len(o) == 0 {
		return Principals{}, malformed(`want "*" or an object`)
	}
	var p Principals
	for kind, who := range o {
		list, err := texts(who)
		if err != nil {
			return Principals{}, err
		}
		switch kind {
		case "AWS":
			p.AWS = unique(list)
		case "Service":
			p.Services = unique(list)
		default:
			return Principals{}, unknown("a kind that is neither AWS nor Service")
		}
	}
	if err := p.check(); err != nil {
		return Principals{}, err
	}
	if slices.Contains(p.AWS, "*") {
		return Principals{Everybody: true}, nil
	}
	return p, nil
}

// check refuses names of principals that are not understood.
func (p *Principals) check() error {
	for _, name := range p.Services {
		if !serviceForm.MatchString(name) {
			return unknown("a service that has no name of one")
		}
	}
	forms := []*regexp.Regexp{accountForm, rootForm, roleForm, userForm, sessionForm}
	for _, arn := range p.AWS {
		switch {
		case arn == "*", slices.ContainsFunc(forms, func(f *regexp.Regexp) bool { return f.MatchString(arn) }):
		case idForm.MatchString(arn):
			return unknown("a unique id, which KMS shows in place of a role or user that was deleted")
		default:
			return unknown("an AWS principal that is no account, role, session of a role or user")
		}
	}
	return nil
}

func parseActions(v any) ([]string, [64]bool, error) {
	var covers [64]bool
	list, err := texts(v)
	if err != nil {
		return nil, covers, err
	}
	for _, text := range list {
		rows, some := covered(text)
		if !some {
			return nil, covers, unknown("an action that KMS does not have, or did not have when this table was made")
		}
		for i, yes := range rows {
			covers[i] = covers[i] || yes
		}
	}
	return unique(list), covers, nil
}

func parseConditions(v any) ([]Condition, error) {
	byOperator, ok := v.(object)
	if !ok {
		return nil, malformed("want an object")
	}
	var out []Condition
	for _, operator := range slices.Sorted(maps.Keys(byOperator)) {
		byKey, ok := byOperator[operator].(object)
		if !ok || len(byKey) == 0 {
			return nil, malformed("want an object of keys under each operator")
		}
		for _, key := range slices.Sorted(maps.Keys(byKey)) {
			c, err := parseCondition(operator, key, byKey[key])
			if err != nil {
				return nil, err
			}
			out = append(out, c)
		}
	}
	return out, nil
}

// operators are those understood: without wildcards, Like compares as Equals does.
var operators = map[string]struct{ arn, anyCase, negated bool }{
	"StringEquals":              {},
	"StringNotEquals":           {negated: true},
	"StringEqualsIgnoreCase":    {anyCase: true},
	"StringNotEqualsIgnoreCase": {anyCase: true, negated: true},
	"StringLike":                {},
	"StringNotLike":             {negated: true},
	"ArnEquals":                 {arn: true},
	"ArnNotEquals":              {arn: true, negated: true},
	"ArnLike":                   {arn: true},
	"ArnNotLike":                {arn: true, negated: true},
}

const operatorNull = "Null"

// The condition keys that are understood, besides kms:RecipientAttestation:PCR0 to PCR31.
const (
	keyImage            = "kms:RecipientAttestation:ImageSha384" // the same as PCR0
	keyPCR              = "kms:RecipientAttestation:PCR"
	keyPrincipalARN     = "aws:PrincipalArn"
	keyPrincipalAccount = "aws:PrincipalAccount"
	keyCallerAccount    = "kms:CallerAccount"
)

const registers = 32 // PCR0 to PCR31

func keyOf(name string) (kind keyKind, register int, ok bool) {
	switch name {
	case keyImage:
		return keyRegister, 0, true
	case keyPrincipalARN:
		return keyARN, 0, true
	case keyPrincipalAccount, keyCallerAccount:
		return keyAccount, 0, true
	}
	digits, ok := strings.CutPrefix(name, keyPCR)
	n, err := strconv.Atoi(digits)
	if !ok || err != nil || n < 0 || n >= registers || strconv.Itoa(n) != digits {
		return 0, 0, false
	}
	return keyRegister, n, true
}

func parseCondition(operator, key string, v any) (Condition, error) {
	op, known := operators[operator]
	if !known && operator != operatorNull {
		return Condition{}, unknown("an operator that is not known here")
	}
	c := Condition{Operator: operator, Key: key}
	if c.kind, c.register, known = keyOf(key); !known {
		return Condition{}, unknown("a condition key that is not known here")
	}
	if operator == operatorNull {
		switch v {
		case "true", true:
			c.Values = []string{"true"}
		case "false", false:
			c.Values = []string{"false"}
		default:
			return Condition{}, malformed("Null takes true or false")
		}
		return c, nil
	}
	values, err := texts(v)
	if err != nil {
		return Condition{}, err
	}
	if op.arn != (c.kind == keyARN) && (op.arn || op.anyCase) {
		return Condition{}, unknown("an operator that does not fit its key")
	}
	for i, value := range values {
		if values[i], err = c.value(value, op.anyCase); err != nil {
			return Condition{}, err
		}
	}
	c.Values = unique(values)
	return c, nil
}

// value checks one value and brings it into the form in which it is compared.
func (c *Condition) value(text string, anyCase bool) (string, error) {
	switch c.kind {
	case keyRegister:
		v, err := ParsePCR(text)
		if err != nil || !anyCase && v.String() != text {
			return "", unknown("a register's value that is not 96 hex digits, or not in lower case where case counts")
		}
		return v.String(), nil
	case keyAccount:
		if accountForm.MatchString(text) {
			return text, nil
		}
	case keyARN:
		if roleForm.MatchString(text) || userForm.MatchString(text) || rootForm.MatchString(text) {
			return text, nil
		}
	}
	return "", unknown("a value that is not understood, such as a wildcard or a variable")
}

// unique returns the list sorted and without repetitions.
func unique(list []string) []string {
	out := slices.Clone(list)
	slices.Sort(out)
	return slices.Compact(out)
}
