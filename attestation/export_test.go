package attestation

// TestingOnlySecondOpinion asks nitrite without the strict checks before it.
var TestingOnlySecondOpinion = secondOpinion

// TestingOnlyVerifyES384 verifies the signature of a document, r || s.
var TestingOnlyVerifyES384 = verifyES384
