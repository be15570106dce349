package keypolicy_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"github.com/keyhold/keyhold/keypolicy"
)

// The second judge: it shares nothing with the first one but the JSON. It works
// on sets: it writes down every request of a small world, strikes out those that
// no Allow covers, and then those that a Deny covers.

type world struct {
	callers []keypolicy.Caller
	actions []string
	shown   []keypolicy.Shown
}

// aliases are the spellings by which a statement can mean a caller.
func aliases(c keypolicy.Caller, allow bool) map[string]bool {
	if c.Service != "" {
		return map[string]bool{"*": true, "service " + c.Service: true}
	}
	names := map[string]bool{"*": true, c.ARN: true}
	if c.Session != "" {
		names[c.Session] = true
	}
	number := strings.Split(c.ARN, ":")[4]
	if allow || strings.HasSuffix(c.ARN, ":root") {
		names[number], names["arn:aws:iam::"+number+":root"] = true, true
	}
	return names
}

func whom(v any) []string {
	if v == "*" {
		return []string{"*"}
	}
	var out []string
	for kind, names := range v.(map[string]any) {
		for _, n := range list(names) {
			if kind == "Service" {
				n = "service " + n
			}
			out = append(out, n)
		}
	}
	return out
}

// forms are patterns of actions that were compiled before.
var forms sync.Map

func meansAction(pattern, action string) bool {
	if form, known := forms.Load(pattern); known {
		return form.(*regexp.Regexp).MatchString(action)
	}
	form := strings.NewReplacer(`\*`, ".*", `\?`, ".").Replace(regexp.QuoteMeta(pattern))
	forms.Store(pattern, regexp.MustCompile("(?i)^"+form+"$"))
	return meansAction(pattern, action)
}

var attested = []string{"kms:Decrypt", "kms:DeriveSharedSecret", "kms:GenerateDataKey", "kms:GenerateDataKeyPair", "kms:GenerateRandom"}

// contextOf is what KMS knows of a request.
func contextOf(c keypolicy.Caller, action string, shown keypolicy.Shown) map[string]string {
	known := map[string]string{"service": c.Service}
	if c.Service == "" {
		known["aws:PrincipalArn"] = c.ARN
		known["aws:PrincipalAccount"] = strings.Split(c.ARN, ":")[4]
		known["kms:CallerAccount"] = known["aws:PrincipalAccount"]
	}
	if slices.Contains(attested, action) {
		for r, v := range shown {
			known[fmt.Sprintf("kms:RecipientAttestation:PCR%d", r)] = v
			if r == 0 {
				known["kms:RecipientAttestation:ImageSha384"] = v
			}
		}
	}
	return known
}

func conditionsHold(v any, known map[string]string, deny bool) bool {
	conditions, _ := v.(map[string]any)
	for op, keys := range conditions {
		for key, values := range keys.(map[string]any) {
			if known["service"] != "" && (op == "Null" && key == "aws:PrincipalArn" || strings.HasSuffix(key, "Account")) {
				if deny { // unknown: against a Deny, for an Allow
					return false
				}
				continue
			}
			got, present := known[key]
			if !oneHolds(op, list(values), got, present) {
				return false
			}
		}
	}
	return true
}

func oneHolds(op string, values []string, got string, present bool) bool {
	if op == "Null" {
		return present == (values[0] == "false")
	}
	// Register values are hex, and ARNs and accounts differ in more than case here.
	equal := present && slices.ContainsFunc(values, func(want string) bool { return strings.EqualFold(want, got) })
	if strings.Contains(op, "Not") {
		return !equal
	}
	return equal
}

type ask struct{ caller, action, shown int }

// let returns the requests of the world that the policy lets through.
func (w *world) let(t testing.TB, policy []byte) map[ask]bool {
	t.Helper()
	var doc map[string]any
	if err := json.Unmarshal(policy, &doc); err != nil {
		t.Fatal(err)
	}
	through := map[ask]bool{}
	for _, effect := range []string{"Allow", "Deny"} {
		for _, s := range doc["Statement"].([]any) {
			st := s.(map[string]any)
			if st["Effect"] != effect {
				continue
			}
			w.covered(st, func(a ask) {
				if effect == "Allow" {
					through[a] = true
				} else {
					delete(through, a)
				}
			})
		}
	}
	return through
}

