// Package config reads the measured config of an enclave and computes the value
// that it gives PCR16. It refuses every text but the canonical one, so a config
// has one meaning, one spelling and one hash.
package config

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/keypolicy"
)

// MaxLen bounds a config in bytes; it holds a deny list of some thousand keys.
const MaxLen = 256 << 10

// Domain strings of the hashes made here.
const (
	configDomain = "keyhold-config-v1"
	policyDomain = "keyhold-policy-v1\x00"
)

// ErrInvalid wraps every reason to refuse a config.
var ErrInvalid = errors.New("config")

// Config is everything that decides what an enclave does with keys. Its bytes
// are measured into PCR16 before they are parsed.
type Config struct {
	Version   int        `json:"version"`     // 1
	KMSKeyARN string     `json:"kms_key_arn"` // full ARN of a symmetric key; region and host follow from it
	Keyring   string     `json:"keyring"`     // name, in the KMS encryption context
	Epochs    []uint32   `json:"open_epochs"` // ascending; the epochs that may be opened
	SealEpoch uint32     `json:"seal_epoch"`  // the one of them under which new keys are sealed
	Create    []Create   `json:"create"`      // what may be created; sorted by algorithm, then policy
	Policies  []Policy   `json:"policies"`    // sorted by name
	DenyKeys  []string   `json:"deny_keys"`   // key ids that never sign; sorted
	Lease     LeaseLimit `json:"lease"`
	KeyPolicy KeyPolicy  `json:"key_policy"`
}

// Create permits keys of one algorithm and policy to be made.
type Create struct {
	Algorithm record.Algorithm `json:"algorithm"`
	Policy    string           `json:"policy"`
	Max       int              `json:"max"` // keys of this pair that one enclave may hold when it makes another
}

// Policy says what a key may sign.
type Policy struct {
	Name  string        `json:"name"`
	Kinds []record.Kind `json:"kinds"` // in the order of record.Kinds
}

// LeaseLimit bounds the lease that a parent may ask for, in milliseconds.
type LeaseLimit struct {
	MaxMS    int64 `json:"max_ms"`    // a longer lease_ms is cut to this
	MarginMS int64 `json:"margin_ms"` // signatures are released until this long before the lease ends; covers clock rate drift
}

// KeyPolicy says what the enclave asks of the policy of its KMS key.
type KeyPolicy struct {
	Mode             keypolicy.Mode `json:"mode"`               // who may change the policy
	RevalidateEveryS int64          `json:"revalidate_every_s"` // policy and attested Decrypt are tried again this often
	RevalidateGraceS int64          `json:"revalidate_grace_s"` // the enclave ends when it could not for this long
}

// RevalidateEvery is the time between two proofs.
func (k KeyPolicy) RevalidateEvery() time.Duration {
	return time.Duration(k.RevalidateEveryS) * time.Second
}

// RevalidateGrace is how long an enclave goes on after its last proof.
func (k KeyPolicy) RevalidateGrace() time.Duration {
	return time.Duration(k.RevalidateGraceS) * time.Second
}

// DefaultKeyPolicy is for a fleet that is to be upgraded: every 15 minutes, for
// up to 4 hours without KMS.
func DefaultKeyPolicy() KeyPolicy {
	return KeyPolicy{Mode: keypolicy.Managed, RevalidateEveryS: 15 * 60, RevalidateGraceS: 4 * 60 * 60}
}

// Bounds of the times in KeyPolicy, in seconds.
const (
	minRevalidate = 5
	maxRevalidate = 24 * 60 * 60
	maxGrace      = 7 * 24 * 60 * 60
)

// Max is the longest lease.
func (l LeaseLimit) Max() time.Duration { return time.Duration(l.MaxMS) * time.Millisecond }

// Margin is the time before a lease's end in which nothing is released.
func (l LeaseLimit) Margin() time.Duration { return time.Duration(l.MarginMS) * time.Millisecond }

// Default lease limits: a lease of 10 s with a margin of 1 s holds for clocks
// whose rates differ by up to 1 %, with room to spare.
const (
	DefaultLeaseMaxMS    = 10_000
	DefaultLeaseMarginMS = 1_000
)

