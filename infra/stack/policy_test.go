package stack_test

import (
	"encoding/json"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/keyhold/keyhold/keypolicy"

	"github.com/keyhold/keyhold/infra/target"
	"github.com/keyhold/keyhold/infra/target/targettest"
)

// step is one deployment of those that docs/deploy.md and docs/upgrade.md tell of.
type step struct {
	name   string
	values func(one, two, sealed string) map[string]string
}

func with(pairs ...string) func(one, two, sealed string) map[string]string {
	return func(one, two, sealed string) map[string]string {
		v := targettest.Values("prod", target.AMD64, one)
		for i := 0; i < len(pairs); i += 2 {
			v[pairs[i]] = strings.NewReplacer("ONE", one, "TWO", two, "SEALED", sealed).Replace(pairs[i+1])
		}
		return v
	}
}

var steps = []step{
	{"released to nobody", with(target.KeyAdmit, target.AdmitNone)},
	{"keys are made", with(target.KeyKeyring, target.KeyringCreate)},
	{"closed", with()},
	{"both admitted", with(target.KeyAdmit, "ONE,TWO")},
	{"the new one runs", with(target.KeyRelease, "TWO", target.KeyAdmit, "ONE,TWO")},
	{"the old one retired", with(target.KeyRelease, "TWO", target.KeyAdmit, "TWO")},
	{"sealed", with(target.KeyRelease, "SEALED", target.KeyAdmit, "SEALED", target.KeySeal, target.SealWords)},
}

type deployed struct {
	name   string
	target *target.Target
	template
}

// deployAll synthesizes every step, with the same two releases.
func deployAll(t *testing.T) []deployed {
	t.Helper()
	one, two := targettest.Release(t, "one", target.AMD64), targettest.Release(t, "two", target.AMD64)
	sealed := targettest.Seal(t, targettest.Release(t, "two", target.AMD64))
	var out []deployed
	for _, s := range steps {
		d := targettest.Read(t, s.values(one, two, sealed))
		tmpl, err := synth(t, d)
		if err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		out = append(out, deployed{s.name, d, tmpl})
	}
	return out
}

// The policy is judged as it stands in the template, not as it was built.
func TestTheKeyPolicyOfEachTemplateIsProved(t *testing.T) {
	for _, d := range deployAll(t) {
		t.Run(d.name, func(t *testing.T) {
			key := d.one(t, "AWS::KMS::Key", "KeyringKey")
			raw, err := json.Marshal(at(t, key.properties, "KeyPolicy"))
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(raw), "Fn::") || strings.Contains(string(raw), `"Ref"`) {
				t.Fatalf("the policy depends on what CloudFormation puts into it: %s", raw)
			}
			spec := d.target.Spec()
			got, err := keypolicy.Prove(raw, spec.Expectation())
			if err != nil {
				t.Fatalf("%v: %v", err, got.Findings)
			}
			if len(got.Questions) < 100 || len(got.Pairs) != len(d.target.Admit) || got.Creating != d.target.Creating {
				t.Errorf("%d questions, %d pairs, creating %v", len(got.Questions), len(got.Pairs), got.Creating)
			}
			if want := d.target.Sealed; (got.Mode == keypolicy.Sealed) != want || (key.properties["BypassPolicyLockoutSafetyCheck"] == true) != want {
				t.Errorf("mode %s, want sealed %v, and the check of KMS passed over with it alone", got.Mode, want)
			}
		})
	}
}

// A proof of a policy that nobody enforces would be worth nothing.
func TestALooserPolicyInTheTemplateIsNotProved(t *testing.T) {
	d := targettest.Read(t, targettest.Values("prod", target.AMD64, targettest.Release(t, "one", target.AMD64)))
	key := running(t, variant{"prod", target.AMD64}).one(t, "AWS::KMS::Key", "KeyringKey")
	statements := list(at(t, key.properties, "KeyPolicy", "Statement"))
	for i := range statements {
		fewer := append(append([]any{}, statements[:i]...), statements[i+1:]...)
		raw, err := json.Marshal(object{"Version": "2012-10-17", "Statement": fewer})
		if err != nil {
			t.Fatal(err)
		}
		spec := d.Spec()
		if _, err := keypolicy.Prove(raw, spec.Expectation()); err == nil {
			t.Errorf("it holds without statement %v", at(t, statements[i], "Sid"))
		}
	}
}

