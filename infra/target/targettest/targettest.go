// Package targettest makes releases for tests: small images that measure as what
// they say, with programs that are none. It reads nothing of dist/.
package targettest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/keypolicy"

	"github.com/keyhold/keyhold/infra/target"
)

// What the tests deploy to.
const (
	Account = "111122223333"
	Region  = "eu-central-1"
	KeyARN  = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
	AMI     = "ami-0123456789abcdef0"
)

// Release writes one below a temporary folder. Others of the same name and
// architecture have the same bytes.
func Release(t testing.TB, name string, arch target.Arch) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), name)
	image := eif.Image{
		Arch: eif.Arch(arch), DefaultMemory: eif.DefaultMemory, DefaultCPUs: eif.DefaultCPUs,
		Kernel: []byte("kernel of " + name), Cmdline: "reboot=k panic=1", Metadata: metadata(t, name),
		Ramdisks: [][]byte{[]byte("modules of " + name), []byte("init of " + name)},
	}
	raw, err := image.Encode()
	if err != nil {
		t.Fatal(err)
	}
	measured, err := image.Measure()
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.MarshalIndent(map[string]any{"Measurements": measured}, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	Write(t, dir, target.ImageFile, raw)
	Write(t, dir, target.MeasurementsFile, text)
	Write(t, dir, target.ConfigFile, Config(t, KeyARN, keypolicy.Managed))
	for _, file := range []string{target.ParentFile, target.ToolFile, target.InstallFile, target.ControlFile, target.IngestFile} {
		Write(t, dir, file, []byte(file+" of "+name))
	}
	return dir
}

func metadata(t testing.TB, name string) []byte {
	t.Helper()
	b, err := eif.Info{
		ImageName: name, BuildMetadata: eif.BuildInfo{BuildTool: "test"}, DockerInfo: json.RawMessage("null"), CustomMetadata: json.RawMessage("null"),
	}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Seal gives a release a config for a sealed key.
func Seal(t testing.TB, dir string) string {
	t.Helper()
	Write(t, dir, target.ConfigFile, Config(t, KeyARN, keypolicy.Sealed))
	return dir
}

// Config returns one for a key whose policy is of that mode.
func Config(t testing.TB, keyARN string, mode keypolicy.Mode) []byte {
	t.Helper()
	lock := config.DefaultKeyPolicy()
	lock.Mode = mode
	raw, err := config.Encode(&config.Config{
		Version: 1, KMSKeyARN: keyARN, Keyring: "main", Epochs: []uint32{1}, SealEpoch: 1,
		Create:    []config.Create{{Algorithm: record.Secp256k1, Policy: "payouts", Max: 1000}},
		Policies:  []config.Policy{{Name: "payouts", Kinds: []record.Kind{record.Message}}},
		Lease:     config.LeaseLimit{MaxMS: config.DefaultLeaseMaxMS, MarginMS: config.DefaultLeaseMarginMS},
		KeyPolicy: lock,
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := config.Parse(raw); err != nil {
		t.Fatal(err)
	}
	return raw
}

// Write puts a file into a release, in place of one that is there.
func Write(t testing.TB, dir, file string, content []byte) {
	t.Helper()
	path := filepath.Join(dir, filepath.FromSlash(file))
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil { //nolint:gosec // G301: nothing secret is in a release
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o755); err != nil { //nolint:gosec // G306: some of them are programs
		t.Fatal(err)
	}
}

// Measurements is a file of measurements that says PCR0.
func Measurements(pcr0 string) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, `{"Measurements": {"HashAlgorithm": "Sha384 { ... }", "PCR0": %q}}`, pcr0)
	return b.Bytes()
}

// Values are what is given to cdk to let a release run and get the key.
func Values(profile string, arch target.Arch, release string) map[string]string {
	return map[string]string{
		target.KeyProfile: profile, target.KeyArch: string(arch), target.KeyAccount: Account, target.KeyRegion: Region,
		target.KeyAMI: AMI, target.KeyRelease: release, target.KeyAdmit: release,
		target.KeyAdmins: "arn:aws:iam::" + Account + ":role/key-administrators",
	}
}

// Read makes a target of values.
func Read(t testing.TB, values map[string]string) *target.Target {
	t.Helper()
	got, err := target.Read(func(k string) string { return values[k] })
	if err != nil {
		t.Fatal(err)
	}
	return got
}
