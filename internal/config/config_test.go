package config_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/keypolicy"
)

// canonical is a config as it is stored and measured. Its form is part of the
// contract: another spelling is another PCR16.
const canonical = `{
  "version": 1,
  "kms_key_arn": "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
  "keyring": "main",
  "open_epochs": [
    1,
    2
  ],
  "seal_epoch": 2,
  "create": [
    {
      "algorithm": "ed25519",
      "policy": "all",
      "max": 10
    },
    {
      "algorithm": "secp256k1",
      "policy": "messages",
      "max": 1000000
    }
  ],
  "policies": [
    {
      "name": "all",
      "kinds": [
        "message",
        "raw",
        "digest"
      ]
    },
    {
      "name": "messages",
      "kinds": [
        "message"
      ]
    }
  ],
  "deny_keys": [
    "1111111111111111111111111111111111111111111111111111111111111111"
  ],
  "lease": {
    "max_ms": 10000,
    "margin_ms": 1000
  },
  "key_policy": {
    "mode": "managed",
    "revalidate_every_s": 900,
    "revalidate_grace_s": 14400
  }
}
`

func good() *config.Config {
	return &config.Config{
		Version: 1, KMSKeyARN: "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
		Keyring: "main", Epochs: []uint32{1, 2}, SealEpoch: 2,
		Create: []config.Create{{record.Ed25519, "all", 10}, {record.Secp256k1, "messages", 1_000_000}},
		Policies: []config.Policy{
			{"all", []record.Kind{record.Message, record.Raw, record.Digest}},
			{"messages", []record.Kind{record.Message}},
		},
		DenyKeys:  []string{strings.Repeat("1", 64)},
		Lease:     config.LeaseLimit{MaxMS: config.DefaultLeaseMaxMS, MarginMS: config.DefaultLeaseMarginMS},
		KeyPolicy: config.DefaultKeyPolicy(),
	}
}

func TestTheCanonicalFormIsReadAndWritten(t *testing.T) {
	t.Parallel()
	got, err := config.Parse([]byte(canonical))
	if err != nil {
		t.Fatalf("Parse: %v", err)
	}
	if diff := cmp.Diff(good(), got); diff != "" {
		t.Errorf("parsed: %s", diff)
	}
	b, err := config.Encode(good())
	if err != nil {
		t.Fatalf("Encode: %v", err)
	}
	if diff := cmp.Diff(canonical, string(b)); diff != "" {
		t.Errorf("encoded: %s", diff)
	}
}

func TestEmptyListsAreWrittenAsLists(t *testing.T) {
	t.Parallel()
	c := good()
	c.Create, c.DenyKeys = nil, nil
	b, err := config.Encode(c)
	if err != nil {
		t.Fatalf("Encode: %v", err)
	}
	if bytes.Contains(b, []byte("null")) {
		t.Errorf("a list is null:\n%s", b)
	}
	if _, err := config.Parse(b); err != nil {
		t.Errorf("Parse: %v", err)
	}
}

// The values were computed with Python's hashlib.
func TestPCR16IsTheExtendedMeasurement(t *testing.T) {
	t.Parallel()
	m, pcr, h := config.Measurement([]byte(canonical)), config.PCR16([]byte(canonical)), config.Hash([]byte(canonical))
	for _, tt := range []struct{ name, want, got string }{
		{"measurement", "d4a789811e5cbf4cbaf7912eaddad4d6ea08eebe18585b80a6e14069491a8975b110e253dccdb5a26591e0749dc3891a", hex.EncodeToString(m[:])},
		{"PCR16", "66eea631a413301ffab644b06832c3e45cec0ccbbf4104b3c38fab1bd7bf3c3689f57174dd8e0082e3350be60efed1c2", hex.EncodeToString(pcr[:])},
		{"hash", "7044d4fcbd2ad91e7128477432cdd61f6733f63457aeaeddeecdb12a7c0ec9cc", hex.EncodeToString(h[:])},
	} {
		if diff := cmp.Diff(tt.want, tt.got); diff != "" {
			t.Errorf("%s: %s", tt.name, diff)
		}
	}
}