// Parse reads a config. raw must be exactly what Encode gives for its meaning:
// that refuses unknown and doubled keys, other spellings of numbers and keys,
// and trailing bytes.
func Parse(raw []byte) (*Config, error) {
	if len(raw) > MaxLen {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrInvalid, MaxLen)
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	var c Config
	if err := dec.Decode(&c); err != nil {
		return nil, fmt.Errorf("%w: not the JSON of a config: %w", ErrInvalid, err)
	}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	canonical, err := Encode(&c)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(canonical, raw) { //nolint:forbidigo // a config is public
		return nil, fmt.Errorf("%w: not in canonical form: rewrite it with keyhold config format", ErrInvalid)
	}
	return &c, nil
}

// Format rewrites the JSON of a config, in any spelling, into the canonical form.
func Format(raw []byte) ([]byte, error) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	var c Config
	if err := dec.Decode(&c); err != nil {
		return nil, fmt.Errorf("%w: not the JSON of a config: %w", ErrInvalid, err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) { // More is false before a stray bracket
		return nil, fmt.Errorf("%w: more than one JSON value", ErrInvalid)
	}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	return Encode(&c)
}

// Encode returns the canonical bytes of c: JSON with two spaces of indent, keys
// in the order of the struct, one newline at the end.
func Encode(c *Config) ([]byte, error) {
	d := *c
	if d.Create == nil {
		d.Create = []Create{}
	}
	if d.DenyKeys == nil {
		d.DenyKeys = []string{}
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(&d); err != nil {
		return nil, fmt.Errorf("%w: encode: %w", ErrInvalid, err)
	}
	return b.Bytes(), nil
}

// A full ARN of a single-region key: multi-region keys (mrk-) have replicas with
// policies of their own, aliases can be moved.
var (
	arnForm  = regexp.MustCompile(`^arn:(aws|aws-cn|aws-us-gov):kms:[a-z]{2}(-[a-z]+)+-\d:\d{12}:key/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	nameForm = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)
)

// Validate reports everything that is wrong with c, as FieldErrors.
func (c *Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, newFieldError(fmt.Sprintf(format, args...)))
	}
	if c.Version != 1 {
		bad("version must be 1")
	}
	if !arnForm.MatchString(c.KMSKeyARN) {
		bad("kms_key_arn must be the full ARN of a single-region key, not an alias")
	}
	if !nameForm.MatchString(c.Keyring) {
		bad("keyring must be a name of lower-case letters, digits and hyphens")
	}
	if len(c.Epochs) == 0 || !ascending(c.Epochs) || c.Epochs[0] == 0 {
		bad("open_epochs must be ascending numbers from 1")
	}
	if !slices.Contains(c.Epochs, c.SealEpoch) {
		bad("seal_epoch must be one of open_epochs")
	}
	c.validatePolicies(bad)
	c.validateCreate(bad)
	c.validateDenied(bad)
	if c.Lease.MaxMS < 1000 || c.Lease.MaxMS > 600_000 {
		bad("lease.max_ms must be between 1000 and 600000")
	}
	// Divided, not multiplied: a huge margin would wrap around.
	if c.Lease.MarginMS < (c.Lease.MaxMS+9)/10 || c.Lease.MarginMS > c.Lease.MaxMS/2 {
		bad("lease.margin_ms must be between a tenth and a half of lease.max_ms")
	}
	c.validateKeyPolicy(bad)
	return errors.Join(errs...)
}

func (c *Config) validateKeyPolicy(bad func(string, ...any)) {
	if c.KeyPolicy.Mode != keypolicy.Managed && c.KeyPolicy.Mode != keypolicy.Sealed {
		bad("key_policy.mode must be %s or %s", keypolicy.Managed, keypolicy.Sealed)
	}
	if c.KeyPolicy.RevalidateEveryS < minRevalidate || c.KeyPolicy.RevalidateEveryS > maxRevalidate {
		bad("key_policy.revalidate_every_s must be between %d and %d", minRevalidate, maxRevalidate)
	}
	if c.KeyPolicy.RevalidateGraceS < c.KeyPolicy.RevalidateEveryS || c.KeyPolicy.RevalidateGraceS > maxGrace {
		bad("key_policy.revalidate_grace_s must be between revalidate_every_s and %d", maxGrace)
	}
}

func (c *Config) validatePolicies(bad func(string, ...any)) {
	if len(c.Policies) == 0 {
		bad("policies must name at least one policy")
	}
	for i, p := range c.Policies {
		if !nameForm.MatchString(p.Name) {
			bad("policies[%d].name must be a name of lower-case letters, digits and hyphens", i)
		}
		if i > 0 && c.Policies[i-1].Name >= p.Name {
			bad("policies must be sorted by name, each once")
		}
		if len(p.Kinds) == 0 || !inOrder(p.Kinds) {
			bad("policies[%d].kinds must be some of %v in that order", i, record.Kinds())
		}
	}
}

func (c *Config) validateCreate(bad func(string, ...any)) {
	for i, k := range c.Create {
		if k.Algorithm.SignatureLen() == 0 {
			bad("create[%d].algorithm must be one of %v", i, record.Algorithms())
		}
		if _, ok := c.Policy(k.Policy); !ok {
			bad("create[%d].policy is not one of policies", i)
		}
		if k.Max < 1 || k.Max > 10_000_000 {
			bad("create[%d].max must be between 1 and 10000000", i)
		}
		if i > 0 && pairKey(c.Create[i-1]) >= pairKey(k) {
			bad("create must be sorted by algorithm and policy, each pair once")
		}
	}
}

func (c *Config) validateDenied(bad func(string, ...any)) {
	for i, k := range c.DenyKeys {
		if _, err := record.ParseKeyID(k); err != nil {
			bad("deny_keys[%d] must be 64 hex digits", i)
		}
	}
	if !ascending(c.DenyKeys) {
		bad("deny_keys must be sorted, each once")
	}
}

func pairKey(c Create) string { return string(c.Algorithm) + "\x00" + c.Policy }

func ascending[T interface{ ~string | ~uint32 }](s []T) bool {
	for i := 1; i < len(s); i++ {
		if s[i-1] >= s[i] {
			return false
		}
	}
	return true
}

func inOrder(ks []record.Kind) bool {
	last := -1
	for _, k := range ks {
		i := slices.Index(record.Kinds(), k)
		if i <= last {
			return false
		}
		last = i
	}
	return true
}

// Policy returns the policy of that name.
func (c *Config) Policy(name string) (Policy, bool) {
	i := slices.IndexFunc(c.Policies, func(p Policy) bool { return p.Name == name })
	if i < 0 {
		return Policy{}, false
	}
	return c.Policies[i], true
}

// Permits reports whether a key under p may sign kind k.
func (p Policy) Permits(k record.Kind) bool { return slices.Contains(p.Kinds, k) }

// Hash returns the SHA-256 of p's canonical JSON under its own domain; receipts
// carry it.
func (p Policy) Hash() [32]byte {
	b, err := json.Marshal(p)
	if err != nil {
		panic("config: policy of strings does not marshal: " + err.Error())
	}
	return sha256.Sum256(append([]byte(policyDomain), b...))
}

// MaxCreate returns how many keys of the pair may exist when one more is made;
// 0 where the pair may not be created.
func (c *Config) MaxCreate(a record.Algorithm, policy string) int {
	for _, k := range c.Create {
		if k.Algorithm == a && k.Policy == policy {
			return k.Max
		}
	}
	return 0
}

// Measurement returns what PCR16 is extended with: SHA-384 of the domain and raw.
func Measurement(raw []byte) [48]byte {
	return sha512.Sum384(append([]byte(configDomain), raw...))
}

// PCR16 returns the value of that register after the NSM extended zeros with
// Measurement(raw): SHA-384(48 zero bytes || measurement).
func PCR16(raw []byte) [48]byte {
	m := Measurement(raw)
	return sha512.Sum384(append(make([]byte, 48), m[:]...))
}

// Hash returns the SHA-256 of raw; boot statements carry it.
func Hash(raw []byte) [32]byte { return sha256.Sum256(raw) }
