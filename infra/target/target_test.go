package target_test

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/keypolicy"

	"github.com/keyhold/keyhold/infra/target"
	"github.com/keyhold/keyhold/infra/target/targettest"
)

// bad is an input that must be refused with a message that tells what is wrong.
type bad struct {
	name string
	edit func(t *testing.T, v map[string]string)
	want string
}

func set(key, value string) func(*testing.T, map[string]string) {
	return func(_ *testing.T, v map[string]string) { v[key] = value }
}

// release changes a file of the release that runs.
func release(file string, content func(t *testing.T) []byte) func(*testing.T, map[string]string) {
	return func(t *testing.T, v map[string]string) {
		t.Helper()
		targettest.Write(t, v[target.KeyRelease], file, content(t))
	}
}

func remove(file string) func(*testing.T, map[string]string) {
	return func(t *testing.T, v map[string]string) {
		t.Helper()
		if err := os.Remove(filepath.Join(v[target.KeyRelease], filepath.FromSlash(file))); err != nil {
			t.Fatal(err)
		}
	}
}

func refuse(t *testing.T, tests []bad) {
	t.Helper()
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			values := targettest.Values("prod", target.AMD64, targettest.Release(t, "one", target.AMD64))
			test.edit(t, values)
			_, err := target.Read(func(k string) string { return values[k] })
			if err == nil {
				t.Fatal("it was taken")
			}
			if !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %q, want it to say %q", err, test.want)
			}
		})
	}
}

func TestWhereAndHowIsCheckedBeforeAnythingIsDeployed(t *testing.T) {
	t.Parallel()
	refuse(t, []bad{
		{"no profile", set(target.KeyProfile, ""), "want one of dev, prod"},
		{"another profile", set(target.KeyProfile, "staging"), "want one of dev, prod"},
		{"no architecture", set(target.KeyArch, ""), "want amd64 or arm64"},
		{"an instance without enclaves", set(target.KeyInstance, "t3.large"), "not one of the types with enclave support that are allowed for amd64: c6a.xlarge"},
		{"too small an instance", set(target.KeyInstance, "c6a.large"), "not one of the types"},
		{"an instance of the other architecture", set(target.KeyInstance, "c7g.large"), "not one of the types"},
		{"no account", set(target.KeyAccount, ""), "want 12 digits"},
		{"no region", set(target.KeyRegion, ""), "region: want one"},
		{"one zone", set(target.KeyZones, "eu-central-1a"), "one zone is one power failure"},
		{"the same zone twice", set(target.KeyZones, "eu-central-1a,eu-central-1a"), "one zone is one power failure"},
		{"a zone of another region", set(target.KeyZones, "eu-central-1a,eu-west-1a"), "is not an availability zone of eu-central-1"},
		{"no machine image", set(target.KeyAMI, ""), "want the id of an Amazon Linux 2023 image"},
		{"an alias of a machine image", set(target.KeyAMI, "resolve:ssm:/aws/service/x"), "want the id"},
		{"no address", set(target.KeyEmail, "somebody"), "not an address"},
		{"an administrator that is no role", set(target.KeyAdmins, "arn:aws:iam::111122223333:root"), "want the ARN of an IAM role"},
		{"an administrator of another account", set(target.KeyAdmins, "arn:aws:iam::444455556666:role/x"), "not of the account that owns the key"},
		{"an administrator twice", set(target.KeyAdmins, "arn:aws:iam::111122223333:role/x,arn:aws:iam::111122223333:role/x"), "given twice"},
		{"the parent as administrator", set(target.KeyAdmins, "arn:aws:iam::111122223333:role/keyhold-prod-parent"), "must be two roles"},
	})
}