func TestAPolicyHasThisHash(t *testing.T) {
	t.Parallel()
	h := good().Policies[1].Hash()
	if diff := cmp.Diff("5e3ff7f2a833cc6d0602b0affa86cff59732798eafaf3d20bb71e4efeac279d7", hex.EncodeToString(h[:])); diff != "" {
		t.Error(diff)
	}
	if good().Policies[0].Hash() == h {
		t.Error("two policies have one hash")
	}
}

func TestOtherSpellingsAreRefusedAndFormatted(t *testing.T) {
	t.Parallel()
	replace := func(old, repl string) string { return strings.Replace(canonical, old, repl, 1) }
	for name, s := range map[string]string{
		"no final newline": strings.TrimSuffix(canonical, "\n"),
		"two newlines":     canonical + "\n",
		"leading space":    " " + canonical,
		"tabs":             strings.ReplaceAll(canonical, "  ", "\t"),
		"one line":         strings.ReplaceAll(canonical, "\n", ""),
		"escaped letter":   replace(`"main"`, `"\u006dain"`),
		"key in capitals":  replace(`"keyring"`, `"KEYRING"`),
		"two spaces":       replace(`"keyring": "main"`, `"keyring":  "main"`),
		"other order":      strings.NewReplacer("  \"version\": 1,\n", "", "\"keyring\": \"main\",", "\"keyring\": \"main\", \"version\": 1,").Replace(canonical),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := config.Parse([]byte(s)); !errors.Is(err, config.ErrInvalid) {
				t.Errorf("Parse: got %v, want ErrInvalid", err)
			}
			b, err := config.Format([]byte(s))
			if err != nil {
				t.Fatalf("Format: %v", err)
			}
			if diff := cmp.Diff(canonical, string(b)); diff != "" {
				t.Errorf("Format: %s", diff)
			}
		})
	}
}

func TestWhatIsNoConfigIsRefused(t *testing.T) {
	t.Parallel()
	replace := func(old, repl string) string { return strings.Replace(canonical, old, repl, 1) }
	for name, s := range map[string]string{
		"nothing":          "",
		"null":             "null\n",
		"a list":           "[]\n",
		"cut off":          canonical[:len(canonical)-3],
		"unknown key":      replace(`"keyring"`, `"roots": "mine", "keyring"`),
		"unknown deep key": replace(`"max": 10`, `"min": 1, "max": 10`),
		"a second value":   canonical + "{}\n",
		"stray brace":      canonical + "}\n",
		"stray bracket":    canonical + "]\n",
		"trailing text":    canonical + "x",
		"negative epoch":   replace("    1,\n", "    -1,\n"),
		"epoch over 32bit": replace("    2\n", "    4294967298\n"),
		"fraction":         replace(`"max": 10`, `"max": 10.5`),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if s == canonical {
				t.Fatal("the test changes nothing")
			}
			if _, err := config.Parse([]byte(s)); !errors.Is(err, config.ErrInvalid) {
				t.Errorf("Parse: got %v, want ErrInvalid", err)
			}
			if _, err := config.Format([]byte(s)); !errors.Is(err, config.ErrInvalid) {
				t.Errorf("Format: got %v, want ErrInvalid", err)
			}
		})
	}
	if _, err := config.Parse([]byte(replace(`"keyring": "main"`, `"keyring": "x", "keyring": "main"`))); !errors.Is(err, config.ErrInvalid) {
		t.Errorf("a doubled key: got %v, want ErrInvalid", err)
	}
	if _, err := config.Parse(append([]byte(canonical), bytes.Repeat([]byte(" "), config.MaxLen)...)); !errors.Is(err, config.ErrInvalid) {
		t.Errorf("too long: got %v, want ErrInvalid", err)
	}
}

