package kms

var (
	TestingOnlyUnwrapKey  = unwrapKey
	TestingOnlyDecryptCBC = decryptCBC
)

const TestingOnlyMaxEnvelope = maxEnvelope
