package keypolicy

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"slices"
	"strings"
)

// Policy is a key policy of which every part is understood. Parse and Build make
// one; the zero value allows nothing and cannot be proved.
type Policy struct {
	id         string
	statements []Statement
}

// Statement is one rule of a policy. Its Resource is always "*", which in a key
// policy is the key itself.
type Statement struct {
	Sid        string
	Deny       bool
	Principal  Principals
	Actions    []string // as written, sorted; with wildcards
	Conditions []Condition

	covers [64]bool // rows of the table of actions
}

// Condition is one key of a statement's Condition. All of them must hold.
type Condition struct {
	Operator string
	Key      string
	Values   []string // sorted; one must be equal, or with a negated operator none

	kind     keyKind
	register int
}

// keyKind says where a condition finds its value.
type keyKind int

const (
	keyRegister keyKind = iota + 1 // a register of the attestation document
	keyARN                         // aws:PrincipalArn
	keyAccount                     // account of the caller
)

// Statements returns a copy of the rules in their order.
func (p Policy) Statements() []Statement {
	out := slices.Clone(p.statements)
	for i := range out {
		out[i].Principal.AWS = slices.Clone(out[i].Principal.AWS)
		out[i].Principal.Services = slices.Clone(out[i].Principal.Services)
		out[i].Actions = slices.Clone(out[i].Actions)
		out[i].Conditions = slices.Clone(out[i].Conditions)
		for j := range out[i].Conditions {
			out[i].Conditions[j].Values = slices.Clone(out[i].Conditions[j].Values)
		}
	}
	return out
}

// version is the policy language that is understood.
const version = "2012-10-17"

// The elements in the order in which people read them; encoding/json sorts the
// keys of maps.
type document struct {
	Version   string
	ID        string `json:"Id,omitempty"`
	Statement []element
}

type element struct {
	Sid       string `json:",omitempty"`
	Effect    string
	Principal any
	Action    any
	Resource  string
	Condition map[string]map[string]any `json:",omitempty"`
}

// JSON returns the policy in canonical form: elements in a fixed order, lists
// sorted, a list of one as a string, registers in lower case, two spaces of
// indent. What parses has one canonical form, and that parses to itself.
func (p Policy) JSON() []byte {
	doc := document{Version: version, ID: p.id, Statement: make([]element, len(p.statements))}
	for i := range p.statements {
		doc.Statement[i] = p.statements[i].element()
	}
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(doc); err != nil {
		panic("keypolicy: strings and maps of strings do not encode: " + err.Error())
	}
	return out.Bytes()
}

// Hash is the SHA-256 of the canonical form, so that it does not depend on how
// KMS or a person lays the same policy out.
func (p Policy) Hash() [32]byte { return sha256.Sum256(p.JSON()) }

func (s *Statement) element() element {
	e := element{Sid: s.Sid, Effect: "Allow", Action: oneOrMany(s.Actions), Resource: "*"}
	if s.Deny {
		e.Effect = "Deny"
	}
	switch {
	case s.Principal.Everybody:
		e.Principal = "*"
	default:
		who := map[string]any{}
		if len(s.Principal.AWS) > 0 {
			who["AWS"] = oneOrMany(s.Principal.AWS)
		}
		if len(s.Principal.Services) > 0 {
			who["Service"] = oneOrMany(s.Principal.Services)
		}
		e.Principal = who
	}
	for _, c := range s.Conditions {
		if e.Condition == nil {
			e.Condition = map[string]map[string]any{}
		}
		if e.Condition[c.Operator] == nil {
			e.Condition[c.Operator] = map[string]any{}
		}
		e.Condition[c.Operator][c.Key] = oneOrMany(c.Values)
	}
	return e
}

func oneOrMany(list []string) any {
	if len(list) == 1 {
		return list[0]
	}
	return list
}

// Text returns a statement in the canonical form of its own.
func (s *Statement) Text() string {
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(s.element()); err != nil {
		panic("keypolicy: strings and maps of strings do not encode: " + err.Error())
	}
	return strings.TrimSuffix(out.String(), "\n")
}
