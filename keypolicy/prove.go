package keypolicy

import (
	"errors"
	"fmt"
	"maps"
	"slices"
)

// Why a policy that was read and understood is refused.
var (
	ErrLoose       = errors.New("key policy is loose")
	ErrNotAdmitted = errors.New("key policy does not admit this image and config")
)

// Expectation is what a policy must say. What it leaves open is read from the
// policy and reported; whatever it is, nobody but one role of the account with
// one or two pairs may get anything out.
type Expectation struct {
	Account string // owner of the key, 12 digits

	Mine   *Pair    // must be among the pairs
	Pairs  []Pair   // all of them; nil: whatever is admitted, up to two
	Parent string   // role of the parent instances; empty: the one role that can release
	Admins []string // nil: the roles that can administer
	Mode   Mode     // empty: either
	PCR8   *PCR     // must be asked of every pair
	PCR3   *PCR     // must be asked of every pair

	// Exact asks of the policy to do its work as well, and of its Allows to be
	// tight even without its Denies: it must be what Build makes. An enclave does
	// not ask that: an Allow that a Deny holds back is no reason to wipe.
	Exact    bool
	Creating *bool // GenerateDataKey is open to the pairs; nil: either
}

// Result is what a proof found.
type Result struct {
	Hash      [32]byte // of the policy, Policy.Hash
	Mode      Mode
	Pairs     []Pair // admitted; sorted
	Parent    string // the role that can release with them; empty where nobody can
	Admins    []string
	Creating  bool       // GenerateDataKey is open to the pairs
	Questions []Question // everything that was asked
	Findings  []Finding  // every wrong answer; empty where the policy holds
	Requests  int        // that were evaluated
}

// Prove reads a policy and answers every question there is about it: each KMS
// action, asked by each kind of principal with each kind of attestation document,
// of the policy as it is and with careless Allows added to it. Since a policy
// compares with constants only, the requests asked about stand for all there can
// be.
//
// The error is ErrMalformed or ErrNotUnderstood where the policy could not be
// judged; ErrLoose with the Result where an answer is wrong; ErrNotAdmitted with
// the Result where all is well but Mine is not among the pairs.
func Prove(policy []byte, want Expectation) (Result, error) {
	p, err := Parse(policy)
	if err != nil {
		return Result{}, err
	}
	return p.Prove(want)
}

// Prove is what the function Prove does.
func (p Policy) Prove(want Expectation) (Result, error) {
	switch {
	case len(p.statements) == 0:
		return Result{}, unknown("it has no statement")
	case !accountForm.MatchString(want.Account):
		return Result{}, fmt.Errorf("%w: an account has 12 digits", ErrRequest)
	}
	j, err := newJudge(p, want)
	if err != nil {
		return Result{}, err
	}
	j.derive()
	j.ask()
	return j.sum()
}

// judge is one proof under way.
type judge struct {
	policy   Policy
	want     Expectation
	universe *universe
	given    *table
	added    []*table // the policy with each careless addition, the widest last
	result   Result

	facts []*tally    // by kind of caller, kind of document and action
	pair  []*Pair     // that universe.shown[i] shows, if the policy names both registers
	kinds []shownKind // what documents come to
	docs  []int       // index into kinds of universe.shown
	who   []whoKind   // of universe.callers
}

func newJudge(p Policy, want Expectation) (*judge, error) {
	j := &judge{policy: p, want: want}
	j.result.Hash = p.Hash()
	named := slices.Clone(want.Admins)
	if want.Parent != "" {
		named = append(named, want.Parent)
	}
	var everything []string
	for _, c := range callersOf(p.statements, want.Account, named).callers {
		everything = append(everything, c.ARN)
	}
	additions, err := careless(want.Account, want.Parent, freshRole(want.Account, everything))
	if err != nil {
		return nil, fmt.Errorf("prove: %w", err)
	}
	all := slices.Clone(p.statements)
	for _, a := range additions {
		all = append(all, a.statements...)
	}
	more := map[int][]string{0: nil, 16: nil}
	for _, pair := range append(slices.Clone(want.Pairs), minePair(want.Mine)...) {
		more[0], more[16] = append(more[0], pair.PCR0.String()), append(more[16], pair.PCR16.String())
	}
	for register, v := range map[int]*PCR{3: want.PCR3, 8: want.PCR8} {
		if v != nil {
			more[register] = []string{v.String()}
		}
	}
	if j.universe, err = span(all, want.Account, named, more); err != nil {
		return nil, err
	}
	j.given = newTable("", p.statements, j.universe)
	for _, a := range additions {
		j.added = append(j.added, newTable(a.name, slices.Concat(p.statements, a.statements), j.universe))
	}
	return j, nil
}