func TestEveryFieldIsValidated(t *testing.T) {
	t.Parallel()
	const arn = "arn:aws:kms:eu-central-1:111122223333:key/"
	tests := []struct {
		field string // what the error must name
		edit  func(*config.Config)
	}{
		{"version", func(c *config.Config) { c.Version = 0 }},
		{"version", func(c *config.Config) { c.Version = 2 }},
		{"kms_key_arn", func(c *config.Config) { c.KMSKeyARN = "" }},
		{"kms_key_arn", func(c *config.Config) { c.KMSKeyARN = "1234abcd-12ab-34cd-56ef-1234567890ab" }},
		{"kms_key_arn", func(c *config.Config) { c.KMSKeyARN = "arn:aws:kms:eu-central-1:111122223333:alias/main" }},
		{"kms_key_arn", func(c *config.Config) { c.KMSKeyARN = arn + "mrk-1234abcd12ab34cd56ef1234567890ab" }},
		{"kms_key_arn", func(c *config.Config) { c.KMSKeyARN = arn + "1234ABCD-12ab-34cd-56ef-1234567890ab" }},
		{"kms_key_arn", func(c *config.Config) { c.KMSKeyARN += "\n" }},
		{"kms_key_arn", func(c *config.Config) { c.KMSKeyARN = "x" + c.KMSKeyARN }},
		{"kms_key_arn", func(c *config.Config) { c.KMSKeyARN = strings.Replace(c.KMSKeyARN, "eu-central-1", "evil.example/", 1) }},
		{"kms_key_arn", func(c *config.Config) { c.KMSKeyARN = strings.Replace(c.KMSKeyARN, "111122223333", "11112222333", 1) }},
		{"kms_key_arn", func(c *config.Config) { c.KMSKeyARN = strings.Replace(c.KMSKeyARN, ":aws:", ":aws-iso:", 1) }},
		{"keyring", func(c *config.Config) { c.Keyring = "" }},
		{"keyring", func(c *config.Config) { c.Keyring = "Main" }},
		{"keyring", func(c *config.Config) { c.Keyring = "a#1" }},
		{"keyring", func(c *config.Config) { c.Keyring = strings.Repeat("a", 64) }},
		{"open_epochs", func(c *config.Config) { c.Epochs = nil }},
		{"open_epochs", func(c *config.Config) { c.Epochs = []uint32{0, 2} }},
		{"open_epochs", func(c *config.Config) { c.Epochs = []uint32{2, 1} }},
		{"open_epochs", func(c *config.Config) { c.Epochs = []uint32{2, 2} }},
		{"seal_epoch", func(c *config.Config) { c.SealEpoch = 3 }},
		{"seal_epoch", func(c *config.Config) { c.SealEpoch = 0 }},
		{"policies", func(c *config.Config) { c.Policies = nil }},
		{"policies[1].name", func(c *config.Config) { c.Policies[1].Name = "" }},
		{"policies[1].name", func(c *config.Config) { c.Policies[1].Name = "x y" }},
		{"policies must be sorted", func(c *config.Config) { c.Policies[0], c.Policies[1] = c.Policies[1], c.Policies[0] }},
		{"policies must be sorted", func(c *config.Config) { c.Policies[1].Name = "all" }},
		{"policies[1].kinds", func(c *config.Config) { c.Policies[1].Kinds = nil }},
		{"policies[1].kinds", func(c *config.Config) { c.Policies[1].Kinds = []record.Kind{"transaction"} }},
		{"policies[0].kinds", func(c *config.Config) { c.Policies[0].Kinds = []record.Kind{record.Raw, record.Message} }},
		{"policies[0].kinds", func(c *config.Config) { c.Policies[0].Kinds = []record.Kind{record.Raw, record.Raw} }},
		{"create[0].algorithm", func(c *config.Config) { c.Create[0].Algorithm = "dsa" }},
		{"create[1].policy", func(c *config.Config) { c.Create[1].Policy = "none" }},
		{"create[1].max", func(c *config.Config) { c.Create[1].Max = 0 }},
		{"create[1].max", func(c *config.Config) { c.Create[1].Max = -1 }},
		{"create[1].max", func(c *config.Config) { c.Create[1].Max = 10_000_001 }},
		{"create must be sorted", func(c *config.Config) { c.Create[0], c.Create[1] = c.Create[1], c.Create[0] }},
		{"create must be sorted", func(c *config.Config) { c.Create[1] = c.Create[0] }},
		{"deny_keys[0]", func(c *config.Config) { c.DenyKeys[0] = strings.Repeat("A", 64) }},
		{"deny_keys[0]", func(c *config.Config) { c.DenyKeys[0] = strings.Repeat("1", 63) }},
		{"deny_keys must be sorted", func(c *config.Config) { c.DenyKeys = append(c.DenyKeys, strings.Repeat("0", 64)) }},
		{"deny_keys must be sorted", func(c *config.Config) { c.DenyKeys = append(c.DenyKeys, c.DenyKeys[0]) }},
		{"lease.max_ms", func(c *config.Config) { c.Lease = config.LeaseLimit{MaxMS: 999, MarginMS: 100} }},
		{"lease.max_ms", func(c *config.Config) { c.Lease = config.LeaseLimit{MaxMS: 600_001, MarginMS: 100_000} }},
		{"lease.max_ms", func(c *config.Config) { c.Lease = config.LeaseLimit{} }},
		{"lease.max_ms", func(c *config.Config) { c.Lease.MaxMS = -10_000 }},
		{"lease.margin_ms", func(c *config.Config) { c.Lease.MarginMS = 999 }},
		{"lease.margin_ms", func(c *config.Config) { c.Lease.MarginMS = 5001 }},
		{"lease.margin_ms", func(c *config.Config) { c.Lease.MarginMS = -1000 }},
		{"key_policy.mode", func(c *config.Config) { c.KeyPolicy.Mode = "" }},
		{"key_policy.mode", func(c *config.Config) { c.KeyPolicy.Mode = "Sealed" }},
		{"key_policy.revalidate_every_s", func(c *config.Config) { c.KeyPolicy.RevalidateEveryS = 4 }},
		{"key_policy.revalidate_every_s", func(c *config.Config) { c.KeyPolicy.RevalidateEveryS = 24*60*60 + 1 }},
		{"key_policy.revalidate_grace_s", func(c *config.Config) { c.KeyPolicy.RevalidateGraceS = 899 }},
		{"key_policy.revalidate_grace_s", func(c *config.Config) { c.KeyPolicy.RevalidateGraceS = 7*24*60*60 + 1 }},
		{"key_policy.revalidate_grace_s", func(c *config.Config) { c.KeyPolicy.RevalidateGraceS = -1 }},
		{"lease.margin_ms", func(c *config.Config) { c.Lease.MarginMS = 1<<62 + 1<<60 }}, // times 2 and 10 it wraps around
	}
	for i, tt := range tests {
		t.Run(fmt.Sprint(i, " ", tt.field), func(t *testing.T) {
			t.Parallel()
			c := good()
			tt.edit(c)
			err := c.Validate()
			if !errors.Is(err, config.ErrInvalid) || !strings.Contains(err.Error(), tt.field) {
				t.Fatalf("Validate: got %v, want it to name %s", err, tt.field)
			}
			b, err := config.Encode(c)
			if err != nil {
				t.Fatalf("Encode: %v", err)
			}
			if _, err := config.Parse(b); !errors.Is(err, config.ErrInvalid) {
				t.Errorf("Parse: got %v, want ErrInvalid", err)
			}
		})
	}
}