func (w *world) covered(st map[string]any, visit func(ask)) {
	for c, caller := range w.callers {
		names := aliases(caller, st["Effect"] == "Allow")
		if !slices.ContainsFunc(whom(st["Principal"]), func(n string) bool { return names[n] }) {
			continue
		}
		for a, action := range w.actions {
			if !slices.ContainsFunc(list(st["Action"]), func(p string) bool { return meansAction(p, action) }) {
				continue
			}
			for s, shown := range w.shown {
				if conditionsHold(st["Condition"], contextOf(caller, action, shown), st["Effect"] == "Deny") {
					visit(ask{c, a, s})
				}
			}
		}
	}
}

func theWorld(t testing.TB) *world {
	t.Helper()
	w := &world{
		callers: []keypolicy.Caller{
			{ARN: parent},
			{ARN: admin},
			{ARN: stranger},
			{ARN: rootUser},
			{ARN: "arn:aws:iam::" + account + ":user/joe"},
			{ARN: stranger, Session: "arn:aws:sts::" + account + ":assumed-role/dashboard/someone"},
			{ARN: "arn:aws:iam::" + foreign + ":root"},
			{ARN: "arn:aws:iam::" + foreign + ":role/parent"},
			{Service: "dynamodb.amazonaws.com"},
			{Service: "ec2.amazonaws.com"},
		},
		actions: []string{
			"kms:Decrypt", "kms:GenerateDataKey", "kms:GenerateDataKeyPair", "kms:GenerateRandom", "kms:Encrypt", "kms:ReEncryptFrom",
			"kms:CreateGrant", "kms:PutKeyPolicy", "kms:DescribeKey", "kms:DisableKey", "kms:Decapsulate",
		},
		shown: []keypolicy.Shown{nil},
	}
	values := []string{"", pcr(t, "a1").String(), pcr(t, "a2").String(), pcr(t, "00").String(), pcr(t, "c1").String()}
	for _, zero := range values {
		for _, sixteen := range values {
			s := keypolicy.Shown{}
			if zero != "" {
				s[0] = zero
			}
			if sixteen != "" {
				s[16] = sixteen
			}
			w.shown = append(w.shown, s)
		}
	}
	return w
}

// drawStatement draws one that is understood.
func drawStatement(t *rapid.T, label string) map[string]any {
	session := "arn:aws:sts::" + account + ":assumed-role/dashboard/someone"
	who := rapid.SampledFrom([]any{
		"*",
		map[string]any{"AWS": "*"},
		map[string]any{"AWS": parent},
		map[string]any{"AWS": rootUser},
		map[string]any{"AWS": account},
		map[string]any{"AWS": []any{admin, stranger}},
		map[string]any{"AWS": session},
		map[string]any{"Service": "dynamodb.amazonaws.com"},
		map[string]any{"AWS": parent, "Service": []any{"ec2.amazonaws.com"}},
		map[string]any{"AWS": foreign},
		map[string]any{"AWS": []any{"arn:aws:iam::" + account + ":user/joe", parent}},
	}).Draw(t, label+" principal")
	actions := rapid.SliceOfNDistinct(rapid.SampledFrom([]string{
		"kms:Decrypt", "kms:decrypt", "kms:GenerateDataKey", "kms:GenerateDataKey*", "kms:De*", "kms:*", "*", "kms:ReEncrypt*",
		"kms:CreateGrant", "kms:Put*", "kms:?ecrypt", "kms:Generate*", "kms:DisableKey", "kms:*Key*",
	}), 1, 3, rapid.ID).Draw(t, label+" actions")
	s := map[string]any{
		"Effect": rapid.SampledFrom([]string{"Allow", "Deny"}).Draw(t, label+" effect"), "Principal": who, "Action": actions, "Resource": "*",
	}
	if conditions := drawConditions(t, label); len(conditions) > 0 {
		s["Condition"] = conditions
	}
	return s
}

