package kms

// TestingOnlyDecide parses a policy for keyARN and asks it.
func TestingOnlyDecide(policy, keyARN, principal, action string, context map[string]string) (string, error) {
	p, err := parsePolicy([]byte(policy), keyARN)
	if err != nil {
		return "", err
	}
	switch p.decide(access{principal: principal, action: action, context: context}) {
	case allowed:
		return "allowed", nil
	case explicitDeny:
		return "explicit deny", nil
	case implicitDeny:
		return "implicit deny", nil
	}
	return "", errPolicy
}

var (
	TestingOnlyGlob    = glob
	TestingOnlyArnLike = arnLike
)
