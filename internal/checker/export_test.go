package checker

// TestingOnlyKeccak is this package's own Keccak-256, for its vectors.
var TestingOnlyKeccak = keccak256
