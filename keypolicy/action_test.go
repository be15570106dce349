package keypolicy_test

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/keypolicy"
)

// operations reads what the API has from the SDK's client, and which of them
// take an attestation document from their inputs.
func operations(t *testing.T) (names, attested []string) {
	t.Helper()
	client := reflect.TypeFor[*kms.Client]()
	for i := range client.NumMethod() {
		m := client.Method(i)
		if m.Type.NumIn() != 4 || m.Type.In(2).Kind() != reflect.Pointer || !strings.HasSuffix(m.Type.In(2).Elem().Name(), "Input") {
			continue // Options
		}
		names = append(names, m.Name)
		if _, takes := m.Type.In(2).Elem().FieldByName("Recipient"); takes {
			attested = append(attested, m.Name)
		}
	}
	return names, attested
}

func TestEveryActionOfTheAPIIsInTheTable(t *testing.T) {
	names, attested := operations(t)
	if len(names) < 56 {
		t.Fatalf("the SDK has only %d operations", len(names))
	}
	want := []string{"kms:SynchronizeMultiRegionKey"} // permission only: no operation
	for _, n := range names {
		if n == "ReEncrypt" { // one call, authorized on both keys
			want = append(want, "kms:ReEncryptFrom", "kms:ReEncryptTo")
			continue
		}
		want = append(want, "kms:"+n)
	}
	slices.Sort(want)
	var got, gotAttested []string
	for _, a := range keypolicy.Actions() {
		got = append(got, a.Name)
		if a.Attested {
			gotAttested = append(gotAttested, strings.TrimPrefix(a.Name, "kms:"))
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("class every new action, and look what it means for a key (-API +table):\n%s", diff)
	}
	if diff := cmp.Diff(attested, gotAttested); diff != "" {
		t.Errorf("attested (-API +table):\n%s", diff)
	}
	t.Logf("%d operations, %d actions", len(names), len(got))
}

func TestEveryActionIsAskedOfEverybody(t *testing.T) {
	for name, s := range specs(t) {
		r, err := build(t, s).Prove(s.Expectation())
		if err != nil {
			t.Fatal(err)
		}
		asked := map[[2]string]int{}
		for _, q := range r.Questions {
			asked[[2]string{q.Who, q.Action}]++
		}
		who := []string{
			"the parent role", "an administrator", "another principal of the account", "the account's root user",
			"another account", "an AWS service",
		}
		for _, a := range keypolicy.Actions() {
			if a.Class.String() == "unknown" {
				t.Errorf("%s has no class", a.Name)
			}
			for _, w := range who {
				if asked[[2]string{w, a.Name}] == 0 {
					t.Errorf("%s: nobody asked whether %s can %s", name, w, a.Name)
				}
			}
		}
		for _, shown := range shownTo(s) {
			if !slices.ContainsFunc(r.Questions, func(q keypolicy.Question) bool { return q.Shown == shown && q.Action == "kms:Decrypt" }) {
				t.Errorf("%s: nobody asked about %s", name, shown)
			}
		}
	}
}

// shownTo are the documents that must be asked about.
func shownTo(s keypolicy.Spec) []string {
	want := []string{"no attestation document", "a debug enclave, PCR0 of zeros", "a document without PCR0", "another image"}
	if len(s.Pairs) > 0 {
		want = append(want, "pair 1", "an admitted image without a config", "an admitted image with another config", "another image with an admitted config")
	}
	if len(s.Pairs) == 2 {
		want = append(want, "pair 2")
		if s.Pairs[0].PCR0 != s.Pairs[1].PCR0 && s.Pairs[0].PCR16 != s.Pairs[1].PCR16 {
			want = append(want, "the image of one pair with the config of the other")
		}
	}
	if s.PCR8 != nil {
		want = append(want, "an admitted pair with another PCR8", "an admitted pair with another PCR3")
	}
	return want
}
