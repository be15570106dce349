package attestation

// TestingOnlySecondOpinion asks nitrite without the strict checks before it.
var TestingOnlySecondOpinion = secondOpinion
