package keypolicy

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// universe is a finite set of callers and documents such that every request is
// answered as one from the set is. Principals and conditions are compared with
// constants for equality and in no other way, since Parse refuses wildcards
// there. So a caller, or the value of a register, is either one of the constants,
// or it is like any other that is not.
type universe struct {
	callers   []Caller
	shown     []Shown // the first one is empty
	registers []int

	strangers []Caller       // those of callers that stand for all that are not named
	nowhere   string         // account that stands for all that are not named
	fresh     map[int]string // value of a register that stands for all that are not named
}

// Bounds of the work for a policy that names very much. Two pairs with PCR3 and
// PCR8 come to 13 callers and 400 documents.
const (
	maxCallers  = 256
	maxRequests = 1 << 16 // callers times documents
)

var errTooMuch = unknown("it names more principals and registers than can be gone through")

// zeros is PCR0 of a debug enclave.
var zeros = PCR{}.String()

// span makes the universe of some statements, with more constants where given.
func span(statements []Statement, account string, arns []string, more map[int][]string) (*universe, error) {
	u := callersOf(statements, account, arns)
	if len(u.callers) > maxCallers {
		return nil, errTooMuch
	}
	u.fresh = map[int]string{}
	u.registers = ascending(append(compared(statements), slices.Collect(maps.Keys(more))...))
	u.shown = []Shown{{}}
	for _, r := range u.registers {
		known := constants(statements, r)
		for _, v := range more[r] {
			known[v] = true
		}
		u.fresh[r] = freshPCR(known)
		values := []string{"", zeros, u.fresh[r]}
		for _, v := range slices.Sorted(maps.Keys(known)) {
			if v != zeros {
				values = append(values, v)
			}
		}
		if len(u.shown)*len(values)*len(u.callers) > maxRequests {
			return nil, errTooMuch
		}
		var next []Shown
		for _, s := range u.shown {
			for _, v := range values {
				with := maps.Clone(s)
				if v != "" {
					with[r] = v
				}
				next = append(next, with)
			}
		}
		u.shown = next
	}
	return u, nil
}

func ascending(list []int) []int {
	slices.Sort(list)
	return slices.Compact(list)
}

// callersOf returns every principal that is named anywhere, and for each account
// its root user and a role that is not named; an account that is not named; and a
// service that is not.
func callersOf(statements []Statement, account string, arns []string) *universe {
	names, services := slices.Clone(arns), []string{}
	for _, s := range statements {
		names = append(names, s.Principal.AWS...)
		services = append(services, s.Principal.Services...)
		for _, c := range s.Conditions {
			if c.kind != keyRegister && c.Operator != operatorNull {
				names = append(names, c.Values...)
			}
		}
	}
	names, services = unique(names), unique(services)
	accounts := []string{account}
	for _, n := range names {
		if accountForm.MatchString(n) {
			accounts = append(accounts, n)
		} else {
			accounts = append(accounts, accountOf(n))
		}
	}
	u := &universe{nowhere: freshAccount(accounts)}
	for _, a := range unique(append(accounts, u.nowhere)) {
		u.callers = append(u.callers, Caller{ARN: "arn:aws:iam::" + a + ":root"}, Caller{ARN: freshRole(a, names)})
		if a != u.nowhere {
			u.strangers = append(u.strangers, Caller{ARN: freshRole(a, names)})
		}
	}
	for _, n := range names {
		switch {
		case roleForm.MatchString(n), userForm.MatchString(n), rootForm.MatchString(n):
			if c := (Caller{ARN: n}); !slices.Contains(u.callers, c) {
				u.callers = append(u.callers, c)
			}
		case sessionForm.MatchString(n):
			u.callers = append(u.callers, Caller{ARN: roleOfSession(n, names), Session: n})
		}
	}
	other := freshService(services)
	u.strangers = append(u.strangers, Caller{Service: other})
	for _, s := range append(services, other) {
		u.callers = append(u.callers, Caller{Service: s})
	}
	return u
}

// roleOfSession returns the role of a session. Its ARN lacks the role's path, so
// a role that is named is preferred.
func roleOfSession(session string, names []string) string {
	name := strings.Split(session, "/")[1]
	for _, n := range names {
		if isRole(n) && accountOf(n) == accountOf(session) && strings.HasSuffix(n, "/"+name) {
			return n
		}
	}
	return "arn:aws:iam::" + accountOf(session) + ":role/" + name
}

func freshRole(account string, names []string) string {
	for i := 0; ; i++ {
		arn := "arn:aws:iam::" + account + ":role/somebody-else" + strings.Repeat("-", i)
		if !slices.Contains(names, arn) {
			return arn
		}
	}
}

func freshAccount(accounts []string) string {
	for i := 1; ; i++ {
		if a := fmt.Sprintf("%012d", i); !slices.Contains(accounts, a) {
			return a
		}
	}
}

func freshService(services []string) string {
	for i := 0; ; i++ {
		name := "some-service" + strings.Repeat("-", i) + ".amazonaws.com"
		if !slices.Contains(services, name) {
			return name
		}
	}
}

func freshPCR(known map[string]bool) string {
	for i := 1; ; i++ {
		var v PCR
		copy(v[:], strconv.Itoa(i))
		if text := v.String(); !known[text] {
			return text
		}
	}
}

// table answers every request of a universe from a set of statements.
type table struct {
	name       string
	statements []Statement
	universe   *universe
	about      [][]bool // by caller and statement
	fits       [][]bool // by document and statement
}

func newTable(name string, statements []Statement, u *universe) *table {
	t := &table{name: name, statements: statements, universe: u}
	for _, c := range u.callers {
		row := make([]bool, len(statements))
		for k := range statements {
			row[k] = statements[k].about(c)
		}
		t.about = append(t.about, row)
	}
	for _, s := range u.shown {
		row := make([]bool, len(statements))
		for k := range statements {
			row[k] = statements[k].fits(s)
		}
		t.fits = append(t.fits, row)
	}
	return t
}

// each answers every request for one action: by each caller, with each document
// where the action takes one.
func (t *table) each(action int, visit func(caller, shown int, d Decision)) {
	documents := t.fits
	if !actions[action].Attested {
		documents = documents[:1] // the empty one
	}
	among := make([]int, 0, len(t.statements))
	for c, about := range t.about {
		among = among[:0]
		for k := range t.statements {
			if about[k] && t.statements[k].covers[action] {
				among = append(among, k)
			}
		}
		for s, fits := range documents {
			visit(c, s, decide(t.statements, among, func(k int) bool { return fits[k] }))
		}
	}
}
