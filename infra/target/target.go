// Package target says what is deployed where: profile, account, instances, the
// release that runs and the pairs of image and config that the key is released
// to. It refuses every combination that would fail, or would be unsafe, after
// something has been deployed. It knows nothing of CDK and needs no Node.
package target

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/keyhold/keyhold/keypolicy"
)

// Target is one deployment.
type Target struct {
	Profile  Profile
	Instance Instance
	Account  string // 12 digits
	Region   string
	Zones    []string // two
	AMI      string   // of Amazon Linux 2023: pinned, so that a deployment changes what it says and nothing else
	Release  *Release // what the instances run
	Admit    []*Release
	Creating bool     // keyrings and keys can be made
	Sealed   bool     // nobody can change the key policy any more
	Admins   []string // ARNs of roles that administer the keys
	Email    string   // that alarms are sent to; empty: subscribe to the topic later
}

// The values that Read asks for, as they are given to cdk with -c.
const (
	KeyProfile  = "profile"
	KeyArch     = "arch"
	KeyAccount  = "account"
	KeyRegion   = "region"
	KeyZones    = "zones"
	KeyAMI      = "ami"
	KeyInstance = "instance"
	KeyRelease  = "release"
	KeyAdmit    = "admit"
	KeyKeyring  = "keyring"
	KeySeal     = "seal"
	KeyAdmins   = "admins"
	KeyEmail    = "email"
)

// Keys lists them in the order in which a person reads them.
func Keys() []string {
	return []string{
		KeyProfile, KeyArch, KeyAccount, KeyRegion, KeyZones, KeyAMI, KeyInstance, KeyRelease, KeyAdmit, KeyKeyring,
		KeySeal, KeyAdmins, KeyEmail,
	}
}

// Values of some of them.
const (
	AdmitNone     = "none"   // release the key to nobody: before there is a config
	KeyringCreate = "create" // while keyrings and keys are made
	KeyringClosed = "closed"
)

// SealWords must be typed to give up changing the policy for ever.
const SealWords = "nobody can ever change this key policy again"

var (
	accountForm = regexp.MustCompile(`^\d{12}$`)
	regionForm  = regexp.MustCompile(`^[a-z]{2}(-[a-z]+)+-\d$`)
	amiForm     = regexp.MustCompile(`^ami-([0-9a-f]{8}|[0-9a-f]{17})$`)
	emailForm   = regexp.MustCompile(`^[^@\s]+@[^@\s]+\.[^@\s]+$`)
)

