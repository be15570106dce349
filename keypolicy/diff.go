package keypolicy

import (
	"cmp"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Difference is what changes from one policy to another.
type Difference struct {
	Removed []string `json:"removed"` // statements in canonical form
	Added   []string `json:"added"`
	Gains   []Access `json:"gains"` // what somebody can then do that he could not
	Loses   []Access `json:"loses"`
}

// Access is what somebody can do.
type Access struct {
	Who     string   `json:"who"`
	Showing string   `json:"showing,omitempty"` // empty for actions that take no document
	Actions []string `json:"actions"`
}

// Same reports whether the policies have the same statements and let the same
// requests through.
func (d *Difference) Same() bool {
	return len(d.Removed)+len(d.Added)+len(d.Gains)+len(d.Loses) == 0
}

// Diff compares two policies of one account's key by their statements and by what
// they let through. Everybody is taken to have whatever permissions IAM can give.
func Diff(before, after Policy, account string) (Difference, error) {
	u, err := span(slices.Concat(before.statements, after.statements), account, nil, map[int][]string{0: nil, 16: nil})
	if err != nil {
		return Difference{}, err
	}
	var d Difference
	d.Removed, d.Added = without(before, after), without(after, before)
	gains, loses := changes{}, changes{}
	was, will := newTable("", before.statements, u), newTable("", after.statements, u)
	for i := range actions {
		old := map[[2]int]bool{}
		was.each(i, func(c, s int, d Decision) { old[[2]int{c, s}] = d.Outcome == Allowed })
		will.each(i, func(c, s int, d Decision) {
			switch now, before := d.Outcome == Allowed, old[[2]int{c, s}]; {
			case now && !before:
				gains.add(c, i, s)
			case before && !now:
				loses.add(c, i, s)
			}
		})
	}
	d.Gains, d.Loses = gains.access(u, account), loses.access(u, account)
	return d, nil
}

// without returns the statements of p that q has not, each as often as it lacks.
func without(p, q Policy) []string {
	have := map[string]int{}
	for i := range q.statements {
		have[q.statements[i].Text()]++
	}
	out := []string{}
	for i := range p.statements {
		text := p.statements[i].Text()
		if have[text]--; have[text] < 0 {
			out = append(out, text)
		}
	}
	return out
}

// changes are indexes of documents, by index of caller and action.
type changes map[[2]int][]int

func (ch changes) add(caller, action, shown int) {
	k := [2]int{caller, action}
	ch[k] = append(ch[k], shown)
}

// access rolls changes up: actions with the same documents are told together, and
// so are documents that differ in what does not matter.
func (ch changes) access(u *universe, account string) []Access {
	type line struct{ who, showing string }
	byLine, order := map[line][]string{}, []line{}
	for _, k := range slices.SortedFunc(maps.Keys(ch), func(a, b [2]int) int { return cmp.Or(cmp.Compare(a[0], b[0]), cmp.Compare(a[1], b[1])) }) {
		showings := []string{""}
		if actions[k[1]].Attested {
			showings = u.describe(ch[k])
		}
		for _, s := range showings {
			l := line{u.nameOf(u.callers[k[0]], account), s}
			if byLine[l] == nil {
				order = append(order, l)
			}
			byLine[l] = append(byLine[l], actions[k[1]].Name)
		}
	}
	out := []Access{}
	for _, l := range order {
		out = append(out, Access{l.who, l.showing, byLine[l]})
	}
	return out
}

// describe tells documents apart by those registers that matter among them.
func (u *universe) describe(shown []int) []string {
	left := make([]Shown, len(shown))
	for i, s := range shown {
		left[i] = maps.Clone(u.shown[s])
	}
	whole := u.shown
	for _, r := range u.registers {
		narrowed, all := project(left, r), project(whole, r)
		if len(narrowed)*len(whole) == len(left)*len(all) { // each of them stood there with every value of r
			left, whole = narrowed, all
		}
	}
	out := make([]string, len(left))
	for i, s := range left {
		var parts []string
		for _, r := range u.registers {
			if len(project(whole, r)) == len(whole) {
				continue // it does not matter
			}
			parts = append(parts, "PCR"+strconv.Itoa(r)+" "+u.valueName(r, s[r]))
		}
		switch {
		case len(parts) == 0:
			out[i] = "whatever is shown or not"
		case len(s) == 0:
			out[i] = "no attestation document"
		default:
			out[i] = strings.Join(parts, ", ")
		}
	}
	return out
}

// project returns what is left of the documents without a register.
func project(list []Shown, register int) []Shown {
	seen, out := map[string]bool{}, []Shown{}
	for _, s := range list {
		rest := maps.Clone(s)
		delete(rest, register)
		var key strings.Builder
		for _, r := range slices.Sorted(maps.Keys(rest)) {
			key.WriteString(strconv.Itoa(r) + "=" + rest[r] + ";")
		}
		if !seen[key.String()] {
			seen[key.String()] = true
			out = append(out, rest)
		}
	}
	return out
}

func (u *universe) valueName(register int, v string) string {
	switch v {
	case "":
		return "absent"
	case zeros:
		return "of zeros"
	case u.fresh[register]:
		return "of any other value"
	}
	return v
}

func (u *universe) nameOf(c Caller, account string) string {
	switch {
	case slices.Contains(u.strangers, c) && c.Service != "":
		return "any other AWS service"
	case slices.Contains(u.strangers, c) && c.account() == account:
		return "any other principal of the account"
	case slices.Contains(u.strangers, c):
		return "any other principal of account " + c.account()
	case c.account() == u.nowhere:
		return "any other account"
	case c.Service != "":
		return c.Service
	case c.Session != "":
		return c.Session
	}
	return c.ARN
}
