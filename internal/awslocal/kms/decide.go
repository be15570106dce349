package kms

import "strings"

// access is what a policy is asked.
type access struct {
	principal string // ARN
	action    string // as kms:Decrypt
	context   map[string]string
}

// decision is the outcome of a policy, in the words of AWS's error messages.
type decision string

const (
	allowed      decision = ""
	implicitDeny decision = "because no resource-based policy allows the action"
	explicitDeny decision = "with an explicit deny in a resource-based policy"
)

// operators compare one wanted value with the one of the request. A name with
// Not is satisfied when no wanted value compares equal, or the key is absent.
var operators = map[string]func(want, got string) bool{
	"StringEquals":              equal,
	"StringNotEquals":           equal,
	"StringEqualsIgnoreCase":    strings.EqualFold,
	"StringNotEqualsIgnoreCase": strings.EqualFold,
	"StringLike":                glob,
	"StringNotLike":             glob,
	"ArnEquals":                 arnLike,
	"ArnNotEquals":              arnLike,
	"ArnLike":                   arnLike,
	"ArnNotLike":                arnLike,
}

func equal(want, got string) bool { return want == got }

func (p keyPolicy) decide(a access) decision {
	result := implicitDeny
	for _, st := range p.statements {
		if !st.matches(a) {
			continue
		}
		if st.deny {
			return explicitDeny
		}
		result = allowed
	}
	return result
}

func (st statement) matches(a access) bool {
	return st.names(a.principal) && st.covers(a.action) && st.holds(a.context)
}

// names reports whether the statement is about the principal. Naming the
// account denies everybody in it; to allow others it would need identity
// policies, of which there are none here.
func (st statement) names(principal string) bool {
	for _, p := range st.principals {
		if p == "*" || p == principal || st.deny && p == "arn:aws:iam::"+accountOf(principal)+":root" {
			return true
		}
	}
	return false
}

func (st statement) covers(action string) bool {
	for _, pattern := range st.actions {
		if glob(pattern, strings.ToLower(action)) {
			return true
		}
	}
	return false
}

func (st statement) holds(context map[string]string) bool {
	for _, c := range st.conditions {
		if !c.holds(context) {
			return false
		}
	}
	return true
}

func (c condition) holds(context map[string]string) bool {
	got, present := context[c.key]
	if c.operator == "Null" {
		return (c.values[0] == "true") == !present
	}
	negated := strings.Contains(c.operator, "Not")
	if !present {
		return negated
	}
	for _, want := range c.values {
		if operators[c.operator](want, got) {
			return !negated
		}
	}
	return negated
}

// glob matches with * for any run and ? for one byte, in time that is the
// product of the lengths.
func glob(pattern, text string) bool {
	p, t := 0, 0
	star, mark := -1, 0
	for t < len(text) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, mark = p, t
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == text[t]):
			p++
			t++
		case star >= 0:
			mark++
			p, t = star+1, mark
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}

// arnLike matches the six parts of an ARN each on its own, so that a wildcard
// never reaches over a colon of the first five.
func arnLike(pattern, arn string) bool {
	want, got := strings.SplitN(pattern, ":", 6), strings.SplitN(arn, ":", 6)
	if len(want) != 6 || len(got) != 6 {
		return false
	}
	for i := range want {
		if !glob(want[i], got[i]) {
			return false
		}
	}
	return true
}

func accountOf(arn string) string {
	if fields := strings.SplitN(arn, ":", 6); len(fields) == 6 {
		return fields[4]
	}
	return ""
}
