package payload

// TestingOnlyChecksum spells an address as EIP-55 says.
var TestingOnlyChecksum = checksum