func minePair(p *Pair) []Pair {
	if p == nil {
		return nil
	}
	return []Pair{*p}
}

// derive reads from the policy as it is who releases with which pairs, who
// administers, and whether anybody can ever change it.
func (j *judge) derive() {
	j.pair = namedPairs(j.policy.statements, j.universe.shown)
	pairs := map[Pair]bool{}
	able := map[Class][]string{} // roles that are named in an Allow
	var users []string           // of these, who releases with a pair
	for i, a := range actions {
		j.given.each(i, func(c, s int, d Decision) {
			arn := j.universe.callers[c].ARN
			if d.Outcome != Allowed || !isRole(arn) || accountOf(arn) != j.want.Account || !j.isNamed(arn, i) {
				return
			}
			able[a.Class] = append(able[a.Class], arn)
			if a.Class == Releasing && j.pair[s] != nil {
				users = append(users, arn)
				pairs[*j.pair[s]] = true
				j.result.Creating = j.result.Creating || a.Name == generateDataKey
			}
		})
	}
	j.result.Pairs = slices.SortedFunc(maps.Keys(pairs), Pair.compare)
	admins := unique(slices.Concat(able[Changing], able[Administering]))
	j.deriveRoles(admins, unique(users), unique(able[Releasing]), unique(able[Reading]))
	if j.result.Mode = Sealed; j.anybodyCanChange() {
		j.result.Mode = Managed
	}
	j.sort()
}

// sort says of each document and caller of the universe what it is.
func (j *judge) sort() {
	j.docs = make([]int, len(j.universe.shown))
	for i, s := range j.universe.shown {
		kind := j.kindOfShown(s)
		if j.docs[i] = slices.Index(j.kinds, kind); j.docs[i] < 0 {
			j.docs[i], j.kinds = len(j.kinds), append(j.kinds, kind)
		}
	}
	j.who = make([]whoKind, len(j.universe.callers))
	for i, c := range j.universe.callers {
		j.who[i] = j.kindOfCaller(c)
	}
}

// deriveRoles takes for the parent, unless it is given, who releases with a pair,
// else who releases at all, else who may look and not administer.
func (j *judge) deriveRoles(admins, users, takers, readers []string) {
	readers = slices.DeleteFunc(readers, func(arn string) bool { return slices.Contains(admins, arn) })
	j.result.Parent = j.want.Parent
	for _, list := range [][]string{users, takers, readers} {
		if j.result.Parent == "" {
			j.result.Parent = firstOutside(list, admins)
		}
	}
	if j.result.Admins = j.want.Admins; j.result.Admins == nil {
		j.result.Admins = slices.DeleteFunc(admins, func(arn string) bool { return arn == j.result.Parent })
	}
}

// isNamed reports whether an Allow for the action names the role, rather than
// everybody or the account.
func (j *judge) isNamed(arn string, action int) bool {
	for _, s := range j.policy.statements {
		if s.Deny || !s.covers[action] {
			continue
		}
		if slices.Contains(s.Principal.AWS, arn) {
			return true
		}
		for _, c := range s.Conditions {
			if c.kind == keyARN && !operators[c.Operator].negated && slices.Contains(c.Values, arn) {
				return true
			}
		}
	}
	return false
}

// firstOutside returns the first of the list that is not in the other one, else
// the first.
func firstOutside(list, other []string) string {
	for _, s := range list {
		if !slices.Contains(other, s) {
			return s
		}
	}
	if len(list) > 0 {
		return list[0]
	}
	return ""
}

func (j *judge) anybodyCanChange() bool {
	can := false
	for _, t := range []*table{j.given, j.added[len(j.added)-1]} {
		t.each(actionIndex(putKeyPolicy), func(_, _ int, d Decision) { can = can || d.Outcome == Allowed })
	}
	return can
}

// namedPairs returns the pair that each document shows, nil where a register has
// a value that the policy does not name, or zeros.
func namedPairs(statements []Statement, shown []Shown) []*Pair {
	images, configs := constants(statements, 0), constants(statements, 16)
	out := make([]*Pair, len(shown))
	for i, s := range shown {
		if s[0] == zeros || s[16] == zeros || !images[s[0]] || !configs[s[16]] {
			continue
		}
		image, err1 := ParsePCR(s[0])
		config, err2 := ParsePCR(s[16])
		if err1 == nil && err2 == nil {
			out[i] = &Pair{image, config}
		}
	}
	return out
}

// pairs are those that may release: the wanted ones, else those admitted.
func (j *judge) pairs() []Pair {
	if j.want.Pairs != nil {
		return j.want.Pairs
	}
	return j.result.Pairs
}