func drawConditions(t *rapid.T, label string) map[string]any {
	conditions := map[string]any{}
	for i := range rapid.IntRange(0, 2).Draw(t, label+" conditions") {
		label := fmt.Sprint(label, " condition ", i)
		register := rapid.SliceOfNDistinct(rapid.SampledFrom([]string{
			strings.Repeat("a1", 48), strings.Repeat("a2", 48), strings.Repeat("c1", 48), strings.Repeat("0", 96),
		}), 1, 2, rapid.ID)
		arns := rapid.SliceOfNDistinct(rapid.SampledFrom([]string{parent, admin, stranger, rootUser}), 1, 2, rapid.ID)
		accounts := rapid.SliceOfNDistinct(rapid.SampledFrom([]string{account, foreign}), 1, 2, rapid.ID)
		type of struct {
			operators, keys []string
			values          *rapid.Generator[[]string]
		}
		kind := rapid.SampledFrom([]of{
			{
				[]string{"StringEquals", "StringNotEquals", "StringEqualsIgnoreCase", "StringNotEqualsIgnoreCase", "StringLike", "StringNotLike"},
				[]string{"kms:RecipientAttestation:PCR0", "kms:RecipientAttestation:PCR16", "kms:RecipientAttestation:ImageSha384"},
				register,
			},
			{[]string{"ArnEquals", "ArnNotEquals", "ArnLike", "ArnNotLike", "StringEquals", "StringNotEquals"}, []string{"aws:PrincipalArn"}, arns},
			{[]string{"StringEquals", "StringNotEquals"}, []string{"aws:PrincipalAccount", "kms:CallerAccount"}, accounts},
			{[]string{"Null"}, []string{"kms:RecipientAttestation:PCR16", "aws:PrincipalArn", "kms:CallerAccount"}, nil},
		}).Draw(t, label+" kind")
		op, key := rapid.SampledFrom(kind.operators).Draw(t, label+" operator"), rapid.SampledFrom(kind.keys).Draw(t, label+" key")
		keys, _ := conditions[op].(map[string]any)
		if keys == nil {
			keys = map[string]any{}
			conditions[op] = keys
		}
		if kind.values == nil {
			keys[key] = rapid.SampledFrom([]string{"true", "false"}).Draw(t, label+" null")
		} else {
			keys[key] = kind.values.Draw(t, label+" values")
		}
	}
	return conditions
}

func drawPolicy(t *rapid.T) []byte {
	statements := make([]any, rapid.IntRange(1, 5).Draw(t, "statements"))
	for i := range statements {
		statements[i] = drawStatement(t, fmt.Sprint("statement ", i))
	}
	return encode(t, statements)
}