func TestEverythingWrongIsReportedAtOnce(t *testing.T) {
	t.Parallel()
	err := (&config.Config{}).Validate()
	for _, field := range []string{"version", "kms_key_arn", "keyring", "open_epochs", "seal_epoch", "policies", "lease.max_ms", "key_policy.mode"} {
		if err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("%s is missing in: %v", field, err)
		}
	}
}

func TestEveryProblemNamesItsTopLevelField(t *testing.T) {
	t.Parallel()
	c := good()
	c.Version, c.Policies[1].Name, c.Create[0].Max, c.Lease.MaxMS, c.DenyKeys[0] = 3, "X", 0, 1, "x"
	var got []string
	for _, f := range config.FieldErrors(fmt.Errorf("read it: %w", c.Validate())) {
		got = append(got, f.Field)
		if !errors.Is(f, config.ErrInvalid) || !strings.HasPrefix(f.Text, f.Field) {
			t.Errorf("%q is no reason to refuse, or does not start with its field", f.Text)
		}
	}
	// Of a name that is out of order too, and a lease whose margin no longer fits.
	want := []string{"version", "policies", "policies", "create", "create", "deny_keys", "lease", "lease"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if fs := config.FieldErrors(errors.New("of another kind")); fs != nil {
		t.Errorf("another error has %d fields", len(fs))
	}
}

func TestLimitsAtTheirEdgesAreValid(t *testing.T) {
	t.Parallel()
	for name, edit := range map[string]func(*config.Config){
		"shortest lease":   func(c *config.Config) { c.Lease = config.LeaseLimit{MaxMS: 1000, MarginMS: 100} },
		"longest lease":    func(c *config.Config) { c.Lease = config.LeaseLimit{MaxMS: 600_000, MarginMS: 300_000} },
		"tenth rounded up": func(c *config.Config) { c.Lease = config.LeaseLimit{MaxMS: 1001, MarginMS: 101} },
		"soonest proof":    func(c *config.Config) { c.KeyPolicy.RevalidateEveryS, c.KeyPolicy.RevalidateGraceS = 5, 5 },
		"latest proof":     func(c *config.Config) { c.KeyPolicy.RevalidateEveryS, c.KeyPolicy.RevalidateGraceS = 86400, 7*86400 },
		"sealed":           func(c *config.Config) { c.KeyPolicy.Mode = keypolicy.Sealed },
		"longest name":     func(c *config.Config) { c.Keyring = strings.Repeat("a", 63) },
		"China":            func(c *config.Config) { c.KMSKeyARN = strings.Replace(c.KMSKeyARN, ":aws:", ":aws-cn:", 1) },
		"GovCloud": func(c *config.Config) {
			c.KMSKeyARN = strings.NewReplacer(":aws:", ":aws-us-gov:", "eu-central-1", "us-gov-west-1").Replace(c.KMSKeyARN)
		},
		"nothing to create": func(c *config.Config) { c.Create = nil },
		"most keys":         func(c *config.Config) { c.Create[0].Max = 10_000_000 },
	} {
		c := good()
		edit(c)
		if err := c.Validate(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWhatThePartsSay(t *testing.T) {
	t.Parallel()
	c := good()
	if c.Lease.Max() != 10*time.Second || c.Lease.Margin() != time.Second {
		t.Errorf("lease %v, margin %v", c.Lease.Max(), c.Lease.Margin())
	}
	if p, ok := c.Policy("messages"); !ok || !p.Permits(record.Message) || p.Permits(record.Raw) || p.Permits(record.Digest) || p.Permits("") {
		t.Errorf("policy messages is %+v, %v", p, ok)
	}
	if p, ok := c.Policy("none"); ok || p.Permits(record.Message) {
		t.Errorf("a policy that is not there is %+v", p)
	}
	for _, tt := range []struct {
		algorithm record.Algorithm
		policy    string
		want      int
	}{
		{record.Ed25519, "all", 10},
		{record.Secp256k1, "messages", 1_000_000},
		{record.Ed25519, "messages", 0},
		{record.P256, "all", 0},
		{"", "", 0},
	} {
		if got := c.MaxCreate(tt.algorithm, tt.policy); got != tt.want {
			t.Errorf("MaxCreate(%s, %s) = %d, want %d", tt.algorithm, tt.policy, got, tt.want)
		}
	}
}

func FuzzParseTakesOnlyTheCanonicalForm(f *testing.F) {
	f.Add([]byte(canonical))
	f.Add([]byte(strings.ReplaceAll(canonical, "\n", " ")))
	f.Fuzz(func(t *testing.T, raw []byte) {
		c, err := config.Parse(raw)
		if err != nil {
			if !errors.Is(err, config.ErrInvalid) {
				t.Errorf("got %v, want ErrInvalid", err)
			}
			return
		}
		again, err := config.Encode(c)
		if err != nil || !slices.Equal(again, raw) {
			t.Errorf("encodes to other bytes: %v", err)
		}
	})
}

func FuzzFormatGivesWhatParseTakes(f *testing.F) {
	f.Add([]byte(canonical))
	f.Add([]byte(strings.ReplaceAll(canonical, "\n", " ")))
	f.Fuzz(func(t *testing.T, raw []byte) {
		b, err := config.Format(raw)
		if err != nil || len(b) > config.MaxLen {
			return
		}
		if _, err := config.Parse(b); err != nil {
			t.Errorf("Parse refuses what Format wrote: %v", err)
		}
	})
}