// Read makes a target of what get returns for each of Keys; what is not given is
// empty there. It joins everything that is wrong.
func Read(get func(key string) string) (*Target, error) {
	t := &Target{Account: get(KeyAccount), Region: get(KeyRegion), AMI: get(KeyAMI), Email: get(KeyEmail)}
	var errs []error
	try := func(err error) { errs = append(errs, err) }
	bad := func(is bool, format string, args ...any) {
		if is {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	var err error
	t.Profile, err = profile(get(KeyProfile))
	try(err)
	arch := Arch(get(KeyArch))
	if arch != AMD64 && arch != ARM64 {
		try(fmt.Errorf("arch %q: want %s or %s", arch, AMD64, ARM64))
	} else {
		t.Instance, err = instance(get(KeyInstance), arch)
		try(err)
	}
	bad(!accountForm.MatchString(t.Account), "account: want 12 digits, or AWS credentials from which the CDK CLI learns it")
	bad(!regionForm.MatchString(t.Region), "region: want one as eu-central-1, or a profile from which the CDK CLI learns it")
	bad(!amiForm.MatchString(t.AMI), "ami: want the id of an Amazon Linux 2023 image, as %s prints it", findAMI(arch, t.Region))
	bad(t.Email != "" && !emailForm.MatchString(t.Email), "email: not an address")
	try(t.readZones(get(KeyZones)))
	try(t.readAdmins(get(KeyAdmins)))
	try(t.readReleases(arch, get(KeyRelease), get(KeyAdmit)))
	try(t.readStage(get(KeyKeyring), get(KeySeal)))
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if err := t.checkMode(); err != nil {
		return nil, err
	}
	return t, t.checkPolicy()
}

// findAMI is the command that prints the newest image.
func findAMI(arch Arch, region string) string {
	machine := map[Arch]string{AMD64: "x86_64", ARM64: "arm64"}[arch]
	return fmt.Sprintf("aws ssm get-parameter --region %s --name /aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-%s --query Parameter.Value --output text", region, machine)
}

func (t *Target) readZones(text string) error {
	t.Zones = list(text)
	if text == "" && t.Region != "" {
		t.Zones = []string{t.Region + "a", t.Region + "b"}
	}
	if len(t.Zones) != 2 || t.Zones[0] == t.Zones[1] {
		return fmt.Errorf("zones: want two availability zones with a comma between them; one zone is one power failure")
	}
	for _, z := range t.Zones {
		if !strings.HasPrefix(z, t.Region) || len(z) != len(t.Region)+1 {
			return fmt.Errorf("zones: %q is not an availability zone of %s", z, t.Region)
		}
	}
	return nil
}

// readAdmins puts the role first with which CloudFormation deploys: without it
// the next deployment could not change the policy.
func (t *Target) readAdmins(text string) error {
	t.Admins = []string{fmt.Sprintf("arn:%s:iam::%s:role/cdk-%s-cfn-exec-role-%s-%s", t.Partition(), t.Account, BootstrapQualifier, t.Account, t.Region)}
	for _, arn := range list(text) {
		if slices.Contains(t.Admins, arn) {
			return fmt.Errorf("admins: %s is given twice", arn)
		}
		t.Admins = append(t.Admins, arn)
	}
	return nil
}

// BootstrapQualifier is that of the roles that cdk bootstrap makes.
const BootstrapQualifier = "hnb659fds"

func (t *Target) readReleases(arch Arch, running, admit string) error {
	if running == "" {
		return errors.New("release: want a folder that make dist wrote")
	}
	var err error
	if t.Release, err = OpenRelease(running); err != nil {
		return err
	}
	if t.Release.Arch != arch {
		return fmt.Errorf("release %s: its image is for %s, and arch is %s", running, t.Release.Arch, arch)
	}
	if err := t.Release.fits(t.Instance); err != nil {
		return err
	}
	if admit == AdmitNone {
		return nil
	}
	if admit == "" {
		return fmt.Errorf("admit: want the releases that get the key, with a comma between them, or %q", AdmitNone)
	}
	for _, dir := range list(admit) {
		r, err := OpenRelease(dir)
		if err != nil {
			return fmt.Errorf("admit: %w", err)
		}
		t.Admit = append(t.Admit, r)
	}
	return t.checkAdmitted()
}

// checkAdmitted refuses a fleet that would start and get no key.
func (t *Target) checkAdmitted() error {
	var errs []error
	for _, r := range t.Admit {
		if r.Config == nil {
			errs = append(errs, fmt.Errorf("release %s has no %s: make one with keyhold config build -o %s/%s", r.Dir, ConfigFile, r.Dir, ConfigFile))
			continue
		}
		if got := keyHome(r.Config.KMSKeyARN); got != [2]string{t.Region, t.Account} {
			errs = append(errs, fmt.Errorf("release %s: its config names a key of account %s in %s, and this is account %s in %s", r.Dir, got[1], got[0], t.Account, t.Region))
		}
		if r.Config.KMSKeyARN != t.Admit[0].Config.KMSKeyARN {
			errs = append(errs, fmt.Errorf("release %s: its config names another key than that of %s", r.Dir, t.Admit[0].Dir))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	var image bool
	for _, r := range t.Admit {
		if r.Pair() == t.Release.Pair() {
			return nil
		}
		image = image || r.PCR0 == t.Release.PCR0
	}
	if image {
		return fmt.Errorf("release %s: the policy would admit its image, but not with its config, which measures PCR16 %s", t.Release.Dir, short(t.Release.PCR16))
	}
	return fmt.Errorf("release %s: the policy would not admit its image, which measures PCR0 %s", t.Release.Dir, short(t.Release.PCR0))
}

// keyHome is region and account of a valid key ARN.
func keyHome(arn string) [2]string {
	f := strings.SplitN(arn, ":", 6)
	return [2]string{f[3], f[4]}
}

func (t *Target) readStage(keyring, seal string) error {
	var errs []error
	switch keyring {
	case KeyringCreate:
		t.Creating = true
	case KeyringClosed, "":
	default:
		errs = append(errs, fmt.Errorf("keyring %q: want %s or %s", keyring, KeyringCreate, KeyringClosed))
	}
	if t.Creating && len(t.Admit) == 0 {
		errs = append(errs, errors.New("keyring=create: nobody is admitted who could create one"))
	}
	switch seal {
	case SealWords:
		t.Sealed = true
	case "":
	default:
		errs = append(errs, fmt.Errorf("seal: to seal the key for ever, type the words %q", SealWords))
	}
	if t.Sealed && (t.Creating || len(t.Admit) != 1) {
		errs = append(errs, errors.New("seal: want exactly one admitted release and a closed keyring: whatever the policy says then, it says for ever"))
	}
	return errors.Join(errs...)
}

// checkMode refuses a fleet that would find the policy to be of the other mode than
// its config wants, and start no work.
func (t *Target) checkMode() error {
	if t.Idle() {
		return nil
	}
	mode := t.Spec().Mode
	if got := t.Release.Config.KeyPolicy.Mode; got != mode {
		return fmt.Errorf("release %s: its config wants the mode %s, and the policy would be %s: an enclave would refuse that; sealing takes a release with a config for it", t.Release.Dir, got, mode)
	}
	return nil
}

// checkPolicy lets the policy itself have the last word: it knows about pairs
// given twice, a third pair, and administrators that are no roles.
func (t *Target) checkPolicy() error {
	spec := t.Spec()
	if _, err := keypolicy.Build(spec); err != nil {
		return err
	}
	return nil
}

// Spec is what the policy of the keyring's key shall say. Its pairs are sorted,
// so that which release runs makes no difference to it.
func (t *Target) Spec() keypolicy.Spec {
	s := keypolicy.Spec{
		Account: t.Account, Parent: t.ParentRole(), Admins: slices.Clone(t.Admins), Creating: t.Creating, Mode: keypolicy.Managed,
	}
	if t.Sealed {
		s.Mode = keypolicy.Sealed
	}
	for _, r := range t.Admit {
		s.Pairs = append(s.Pairs, r.Pair())
	}
	s.PCR8 = t.signer()
	slices.SortFunc(s.Pairs, func(a, b keypolicy.Pair) int {
		return strings.Compare(a.PCR0.String()+a.PCR16.String(), b.PCR0.String()+b.PCR16.String())
	})
	return s
}

// signer is PCR8 where one certificate signed all admitted images: the policy
// then asks for it too.
func (t *Target) signer() *keypolicy.PCR {
	if len(t.Admit) == 0 || t.Admit[0].PCR8 == nil {
		return nil
	}
	for _, r := range t.Admit[1:] {
		if r.PCR8 == nil || *r.PCR8 != *t.Admit[0].PCR8 {
			return nil
		}
	}
	return t.Admit[0].PCR8
}

// Name of the stack, and what all names that are fixed begin with.
func (t *Target) Name() string { return "keyhold-" + t.Profile.Name }

// TablePrefix is how the names of the tables begin.
func (t *Target) TablePrefix() string { return t.Name() + "-" }

// ParentRole is the ARN of the role of the instances. Its name is fixed, since
// the key policy, and so the sealed mode, names it.
func (t *Target) ParentRole() string {
	return fmt.Sprintf("arn:%s:iam::%s:role/%s-parent", t.Partition(), t.Account, t.Name())
}

// Partition of the region.
func (t *Target) Partition() string {
	switch {
	case strings.HasPrefix(t.Region, "cn-"):
		return "aws-cn"
	case strings.HasPrefix(t.Region, "us-gov-"):
		return "aws-us-gov"
	}
	return "aws"
}

// Idle reports that no instance could become ready: nobody gets the key.
func (t *Target) Idle() bool { return len(t.Admit) == 0 }

func list(text string) []string {
	var out []string
	for _, f := range strings.Split(text, ",") {
		if f = strings.TrimSpace(f); f != "" {
			out = append(out, f)
		}
	}
	return out
}