func TestAReleaseIsWhatItSays(t *testing.T) {
	t.Parallel()
	bytesOf := func(b []byte) func(*testing.T) []byte { return func(*testing.T) []byte { return b } }
	refuse(t, []bad{
		{"no release", set(target.KeyRelease, ""), "want a folder that make dist wrote"},
		{"no measurements", remove(target.MeasurementsFile), "read the measurements (make dist puts them there)"},
		{"measurements that are no JSON", release(target.MeasurementsFile, bytesOf([]byte("PCR0"))), "not the JSON"},
		{"measurements without PCR0", release(target.MeasurementsFile, bytesOf([]byte(`{"Measurements": {}}`))), "it names no PCR0"},
		{"short measurements", release(target.MeasurementsFile, bytesOf(targettest.Measurements("ab12"))), "96 hex digits"},
		{"a debug image", release(target.MeasurementsFile, bytesOf(targettest.Measurements(strings.Repeat("0", 96)))), "an enclave in debug mode"},
		{"measurements of another image", release(target.MeasurementsFile, bytesOf(targettest.Measurements(strings.Repeat("ab", 48)))), "of another image"},
		{"no image", remove(target.ImageFile), "read the image"},
		{"an image that is none", release(target.ImageFile, bytesOf([]byte("image"))), "keyhold.eif"},
		{"an image of the other architecture", func(t *testing.T, v map[string]string) {
			t.Helper()
			v[target.KeyRelease] = targettest.Release(t, "one", target.ARM64)
			v[target.KeyAdmit] = v[target.KeyRelease]
		}, "its image is for arm64, and arch is amd64"},
		{"no parent", remove(target.ParentFile), "keyhold-parent is missing"},
		{"no control function", remove(target.ControlFile), "lambda/control/bootstrap is missing"},
		{"a config that is none", release(target.ConfigFile, bytesOf([]byte("{}"))), "config.json"},
		{"a link", func(t *testing.T, v map[string]string) {
			t.Helper()
			if err := os.Symlink("/etc/passwd", filepath.Join(v[target.KeyRelease], "link")); err != nil {
				t.Fatal(err)
			}
		}, "plain files alone"},
		{"a file with a quote in its name", release("it's", bytesOf(nil)), "no release has a file of such a name"},
	})
}

func TestOnlyAReleaseThatGetsTheKeyMayRun(t *testing.T) {
	t.Parallel()
	refuse(t, []bad{
		{"nobody is named", set(target.KeyAdmit, ""), "want the releases that get the key"},
		{"the image is not admitted", func(t *testing.T, v map[string]string) {
			t.Helper()
			v[target.KeyAdmit] = targettest.Release(t, "two", target.AMD64)
		}, "the policy would not admit its image"},
		{"the config is not admitted", func(t *testing.T, v map[string]string) {
			t.Helper()
			other := targettest.Release(t, "one", target.AMD64)
			raw := targettest.Config(t, targettest.KeyARN, keypolicy.Managed)
			targettest.Write(t, other, target.ConfigFile, bytes.Replace(raw, []byte(`"max": 1000`), []byte(`"max": 1001`), 1))
			v[target.KeyAdmit] = other
		}, "the policy would admit its image, but not with its config"},
		{"no config", remove(target.ConfigFile), "make one with keyhold config build"},
		{"a config for a key of another account", release(target.ConfigFile, func(t *testing.T) []byte {
			t.Helper()
			return targettest.Config(t, strings.Replace(targettest.KeyARN, "111122223333", "444455556666", 1), keypolicy.Managed)
		}), "a key of account 444455556666"},
		{"a config for a key of another region", release(target.ConfigFile, func(t *testing.T) []byte {
			t.Helper()
			return targettest.Config(t, strings.Replace(targettest.KeyARN, "eu-central-1", "eu-west-1", 1), keypolicy.Managed)
		}), "in eu-west-1"},
		{"configs for two keys", func(t *testing.T, v map[string]string) {
			t.Helper()
			other := targettest.Release(t, "two", target.AMD64)
			targettest.Write(t, other, target.ConfigFile, targettest.Config(t, strings.Replace(targettest.KeyARN, "1234567890ab", "1234567890ff", 1), keypolicy.Managed))
			v[target.KeyAdmit] += "," + other
		}, "names another key"},
		{"the same pair twice", func(t *testing.T, v map[string]string) {
			t.Helper()
			v[target.KeyAdmit] += "," + v[target.KeyAdmit]
		}, "given twice"},
		{"three pairs", func(t *testing.T, v map[string]string) {
			t.Helper()
			v[target.KeyAdmit] += "," + targettest.Release(t, "two", target.AMD64) + "," + targettest.Release(t, "three", target.AMD64)
		}, "at most two"},
		{"keys made for nobody", func(_ *testing.T, v map[string]string) {
			v[target.KeyAdmit], v[target.KeyKeyring] = target.AdmitNone, target.KeyringCreate
		}, "nobody is admitted who could create one"},
		{"another stage", set(target.KeyKeyring, "open"), "want create or closed"},
		{"a seal under a config that does not want it", set(target.KeySeal, target.SealWords), "its config wants the mode managed, and the policy would be sealed"},
		{"a config that wants a seal without one", func(t *testing.T, v map[string]string) {
			t.Helper()
			targettest.Seal(t, v[target.KeyRelease])
		}, "its config wants the mode sealed, and the policy would be managed"},
		{"a seal by a slip", set(target.KeySeal, "yes"), "type the words"},
		{"a seal while rolling", func(t *testing.T, v map[string]string) {
			t.Helper()
			v[target.KeySeal], v[target.KeyAdmit] = target.SealWords, v[target.KeyAdmit]+","+targettest.Release(t, "two", target.AMD64)
		}, "exactly one admitted release"},
		{"a seal while keys are made", func(_ *testing.T, v map[string]string) {
			v[target.KeySeal], v[target.KeyKeyring] = target.SealWords, target.KeyringCreate
		}, "a closed keyring"},
	})
}

