package keypolicy_test

import (
	"errors"
	"testing"

	"github.com/keyhold/keyhold/keypolicy"
)

func TestAKeyThatCanBeReachedPastItsPolicyIsRefused(t *testing.T) {
	const arn = "arn:aws:kms:eu-central-1:" + account + ":key/1234abcd-12ab-34cd-56ef-1234567890ab"
	yes, no := true, false
	good := keypolicy.KeyFacts{
		ARN: arn, Account: account, KeyManager: "CUSTOMER", KeyState: "Enabled", Enabled: true, MultiRegion: &no,
		Origin: "AWS_KMS", KeySpec: "SYMMETRIC_DEFAULT", KeyUsage: "ENCRYPT_DECRYPT",
	}
	if err := keypolicy.CheckKey(good, arn); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		change func(*keypolicy.KeyFacts)
		want   error
	}{
		"another key":                  {func(f *keypolicy.KeyFacts) { f.ARN += "0" }, keypolicy.ErrOtherKey},
		"another account":              {func(f *keypolicy.KeyFacts) { f.Account = foreign }, keypolicy.ErrOtherKey},
		"of AWS":                       {func(f *keypolicy.KeyFacts) { f.KeyManager = "AWS" }, keypolicy.ErrKeyManager},
		"disabled":                     {func(f *keypolicy.KeyFacts) { f.KeyState, f.Enabled = "Disabled", false }, keypolicy.ErrKeyState},
		"to be deleted":                {func(f *keypolicy.KeyFacts) { f.KeyState = "PendingDeletion" }, keypolicy.ErrKeyState},
		"being updated":                {func(f *keypolicy.KeyFacts) { f.KeyState = "Updating" }, keypolicy.ErrKeyState},
		"enabled in one word only":     {func(f *keypolicy.KeyFacts) { f.Enabled = false }, keypolicy.ErrKeyState},
		"multi-region":                 {func(f *keypolicy.KeyFacts) { f.MultiRegion = &yes }, keypolicy.ErrMultiRegion},
		"of unknown region":            {func(f *keypolicy.KeyFacts) { f.MultiRegion = nil }, keypolicy.ErrMultiRegion},
		"imported":                     {func(f *keypolicy.KeyFacts) { f.Origin = "EXTERNAL" }, keypolicy.ErrKeyOrigin},
		"in an external store":         {func(f *keypolicy.KeyFacts) { f.Origin = "EXTERNAL_KEY_STORE" }, keypolicy.ErrKeyOrigin},
		"in CloudHSM":                  {func(f *keypolicy.KeyFacts) { f.Origin = "AWS_CLOUDHSM" }, keypolicy.ErrKeyOrigin},
		"of another spec":              {func(f *keypolicy.KeyFacts) { f.KeySpec = "RSA_2048" }, keypolicy.ErrKeySpec},
		"for another use":              {func(f *keypolicy.KeyFacts) { f.KeyUsage = "GENERATE_VERIFY_MAC" }, keypolicy.ErrKeySpec},
		"with a grant":                 {func(f *keypolicy.KeyFacts) { f.Grants = 1 }, keypolicy.ErrGrants},
		"with a number of grants < 0":  {func(f *keypolicy.KeyFacts) { f.Grants = -1 }, keypolicy.ErrGrants},
		"of which KMS told nothing":    {func(f *keypolicy.KeyFacts) { *f = keypolicy.KeyFacts{} }, keypolicy.ErrOtherKey},
		"of which KMS left out origin": {func(f *keypolicy.KeyFacts) { f.Origin = "" }, keypolicy.ErrKeyOrigin},
	} {
		f := good
		tc.change(&f)
		if err := keypolicy.CheckKey(f, arn); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
	all := keypolicy.CheckKey(keypolicy.KeyFacts{Grants: 2}, "")
	for _, want := range []error{
		keypolicy.ErrOtherKey, keypolicy.ErrKeyManager, keypolicy.ErrKeyState, keypolicy.ErrMultiRegion, keypolicy.ErrKeyOrigin,
		keypolicy.ErrKeySpec, keypolicy.ErrGrants,
	} {
		if !errors.Is(all, want) {
			t.Errorf("%v lacks %v", all, want)
		}
	}
}