// changed returns the resources that differ between two templates, with the
// properties of each that do.
func changed(before, after template) map[string][]string {
	out := map[string][]string{}
	a, b := byID(before), byID(after)
	for id := range merge(a, b) {
		if gocmp.Equal(a[id].object, b[id].object) {
			continue
		}
		id = a[id].id
		var names []string
		for name := range merge(a[id].properties, b[id].properties) {
			if !gocmp.Equal(a[id].properties[name], b[id].properties[name]) {
				names = append(names, name)
			}
		}
		out[id] = names
	}
	return out
}

func byID(m template) map[string]resource {
	out := map[string]resource{}
	for _, r := range m.resources("") {
		out[r.id] = r
	}
	return out
}

func merge[V any](a, b map[string]V) map[string]bool {
	out := map[string]bool{}
	for k := range a {
		out[k] = true
	}
	for k := range b {
		out[k] = true
	}
	return out
}

func TestEachStepOfARollChangesOneThing(t *testing.T) {
	all := deployAll(t)
	find := func(name string) template {
		for _, d := range all {
			if d.name == name {
				return d.template
			}
		}
		t.Fatalf("there is no step %q", name)
		return template{}
	}
	policyAlone := map[string][]string{"KeyringKey": {"KeyPolicy"}}
	if diff := gocmp.Diff(policyAlone, changed(find("closed"), find("both admitted"))); diff != "" {
		t.Errorf("admitting the next release: %s", diff)
	}
	for id := range changed(find("both admitted"), find("the new one runs")) {
		switch kind := byID(find("closed"))[id].kind; {
		case kind == "AWS::EC2::LaunchTemplate", kind == "AWS::Lambda::Function":
		case kind == "AWS::IAM::Policy" && strings.HasPrefix(id, "ParentRoleDefaultPolicy"): // the bundle has another name
		default:
			t.Errorf("running it changes %s, a %s", id, kind)
		}
	}
	if diff := gocmp.Diff(policyAlone, changed(find("the new one runs"), find("the old one retired"))); diff != "" {
		t.Errorf("retiring the old release: %s", diff)
	}
	if diff := gocmp.Diff(map[string][]string{}, changed(find("both admitted"), find("both admitted"))); diff != "" {
		t.Errorf("a template differs from itself: %s", diff)
	}
}

func TestOtherDeploymentsDoNotTouchTheKeyPolicyOfASealedKey(t *testing.T) {
	sealed := targettest.Seal(t, targettest.Release(t, "one", target.AMD64))
	values := with(target.KeyRelease, "SEALED", target.KeyAdmit, "SEALED", target.KeySeal, target.SealWords)("", "", sealed)
	first, err := synth(t, targettest.Read(t, values))
	if err != nil {
		t.Fatal(err)
	}
	values[target.KeyInstance], values[target.KeyEmail] = "c6a.2xlarge", "somebody@example.com"
	second, err := synth(t, targettest.Read(t, values))
	if err != nil {
		t.Fatal(err)
	}
	difference := changed(first, second)
	if _, touched := difference["KeyringKey"]; touched || len(difference) == 0 {
		t.Errorf("changed: %v", difference)
	}
}

func TestNothingElseInTheStackCanUseTheKeyringsKey(t *testing.T) {
	for _, d := range deployAll(t) {
		for _, r := range d.resources("") {
			if r.kind != "AWS::IAM::Policy" && r.kind != "AWS::IAM::ManagedPolicy" && r.kind != "AWS::IAM::Role" {
				continue
			}
			text, err := json.Marshal(r.properties)
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(text), "KeyringKey") || strings.Contains(string(text), "kms:*") {
				t.Errorf("%s: %s names the key", d.name, r.id)
			}
			if r.kind == "AWS::IAM::Policy" {
				for _, s := range list(at(t, r.properties, "PolicyDocument", "Statement")) {
					body, err := json.Marshal(s)
					if err != nil {
						t.Fatal(err)
					}
					if strings.Contains(string(body), `"kms:`) && strings.Contains(string(body), `"Resource":"*"`) {
						t.Errorf("%s: %s is about all keys: %s", d.name, r.id, body)
					}
				}
			}
		}
	}
}
