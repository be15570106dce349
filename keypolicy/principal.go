package keypolicy

import (
	"errors"
	"regexp"
	"strings"
)

// ErrPrincipal says that an ARN is not one of those wanted.
var ErrPrincipal = errors.New("want the ARN of an IAM role, arn:aws:iam::ACCOUNT:role/NAME, without wildcards")

// The spellings of principals that are understood. IAM permits more characters
// in paths, among them * and ?, which conditions would take as wildcards.
var (
	accountForm = regexp.MustCompile(`^[0-9]{12}$`)
	rootForm    = regexp.MustCompile(`^arn:aws(-cn|-us-gov)?:iam::[0-9]{12}:root$`)
	roleForm    = regexp.MustCompile(`^arn:aws(-cn|-us-gov)?:iam::[0-9]{12}:role/([\w+=,.@-]+/)*[\w+=,.@-]{1,64}$`)
	userForm    = regexp.MustCompile(`^arn:aws(-cn|-us-gov)?:iam::[0-9]{12}:user/([\w+=,.@-]+/)*[\w+=,.@-]{1,64}$`)
	sessionForm = regexp.MustCompile(`^arn:aws(-cn|-us-gov)?:sts::[0-9]{12}:assumed-role/[\w+=,.@-]{1,64}/[\w+=,.@-]{2,64}$`)
	serviceForm = regexp.MustCompile(`^[a-z0-9-]+(\.[a-z0-9-]+)*\.amazonaws\.com(\.cn)?$`)
	idForm      = regexp.MustCompile(`^A[A-Z0-9]{3}[A-Z0-9]{12,}$`) // AROA...: what KMS shows for a principal that was deleted
)

func isRole(arn string) bool { return roleForm.MatchString(arn) }

// accountOf returns the account in an ARN, or "".
func accountOf(arn string) string {
	if fields := strings.SplitN(arn, ":", 6); len(fields) == 6 {
		return fields[4]
	}
	return ""
}

// Caller is who asks: a role, a user, the root user of an account or a service.
type Caller struct {
	ARN     string // of the role, the user or the root user; empty for a service
	Session string // ARN of the role's session that asks; empty: any that the policy does not name
	Service string // as dynamodb.amazonaws.com
}

func (c Caller) account() string { return accountOf(c.ARN) }

// understood reports whether Evaluate knows what to make of the caller.
func (c Caller) understood() bool {
	switch {
	case c.Service != "":
		return c.ARN == "" && c.Session == "" && serviceForm.MatchString(c.Service)
	case c.Session != "":
		return isRole(c.ARN) && sessionForm.MatchString(c.Session) && c.account() == accountOf(c.Session)
	}
	return isRole(c.ARN) || userForm.MatchString(c.ARN) || rootForm.MatchString(c.ARN)
}

// isAccount tells the spellings of an account, its number and the ARN of its root,
// from the other principals that Parse lets through.
func isAccount(arn string) bool {
	return !strings.Contains(arn, ":") || strings.HasSuffix(arn, ":root")
}

// Principals are whom a statement is about.
type Principals struct {
	Everybody bool     // "*" and {"AWS": "*"}, which the IAM user guide calls equivalent
	AWS       []string // ARNs and account numbers, sorted
	Services  []string // sorted
}

// name reports whether p is about the caller. To allow an account is to allow
// each of its principals, since IAM is taken to allow everything; to deny one is
// read as denying its root user alone.
func (p *Principals) name(c Caller, deny bool) bool {
	if p.Everybody {
		return true
	}
	for _, s := range p.Services {
		if s == c.Service {
			return true
		}
	}
	if c.Service != "" {
		return false
	}
	for _, arn := range p.AWS {
		switch {
		case isAccount(arn):
			same := arn == c.account() || accountOf(arn) == c.account()
			if same && (!deny || isAccount(c.ARN)) {
				return true
			}
		case arn == c.ARN, c.Session != "" && arn == c.Session:
			return true
		}
	}
	return false
}
