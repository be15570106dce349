package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/keypolicy"
)

// question is one thing that a config says. A field that the config gets one
// day is one row more.
type question struct {
	name    string // of the flag, and in a file of answers
	ask     string // for a person
	form    string // how an answer looks
	field   string // of the config that the answer fills: its errors are this answer's
	initial func(c *config.Config) string
	set     func(c *config.Config, answer string) error
}

// noAnswer is the empty list, where a person cannot just type nothing.
const noAnswer = "none"

const (
	defaultKeyring = "main"
	defaultPolicy  = "messages"
	defaultMax     = 1000 // keys
)

// questions are asked in this order: a default may look at the answers before.
var questions = []question{
	{
		"kms-key-arn", "Which KMS key protects the keyring?", "full ARN of a single-region key", "kms_key_arn",
		nil,
		func(c *config.Config, s string) error { c.KMSKeyARN = s; return nil },
	},
	{
		"keyring", "What is the keyring called?", "lower-case letters, digits, hyphens", "keyring",
		func(*config.Config) string { return defaultKeyring },
		func(c *config.Config, s string) error { c.Keyring = s; return nil },
	},
	{
		"open-epochs", "Which epochs of it may be opened?", "numbers, as 1 2", "open_epochs",
		func(*config.Config) string { return "1" },
		setEpochs,
	},
	{
		"seal-epoch", "Under which of them are new keys sealed?", "a number", "seal_epoch",
		func(c *config.Config) string { return fmt.Sprint(slices.Max(append(slices.Clone(c.Epochs), 0))) },
		func(c *config.Config, s string) (err error) { c.SealEpoch, err = epoch(s); return err },
	},
	{
		"policies", "Which policies are there, and which kinds may their keys sign?", "NAME:KIND[,KIND], as payouts:message open:message,raw,digest", "policies",
		func(*config.Config) string { return defaultPolicy + ":" + string(record.Message) },
		setPolicies,
	},
	{
		"create", "Which keys may be made, and how many?", "ALGORITHM:POLICY:MOST, as secp256k1:payouts:1000, or none", "create",
		func(c *config.Config) string {
			if len(c.Policies) == 0 {
				return noAnswer
			}
			return fmt.Sprintf("%s:%s:%d", record.Secp256k1, c.Policies[0].Name, defaultMax)
		},
		setCreate,
	},
	{
		"deny-keys", "Which keys must never sign?", "key ids, or none", "deny_keys",
		func(*config.Config) string { return noAnswer },
		func(c *config.Config, s string) error {
			c.DenyKeys = sortedFields(s)
			return nil
		},
	},
	{
		"lease", "How long may a parent hold a batch?", "a duration, as 10s", "lease",
		func(*config.Config) string { return milliseconds(config.DefaultLeaseMaxMS) },
		func(c *config.Config, s string) (err error) {
			c.Lease.MaxMS, err = duration(s)
			c.Lease.MarginMS = (c.Lease.MaxMS + 9) / 10 // the next question's default
			return err
		},
	},
	{
		"margin", "How long before a lease's end is nothing released any more?", "a duration, a tenth to a half of the lease", "lease",
		func(c *config.Config) string { return milliseconds(c.Lease.MarginMS) },
		func(c *config.Config, s string) (err error) { c.Lease.MarginMS, err = duration(s); return err },
	},
	{
		"mode", "Who may change the policy of the KMS key?", "managed: its administrators; sealed: nobody ever again, so no new image and no new config", "key_policy",
		func(*config.Config) string { return string(keypolicy.Managed) },
		func(c *config.Config, s string) error {
			c.KeyPolicy = config.DefaultKeyPolicy() // the next questions' defaults
			c.KeyPolicy.Mode = keypolicy.Mode(s)
			return nil
		},
	},
	{
		"revalidate-every", "How often does an enclave prove the key policy again?", "a duration, as 15m", "key_policy",
		func(*config.Config) string { return config.DefaultKeyPolicy().RevalidateEvery().String() },
		func(c *config.Config, s string) (err error) {
			c.KeyPolicy.RevalidateEveryS, err = seconds(s)
			c.KeyPolicy.RevalidateGraceS = max(c.KeyPolicy.RevalidateGraceS, c.KeyPolicy.RevalidateEveryS) // the next question's default
			return err
		},
	},
	{
		"revalidate-grace", "How long does it go on when KMS cannot be reached?", "a duration, as 4h", "key_policy",
		func(c *config.Config) string { return c.KeyPolicy.RevalidateGrace().String() },
		func(c *config.Config, s string) (err error) {
			c.KeyPolicy.RevalidateGraceS, err = seconds(s)
			return err
		},
	},
}