func TestAnImageNeedsFourTimesItsSizeInMemory(t *testing.T) {
	t.Parallel()
	r := &target.Release{Dir: "big", Arch: target.AMD64, ImageLen: 300 << 20}
	err := target.TestingOnlyFits(r, target.Instances()[0])
	if err == nil || !strings.Contains(err.Error(), "at least four times its image") {
		t.Errorf("got %v", err)
	}
}

func TestEveryMistakeIsToldAtOnce(t *testing.T) {
	t.Parallel()
	_, err := target.Read(func(string) string { return "" })
	for _, want := range []string{"profile", "arch", "account", "region", "ami", "release"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want it to name %s", err, want)
		}
	}
}

func TestTheDefaultsAreThoseOfTheDocs(t *testing.T) {
	t.Parallel()
	dir := targettest.Release(t, "one", target.ARM64)
	got := targettest.Read(t, targettest.Values("dev", target.ARM64, dir))
	if got.Instance.Name != "c6g.large" || got.Name() != "keyhold-dev" || got.TablePrefix() != "keyhold-dev-" {
		t.Errorf("got %s, %s, %s", got.Instance.Name, got.Name(), got.TablePrefix())
	}
	want := []string{"eu-central-1a", "eu-central-1b"}
	if diff := cmp.Diff(want, got.Zones); diff != "" {
		t.Error(diff)
	}
	raw, err := os.ReadFile(filepath.Join(dir, target.ConfigFile))
	if err != nil {
		t.Fatal(err)
	}
	pair := keypolicy.Pair{PCR0: got.Release.PCR0, PCR16: keypolicy.PCR(config.PCR16(raw))}
	if diff := cmp.Diff([]keypolicy.Pair{pair}, got.Spec().Pairs); diff != "" {
		t.Error(diff)
	}
}

func TestWhichReleaseRunsMakesNoDifferenceToThePolicy(t *testing.T) {
	t.Parallel()
	one, two := targettest.Release(t, "one", target.AMD64), targettest.Release(t, "two", target.AMD64)
	values := targettest.Values("prod", target.AMD64, one)
	values[target.KeyAdmit] = one + "," + two
	first := targettest.Read(t, values)
	second := maps.Clone(values)
	second[target.KeyRelease], second[target.KeyAdmit] = two, two+","+one
	if diff := cmp.Diff(first.Spec(), targettest.Read(t, second).Spec()); diff != "" {
		t.Error(diff)
	}
}

func TestOnTheAllowListEnclaveAndParentFit(t *testing.T) {
	t.Parallel()
	for _, i := range target.Instances() {
		// Hyper-threads come in pairs; the parent keeps a core, and a GiB.
		threads := 2
		if i.Arch == target.ARM64 {
			threads = 1
		}
		if i.EnclaveCPUs%threads != 0 || i.CPUs-i.EnclaveCPUs < threads || i.MiB-i.EnclaveMiB < 1024 {
			t.Errorf("%s: %d of %d CPUs and %d of %d MiB for the enclave", i.Name, i.EnclaveCPUs, i.CPUs, i.EnclaveMiB, i.MiB)
		}
	}
}
