package keypolicy_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/keyhold/keyhold/keypolicy"
)

// mutant is a policy with one thing changed.
type mutant struct {
	name string
	text string
}

// mutants makes, of every part of a policy in turn: every statement dropped and
// turned round; every action, condition, condition key and value dropped; every
// value changed; every operator negated or given IfExists; every principal widened
// to each wider one, every principal narrowed, one taken from a list and one added;
// every action widened to a wildcard; and every pair of condition lists made into
// one that multiplies.
func mutants(t testing.TB, p keypolicy.Policy) []mutant {
	t.Helper()
	var out []mutant
	n := len(tree(t, p)["Statement"].([]any))
	for i := range n {
		sid := fmt.Sprint(at(tree(t, p), i)["Sid"])
		add := func(name string, change func(s map[string]any)) {
			doc := tree(t, p)
			change(at(doc, i))
			out = append(out, mutant{sid + ": " + name, text(t, doc)})
		}
		doc := tree(t, p)
		doc["Statement"] = slices.Delete(doc["Statement"].([]any), i, i+1)
		out = append(out, mutant{sid + ": dropped", text(t, doc)})
		add("turned round", func(s map[string]any) {
			s["Effect"] = map[string]string{"Allow": "Deny", "Deny": "Allow"}[s["Effect"].(string)]
		})
		s := at(tree(t, p), i)
		for k, action := range list(s["Action"]) {
			if len(list(s["Action"])) > 1 {
				add("without "+action, func(s map[string]any) { s["Action"] = slices.Delete(list(s["Action"]), k, k+1) })
			}
			if s["Effect"] == "Allow" {
				for _, wider := range []string{"*", "kms:*", action + "*"} {
					if action+"*" == wider && !meansMore(action, list(s["Action"])) {
						continue
					}
					add(action+" widened to "+wider, func(s map[string]any) { l := list(s["Action"]); l[k] = wider; s["Action"] = l })
				}
			}
		}
		mutatePrincipals(s, add)
		mutateConditions(s, add)
	}
	return out
}

// meansMore reports whether an action with a star behind it covers one that is not
// in the list anyway.
func meansMore(action string, all []string) bool {
	for _, a := range keypolicy.Actions() {
		if strings.HasPrefix(a.Name, action) && !slices.Contains(all, a.Name) {
			return true
		}
	}
	return false
}

func mutatePrincipals(s map[string]any, add func(string, func(map[string]any))) {
	if s["Effect"] == "Deny" {
		narrow := []any{
			map[string]any{"AWS": account},
			map[string]any{"AWS": rootUser},
			map[string]any{"AWS": admin},
			map[string]any{"AWS": []string{admin, stranger}},
			map[string]any{"Service": "dynamodb.amazonaws.com"},
		}
		if !strings.HasPrefix(s["Sid"].(string), "NoOther") && !strings.HasPrefix(s["Sid"].(string), "NoImage") {
			// About documents a Deny for the parent would do, since OnlyTheParentRole refuses all others.
			narrow = append(narrow, map[string]any{"AWS": parent}, map[string]any{"AWS": []string{parent, admin, stranger}})
		}
		for _, narrower := range narrow {
			add(fmt.Sprint("narrowed to ", narrower), func(s map[string]any) { s["Principal"] = narrower })
		}
		return
	}
	for _, wider := range []any{
		"*", map[string]any{"AWS": "*"}, map[string]any{"AWS": account}, map[string]any{"AWS": rootUser},
	} {
		add(fmt.Sprint("widened to ", wider), func(s map[string]any) { s["Principal"] = wider })
	}
	who := list(s["Principal"].(map[string]any)["AWS"])
	for _, more := range []any{stranger, foreign, "arn:aws:iam::" + account + ":user/joe", "arn:aws:sts::" + account + ":assumed-role/dashboard/someone"} {
		add(fmt.Sprint("also for ", more), func(s map[string]any) {
			s["Principal"] = map[string]any{"AWS": append(slices.Clone(who), more.(string))}
		})
	}
	add("also for a service", func(s map[string]any) {
		s["Principal"].(map[string]any)["Service"] = "dynamodb.amazonaws.com"
	})
	for k := range who {
		add("for the parent's stranger instead of "+who[k], func(s map[string]any) {
			w := slices.Clone(who)
			w[k] = stranger
			s["Principal"] = map[string]any{"AWS": w}
		})
		if len(who) > 1 {
			add("not for "+who[k], func(s map[string]any) {
				s["Principal"] = map[string]any{"AWS": slices.Delete(slices.Clone(who), k, k+1)}
			})
		}
	}
}

