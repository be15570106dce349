package keypolicy

// TestingOnlyUniverse returns the callers and documents that a proof asks about.
func TestingOnlyUniverse(p Policy, account string) ([]Caller, []Shown, error) {
	u, err := span(p.statements, account, nil, map[int][]string{0: nil, 16: nil})
	if err != nil {
		return nil, nil, err
	}
	return u.callers, u.shown, nil
}

// TestingOnlyConstants returns the values that the policy compares a register with.
func TestingOnlyConstants(p Policy, register int) map[string]bool {
	return constants(p.statements, register)
}
