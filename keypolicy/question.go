package keypolicy

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
)

// Answer is what is wanted of a question.
type Answer int

// The answers.
const (
	Either Answer = iota
	No
	Yes
)

func (a Answer) String() string { return [...]string{"either", "no", "yes"}[a] }

// MarshalText returns what String does.
func (a Answer) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// Kind of a wrong answer. Leak and Bare make a policy loose in any case, Wide and
// Lack where Expectation.Exact is set.
type Kind int

// The kinds, worst last.
const (
	Lack Kind = iota + 1 // somebody cannot do his work
	Wide                 // an Allow lets more through than it should, and only a Deny holds it back
	Bare                 // an Allow added by mistake would leak: no Deny stands behind
	Leak                 // somebody can now who must not
)

func (k Kind) String() string {
	return [...]string{"", "lack", "wide", "bare", "leak"}[k]
}

// MarshalText returns what String does.
func (k Kind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// Question is one that was asked, for all requests that come to the same.
type Question struct {
	Who      string `json:"who"`
	Shown    string `json:"shown,omitempty"` // empty where the action takes no document
	Action   string `json:"action"`
	Class    string `json:"class"`
	Want     Answer `json:"want"`
	Allowed  bool   `json:"allowed"`   // by the policy as it is
	By       int    `json:"statement"` // number of the statement that decided, counted from 1; 0: none
	Requests int    `json:"requests"`
}

// Finding is a wrong answer.
type Finding struct {
	Kind     Kind     `json:"kind"`
	Question Question `json:"question"`
	Added    string   `json:"added,omitempty"` // the careless addition that shows it
	Text     string   `json:"text"`            // holds nothing of the policy's text but statement numbers
}

type whoKind int

const (
	whoParent whoKind = iota
	whoAdmin
	whoInside
	whoRoot
	whoOutside
	whoService
)

func (w whoKind) String() string {
	return [...]string{
		"the parent role", "an administrator", "another principal of the account", "the account's root user",
		"another account", "an AWS service",
	}[w]
}

func (j *judge) kindOfCaller(c Caller) whoKind {
	switch {
	case c.Service != "":
		return whoService
	case c.account() != j.want.Account:
		return whoOutside
	case c.ARN == j.result.Parent:
		return whoParent
	case slices.Contains(j.result.Admins, c.ARN):
		return whoAdmin
	case rootForm.MatchString(c.ARN):
		return whoRoot
	}
	return whoInside
}

// shownKind is what a document comes to.
type shownKind struct {
	order int
	label string
	want  Answer // may the parent role release with it
}

// match returns the numbers, from 1, of pairs that have the document's image, its
// config, and both.
func (j *judge) match(s Shown) (image, config, pair int) {
	for i, p := range j.pairs() {
		sameImage, sameConfig := p.PCR0.String() == s[0], p.PCR16.String() == s[16]
		if sameImage {
			image = i + 1
		}
		if sameConfig {
			config = i + 1
		}
		if sameImage && sameConfig {
			pair = i + 1
		}
	}
	return image, config, pair
}

func (j *judge) kindOfShown(s Shown) shownKind {
	image, config, pair := j.match(s)
	switch {
	case len(s) == 0:
		return shownKind{0, "no attestation document", No}
	case s[0] == zeros:
		return shownKind{1, "a debug enclave, PCR0 of zeros", No}
	case pair > 0:
		return j.kindOfPair(s, pair)
	case image > 0 && config > 0:
		return shownKind{20, "the image of one pair with the config of the other", No}
	case image > 0 && (s[16] == "" || s[16] == zeros):
		return shownKind{21, "an admitted image without a config", No}
	case image > 0:
		return shownKind{22, "an admitted image with another config", No}
	case s[0] == "":
		return shownKind{23, "a document without PCR0", No}
	case config > 0:
		return shownKind{24, "another image with an admitted config", No}
	}
	return shownKind{25, "another image", No}
}

// kindOfPair looks at the other registers of a document with the right image and
// config. What the expectation says nothing about is left to the policy.
func (j *judge) kindOfPair(s Shown, pair int) shownKind {
	for _, r := range []struct {
		register int
		value    *PCR
	}{{3, j.want.PCR3}, {8, j.want.PCR8}} {
		if r.value != nil && s[r.register] != r.value.String() {
			return shownKind{10 + r.register, "an admitted pair with another PCR" + strconv.Itoa(r.register), No}
		}
	}
	want := Yes
	for _, r := range compared(j.policy.statements) {
		if r != 0 && r != 16 && (r != 3 || j.want.PCR3 == nil) && (r != 8 || j.want.PCR8 == nil) {
			want = Either
		}
	}
	return shownKind{1 + pair, "pair " + strconv.Itoa(pair), want}
}

// answer is the one that is wanted.
func (j *judge) answer(who whoKind, doc shownKind, a Action) Answer {
	switch a.Class {
	case Account:
		return Either
	case Releasing:
		if who != whoParent || doc.want == No {
			return No
		}
		switch {
		case a.Name == decrypt:
			return doc.want
		case a.Name == generateDataKey && j.creating():
			return doc.want
		}
		return No
	case Moving, Using:
		return No
	case Changing:
		if who != whoAdmin || j.mode() == Sealed {
			return No
		}
		return Yes
	case Administering:
		if who != whoAdmin {
			return No
		}
		return Yes
	case Reading:
		return j.reader(who, a)
	}
	return No
}

func (j *judge) reader(who whoKind, a Action) Answer {
	if who == whoAdmin || who == whoParent && slices.Contains(inspection(), a.Name) {
		return Yes
	}
	return No
}

func (j *judge) mode() Mode {
	if j.want.Mode != "" {
		return j.want.Mode
	}
	return j.result.Mode
}

func (j *judge) creating() bool {
	if j.want.Creating != nil {
		return *j.want.Creating
	}
	return j.result.Creating
}

// tally is a question and how it was answered.
type tally struct {
	Question
	who    whoKind
	order  int // of what is shown; -1 where the action takes no document
	action int

	kind  Kind   // of the worst wrong answer; 0: none
	added string // the addition that shows what is Bare
	other int    // number of the statement that is Wide
}

// ask puts every question to the policy as it is, with each careless addition,
// and, where it must be exact, without its Denies.
func (j *judge) ask() {
	j.facts = make([]*tally, (int(whoService)+1)*(len(j.kinds)+1)*len(actions))
	allows := slices.Clone(j.given.statements)
	for i := range allows {
		if allows[i].Deny {
			allows[i].covers = [64]bool{} // it stays where it is, so that numbers of statements are right
		}
	}
	alone := newTable("", allows, j.universe)
	for i, a := range actions {
		j.given.each(i, func(c, s int, d Decision) {
			j.result.Requests++
			j.fact(i, c, s).given(a.Class, d)
		})
		if j.want.Exact {
			alone.each(i, func(c, s int, d Decision) {
				j.result.Requests++
				if f := j.fact(i, c, s); d.Outcome == Allowed && f.Want == No && f.kind < Wide {
					f.kind, f.other = Wide, d.Statement+1
				}
			})
		}
		if a.Class != Reading && a.Class != Account {
			j.askCareless(i)
		}
	}
}

// askCareless asks with the widest addition, and if a wrong answer comes of it with
// the others as well, to name the first that gives it.
func (j *judge) askCareless(action int) {
	last := len(j.added) - 1
	if !j.leaks(j.added[last], action, func(*tally) {}) {
		return
	}
	for _, t := range j.added {
		j.leaks(t, action, func(f *tally) {
			if f.kind < Bare {
				f.kind, f.added = Bare, t.name
			}
		})
	}
}

func (j *judge) leaks(t *table, action int, visit func(*tally)) (some bool) {
	t.each(action, func(c, s int, d Decision) {
		j.result.Requests++
		if f := j.fact(action, c, s); d.Outcome == Allowed && f.Want == No {
			visit(f)
			some = true
		}
	})
	return some
}

// given counts the answer of the policy as it is. Whoever reads more than he needs
// lets nothing out.
func (f *tally) given(class Class, d Decision) {
	f.Requests++
	allowed, kind := d.Outcome == Allowed, Kind(0)
	switch {
	case allowed && f.Want == No && class == Reading:
		kind = Wide
	case allowed && f.Want == No:
		kind = Leak
	case !allowed && f.Want == Yes:
		kind = Lack
	}
	if kind > f.kind || f.Requests == 1 {
		f.kind, f.Allowed, f.By = kind, allowed, d.Statement+1
	}
}

func (j *judge) fact(action, caller, shown int) *tally {
	who, kind := j.who[caller], -1
	if actions[action].Attested {
		kind = j.docs[shown]
	}
	place := &j.facts[(int(who)*(len(j.kinds)+1)+kind+1)*len(actions)+action]
	if *place != nil {
		return *place
	}
	a, doc := actions[action], shownKind{order: -1}
	if kind >= 0 {
		doc = j.kinds[kind]
	}
	*place = &tally{who: who, order: doc.order, action: action, Question: Question{
		Who: who.String(), Shown: doc.label, Action: a.Name, Class: a.Class.String(), Want: j.answer(who, doc, a),
	}}
	return *place
}

// sum brings the answers into order and judges them.
func (j *judge) sum() (Result, error) {
	facts := slices.DeleteFunc(j.facts, func(f *tally) bool { return f == nil })
	slices.SortFunc(facts, func(a, b *tally) int {
		return cmp.Or(cmp.Compare(a.who, b.who), cmp.Compare(actions[a.action].Class, actions[b.action].Class),
			cmp.Compare(a.order, b.order), cmp.Compare(a.action, b.action))
	})
	for _, f := range facts {
		j.result.Questions = append(j.result.Questions, f.Question)
	}
	j.wholes()
	slices.SortStableFunc(facts, func(a, b *tally) int { return cmp.Compare(gravity(a.action), gravity(b.action)) })
	for _, f := range facts {
		if f.kind >= Bare || f.kind > 0 && j.want.Exact {
			j.result.Findings = append(j.result.Findings, Finding{Kind: f.kind, Question: f.Question, Added: f.added, Text: f.text()})
		}
	}
	slices.SortStableFunc(j.result.Findings, func(a, b Finding) int { return cmp.Compare(b.Kind, a.Kind) })
	if n := len(j.result.Findings); n > 0 {
		return j.result, fmt.Errorf("%w: %s (wrong answers: %d)", ErrLoose, j.result.Findings[0].Text, n)
	}
	if j.want.Mine != nil && !slices.Contains(j.result.Pairs, *j.want.Mine) {
		return j.result, ErrNotAdmitted
	}
	return j.result, nil
}

// gravity orders actions by class, and puts what this kind of key can do before
// what others can.
func gravity(action int) int {
	n := 2 * int(actions[action].Class)
	if !actions[action].Attested {
		n++
	}
	return n
}

// wholes adds what no single question shows.
func (j *judge) wholes() {
	add := func(k Kind, text string) {
		j.result.Findings = append(j.result.Findings, Finding{Kind: k, Text: text})
	}
	if len(j.result.Pairs) > maxPairs {
		add(Leak, "more than two pairs of image and config are admitted")
	}
	if j.result.Mode == Sealed && len(j.result.Pairs) != 1 {
		add(Leak, "nobody can change the policy, and it does not admit exactly one pair")
	}
	if j.want.Mode == Sealed && j.result.Mode != Sealed {
		add(Leak, "the policy can be changed, and shall be sealed")
	}
	for i, p := range j.want.Pairs {
		if !slices.Contains(j.result.Pairs, p) {
			add(Lack, "pair "+strconv.Itoa(i+1)+" is not admitted")
		}
	}
}

// text says what is wrong in one sentence.
func (f *tally) text() string {
	who := f.Who
	if f.Shown != "" {
		who += ", showing " + f.Shown + ","
	}
	by := "statement " + strconv.Itoa(f.By)
	switch f.kind {
	case Leak:
		return who + " can " + f.Action + ": " + by + " allows it"
	case Bare:
		return who + " could " + f.Action + " after one mistake (" + f.added + "): no Deny stands behind"
	case Wide:
		if f.Allowed {
			return who + " can " + f.Action + ", which it has no need to: " + by + " allows it"
		}
		return "statement " + strconv.Itoa(f.other) + " lets " + who + " " + f.Action + ", and only a Deny holds it back"
	case Lack:
		if f.By == 0 {
			return who + " cannot " + f.Action + ": no statement allows it"
		}
		return who + " cannot " + f.Action + ": " + by + " denies it"
	}
	return ""
}