func mutateConditions(s map[string]any, add func(string, func(map[string]any))) {
	conditions, _ := s["Condition"].(map[string]any)
	if conditions == nil {
		return
	}
	add("without conditions", func(s map[string]any) { delete(s, "Condition") })
	for op, keys := range conditions {
		of := func(s map[string]any) map[string]any {
			return s["Condition"].(map[string]any)[op].(map[string]any)
		}
		for _, other := range []string{op + "IfExists", "ForAnyValue:" + op, "ForAllValues:" + op, negate(op), "Null"} {
			add(op+" to "+other, func(s map[string]any) {
				c := s["Condition"].(map[string]any)
				c[other] = c[op]
				if other == "Null" {
					absent := map[string]any{}
					for key := range of(s) {
						absent[key] = "true"
					}
					c[other] = absent
				}
				delete(c, op)
			})
		}
		for key, values := range keys.(map[string]any) {
			if len(keys.(map[string]any)) > 1 {
				add("without "+op+" "+key, func(s map[string]any) { delete(of(s), key) })
			}
			for k, value := range list(values) {
				add("another value of "+key, func(s map[string]any) {
					l := list(values)
					l[k] = another(value)
					of(s)[key] = l
				})
				add("zeros for "+key, func(s map[string]any) {
					l := list(values)
					l[k] = strings.Repeat("0", 96)
					of(s)[key] = l
				})
				if len(list(values)) > 1 {
					add("without a value of "+key, func(s map[string]any) { of(s)[key] = slices.Delete(list(values), k, k+1) })
				}
			}
			add("one value more of "+key, func(s map[string]any) { of(s)[key] = append(list(values), another(list(values)[0])) })
		}
	}
}

func another(value string) string {
	if strings.HasPrefix(value, "arn:") {
		return stranger
	}
	return strings.Repeat("77", 48)
}

func negate(op string) string {
	if strings.Contains(op, "Not") {
		return strings.Replace(op, "Not", "", 1)
	}
	return strings.Replace(op, "Equals", "NotEquals", 1)
}

func at(doc map[string]any, i int) map[string]any {
	return doc["Statement"].([]any)[i].(map[string]any)
}

func list(v any) []string {
	switch x := v.(type) {
	case string:
		return []string{x}
	case []string:
		return slices.Clone(x)
	case []any:
		out := make([]string, len(x))
		for i := range x {
			out[i] = x[i].(string)
		}
		return out
	}
	return nil
}

// TestNoPartOfAPolicyCanBeChangedUnnoticed changes a policy in every way of
// mutants. The proof must refuse each. What it would miss carries no weight.
func TestNoPartOfAPolicyCanBeChangedUnnoticed(t *testing.T) {
	total := map[string]int{}
	for name, s := range specs(t) {
		t.Run(name, func(t *testing.T) {
			p := build(t, s)
			for _, m := range mutants(t, p) {
				r, err := keypolicy.Prove([]byte(m.text), s.Expectation())
				switch {
				case errors.Is(err, keypolicy.ErrNotUnderstood):
					total["not understood"]++
				case errors.Is(err, keypolicy.ErrLoose):
					total[r.Findings[0].Kind.String()]++
				case err == nil:
					t.Errorf("survived: %s\n%s", m.name, indent(m.text))
				default:
					t.Errorf("%s: %v", m.name, err)
				}
			}
		})
	}
	sum := 0
	for _, n := range total {
		sum += n
	}
	t.Logf("%d mutants, first found as %v", sum, total)
}

func indent(text string) string {
	var v any
	if json.Unmarshal([]byte(text), &v) != nil {
		return text
	}
	out, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		return text
	}
	return string(out)
}
