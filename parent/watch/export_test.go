package watch

// TestingOnlyParseEnclaves reads what describe-enclaves prints.
func TestingOnlyParseEnclaves(out []byte) ([]Enclave, error) { return parseEnclaves(out) }