var (
	errEpoch    = errors.New("want numbers from 1 to 4294967295")
	errDuration = errors.New("want a duration in whole milliseconds, as 10s or 500ms")
	errSeconds  = errors.New("want a duration in whole seconds, as 15m or 4h")
	errPolicies = errors.New("want NAME:KIND[,KIND] each")
	errCreate   = errors.New("want ALGORITHM:POLICY:MOST each")
)

func epoch(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n == 0 {
		return 0, errEpoch
	}
	return uint32(n), nil
}

func seconds(s string) (int64, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d%time.Second != 0 {
		return 0, errSeconds
	}
	return int64(d / time.Second), nil
}

func setEpochs(c *config.Config, s string) error {
	c.Epochs = nil
	for _, word := range strings.Fields(s) {
		n, err := epoch(word)
		if err != nil {
			return err
		}
		c.Epochs = append(c.Epochs, n)
	}
	slices.Sort(c.Epochs)
	return nil
}

func setPolicies(c *config.Config, s string) error {
	c.Policies = nil
	for _, word := range strings.Fields(s) {
		name, list, ok := strings.Cut(word, ":")
		if !ok {
			return errPolicies
		}
		p := config.Policy{Name: name}
		for _, text := range strings.Split(list, ",") {
			kind, err := record.ParseKind(text)
			if err != nil {
				return err
			}
			p.Kinds = append(p.Kinds, kind)
		}
		slices.SortFunc(p.Kinds, func(a, b record.Kind) int {
			return slices.Index(record.Kinds(), a) - slices.Index(record.Kinds(), b)
		})
		c.Policies = append(c.Policies, p)
	}
	slices.SortStableFunc(c.Policies, func(a, b config.Policy) int { return strings.Compare(a.Name, b.Name) })
	return nil
}

func setCreate(c *config.Config, s string) error {
	c.Create = nil
	for _, word := range sortedFields(s) {
		parts := strings.Split(word, ":")
		if len(parts) != 3 {
			return errCreate
		}
		a, err := record.ParseAlgorithm(parts[0])
		if err != nil {
			return err
		}
		most, err := strconv.Atoi(parts[2])
		if err != nil {
			return errCreate
		}
		c.Create = append(c.Create, config.Create{Algorithm: a, Policy: parts[1], Max: most})
	}
	slices.SortStableFunc(c.Create, func(a, b config.Create) int {
		return strings.Compare(string(a.Algorithm)+"\x00"+a.Policy, string(b.Algorithm)+"\x00"+b.Policy)
	})
	return nil
}

// sortedFields are the words of an answer, none of them for noAnswer.
func sortedFields(s string) []string {
	words := strings.Fields(s)
	if len(words) == 1 && words[0] == noAnswer {
		return nil
	}
	slices.Sort(words)
	return words
}

func duration(s string) (int64, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d%time.Millisecond != 0 {
		return 0, errDuration
	}
	return d.Milliseconds(), nil
}

func milliseconds(n int64) string { return (time.Duration(n) * time.Millisecond).String() }

// answer fills c, and says what is wrong with this answer as far as it can be
// known by now.
func (q *question) answer(c *config.Config, text string) error {
	if err := q.set(c, strings.TrimSpace(text)); err != nil {
		return err
	}
	var errs []error
	for _, f := range config.FieldErrors(c.Validate()) {
		if f.Field == q.field {
			errs = append(errs, f)
		}
	}
	return errors.Join(errs...)
}

// given is an answer that somebody gave, and where.
type given struct{ text, where string }

// readAnswers reads lines "NAME = ANSWER". Empty lines and those that start with
// # are skipped; a name may come once.
func readAnswers(r io.Reader, path string) (map[string]given, error) {
	out := map[string]given{}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, config.MaxLen) // a deny list is one long line
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		where := fmt.Sprintf("%s:%d", path, n)
		name, text, ok := strings.Cut(line, "=")
		name = strings.TrimSpace(name)
		switch {
		case !ok:
			return nil, fmt.Errorf("%s: want NAME = ANSWER", where)
		case !slices.ContainsFunc(questions, func(q question) bool { return q.name == name }):
			return nil, fmt.Errorf("%s: there is no answer of this name: want one of %s", where, questionNames())
		case out[name] != given{}:
			return nil, fmt.Errorf("%s: %s was answered before", where, name)
		}
		out[name] = given{strings.TrimSpace(text), where}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read the answers: %w", err)
	}
	return out, nil
}

func questionNames() string {
	var names []string
	for _, q := range questions {
		names = append(names, q.name)
	}
	return strings.Join(names, ", ")
}