func encode(t *rapid.T, statements []any) []byte {
	text, err := json.Marshal(map[string]any{"Version": "2012-10-17", "Statement": statements})
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func (w *world) evaluate(t testing.TB, p keypolicy.Policy) map[ask]bool {
	t.Helper()
	out := map[ask]bool{}
	for c := range w.callers {
		for a := range w.actions {
			for s := range w.shown {
				d, err := keypolicy.Evaluate(p, keypolicy.Request{Caller: w.callers[c], Action: w.actions[a], Shown: w.shown[s]})
				if err != nil {
					t.Fatal(err)
				}
				if d.Outcome == keypolicy.Allowed {
					out[ask{c, a, s}] = true
				}
			}
		}
	}
	return out
}

func TestTwoJudgesAgree(t *testing.T) {
	w, some := theWorld(t), 0
	rapid.Check(t, func(rt *rapid.T) {
		raw := drawPolicy(rt)
		p, err := keypolicy.Parse(raw)
		if err != nil {
			rt.Fatalf("%v\n%s", err, raw)
		}
		for name, text := range map[string][]byte{"as drawn": raw, "in canonical form": p.JSON()} {
			want, got := w.let(t, text), w.evaluate(t, p)
			some += len(want)
			for a := range union(want, got) {
				if want[a] != got[a] {
					rt.Fatalf("%s: %+v %s %v: one says %v, the other %v\n%s", name, w.callers[a.caller], w.actions[a.action], w.shown[a.shown], want[a], got[a], text)
				}
			}
		}
	})
	if some == 0 {
		t.Error("nothing was ever let through")
	}
}

func union(a, b map[ask]bool) map[ask]bool {
	out := map[ask]bool{}
	for k := range a {
		out[k] = true
	}
	for k := range b {
		out[k] = true
	}
	return out
}

func TestAddingAnAllowTakesNothingAndAddingADenyGivesNothing(t *testing.T) {
	w := theWorld(t)
	rapid.Check(t, func(rt *rapid.T) {
		raw := drawPolicy(rt)
		more := drawStatement(rt, "more")
		var doc map[string]any
		if err := json.Unmarshal(raw, &doc); err != nil {
			rt.Fatal(err)
		}
		place := rapid.IntRange(0, len(doc["Statement"].([]any))).Draw(rt, "place")
		longer := slices.Insert(slices.Clone(doc["Statement"].([]any)), place, any(more))
		before, after := w.evaluate(t, parse(t, string(raw))), w.evaluate(t, parse(t, string(encode(rt, longer))))
		subset, superset := before, after
		if more["Effect"] == "Deny" {
			subset, superset = after, before
		}
		for a := range subset {
			if !superset[a] {
				rt.Fatalf("%s at %d changes %+v %s %v the wrong way", more["Effect"], place, w.callers[a.caller], w.actions[a.action], w.shown[a.shown])
			}
		}
	})
}

func TestTheOrderOfStatementsMeansNothing(t *testing.T) {
	w := theWorld(t)
	rapid.Check(t, func(rt *rapid.T) {
		raw := drawPolicy(rt)
		var doc map[string]any
		if err := json.Unmarshal(raw, &doc); err != nil {
			rt.Fatal(err)
		}
		other := encode(rt, rapid.Permutation(doc["Statement"].([]any)).Draw(rt, "order"))
		one, two := w.evaluate(t, parse(t, string(raw))), w.evaluate(t, parse(t, string(other)))
		if len(one) != len(two) || len(union(one, two)) != len(one) {
			rt.Fatalf("%d and %d", len(one), len(two))
		}
	})
}

// Every request is answered as one of those that a proof asks about: it is
// replaced by the one that stands for it, and the answer must stay.
func TestTheRequestsAskedAboutStandForAll(t *testing.T) {
	w := theWorld(t)
	rapid.Check(t, func(rt *rapid.T) {
		p, err := keypolicy.Parse(drawPolicy(rt))
		if err != nil {
			rt.Fatal(err)
		}
		callers, shown, err := keypolicy.TestingOnlyUniverse(p, account)
		if err != nil {
			rt.Fatal(err)
		}
		for _, c := range append(slices.Clone(w.callers),
			keypolicy.Caller{ARN: "arn:aws:iam::" + account + ":role/a/b/never-named"}, keypolicy.Caller{ARN: "arn:aws:iam::" + account + ":user/never"},
			keypolicy.Caller{ARN: "arn:aws:iam::777788889999:role/never"}, keypolicy.Caller{Service: "never.amazonaws.com"}) {
			for _, s := range append(slices.Clone(w.shown), keypolicy.Shown{0: pcr(t, "d7").String(), 16: pcr(t, "d8").String(), 5: pcr(t, "d9").String()}) {
				others := standIns(p, callers, shown, c, s)
				for _, action := range w.actions {
					got := outcome(rt, p, keypolicy.Request{Caller: c, Action: action, Shown: s})
					for _, same := range others {
						same.Action = action
						if other := outcome(rt, p, same); other != got {
							rt.Fatalf("%+v %s %v is %s, but %+v is %s\n%s", c, action, s, got, same, other, p.JSON())
						}
					}
				}
			}
		}
	})
}

func outcome(t *rapid.T, p keypolicy.Policy, r keypolicy.Request) keypolicy.Outcome {
	d, err := keypolicy.Evaluate(p, r)
	if err != nil {
		t.Fatal(err)
	}
	return d.Outcome
}

// standIns are the requests of the universe that stand for a caller with a document.
func standIns(p keypolicy.Policy, callers []keypolicy.Caller, shown []keypolicy.Shown, c keypolicy.Caller, s keypolicy.Shown) []keypolicy.Request {
	who := c
	if !slices.Contains(callers, who) && who.Session != "" {
		who.Session = ""
	}
	if !slices.Contains(callers, who) {
		known := func(number string) bool {
			return slices.ContainsFunc(callers, func(k keypolicy.Caller) bool { return strings.Contains(k.ARN, "::"+number+":") })
		}
		i := slices.IndexFunc(callers, func(k keypolicy.Caller) bool {
			switch number := strings.Split(who.ARN+":::::", ":")[4]; {
			case who.Service != "":
				return strings.HasPrefix(k.Service, "some-service")
			case strings.HasSuffix(who.ARN, ":root"):
				return strings.HasSuffix(k.ARN, ":root") && strings.Contains(k.ARN, "::0000000")
			case known(number):
				return strings.HasPrefix(k.ARN, "arn:aws:iam::"+number+":role/somebody-else")
			default:
				return strings.Contains(k.ARN, "::0000000") && strings.Contains(k.ARN, ":role/somebody-else")
			}
		})
		if i < 0 {
			return []keypolicy.Request{{}} // fails: there is nobody to stand for c
		}
		who = callers[i]
	}
	var out []keypolicy.Request
	for _, candidate := range shown {
		if standsFor(p, candidate, s) {
			out = append(out, keypolicy.Request{Caller: who, Shown: candidate})
		}
	}
	return out
}

func standsFor(p keypolicy.Policy, candidate, s keypolicy.Shown) bool {
	for _, r := range []int{0, 16} {
		constants := keypolicy.TestingOnlyConstants(p, r)
		a, b := candidate[r], s[r]
		if a == b {
			continue
		}
		if a == "" || b == "" || constants[a] || constants[b] || a == strings.Repeat("0", 96) || b == strings.Repeat("0", 96) {
			return false
		}
	}
	return true
}

// A policy near a good one, and a request that gets through although it must not,
// by the word of the second judge: then the proof must fail.
func TestNothingGetsThroughAPolicyThatWasProved(t *testing.T) {
	w := theWorld(t)
	s := specs(t)["one pair"]
	built := build(t, s)
	good := tree(t, built)["Statement"].([]any)
	proved, loose := 0, 0
	rapid.Check(t, func(rt *rapid.T) {
		statements := slices.Clone(good)
		for i := range rapid.IntRange(0, 2).Draw(rt, "dropped") {
			k := rapid.IntRange(0, len(statements)-1).Draw(rt, fmt.Sprint("drop ", i))
			statements = slices.Delete(statements, k, k+1)
		}
		for i := range rapid.IntRange(0, 2).Draw(rt, "added") {
			statements = append(statements, drawStatement(rt, fmt.Sprint("added ", i)))
		}
		raw := encode(rt, statements)
		_, err := keypolicy.Prove(raw, keypolicy.Expectation{Account: account, Pairs: s.Pairs, Parent: parent, Admins: s.Admins})
		if err != nil {
			if !errors.Is(err, keypolicy.ErrLoose) {
				rt.Fatal(err)
			}
			loose++
			return
		}
		proved++
		for a := range w.let(t, raw) {
			if !w.mayBe(a, s) {
				rt.Fatalf("%+v can %s with %v\n%s", w.callers[a.caller], w.actions[a.action], w.shown[a.shown], raw)
			}
		}
	})
	t.Logf("proved %d, found loose %d", proved, loose)
	if proved == 0 || loose == 0 {
		t.Error("only one of the answers was ever given")
	}
}

// mayBe reports whether a request may get through a policy of that spec.
func (w *world) mayBe(a ask, s keypolicy.Spec) bool {
	arn, shown := w.callers[a.caller].ARN, w.shown[a.shown]
	switch w.actions[a.action] {
	case "kms:DescribeKey", "kms:GenerateRandom":
		return true
	case "kms:DisableKey", "kms:PutKeyPolicy":
		return arn == admin
	case "kms:Decrypt", "kms:GenerateDataKey":
		return arn == parent && shown[0] == s.Pairs[0].PCR0.String() && shown[16] == s.Pairs[0].PCR16.String()
	}
	return false
}
