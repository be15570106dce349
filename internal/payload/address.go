package payload

import (
	"encoding/hex"

	"github.com/ethereum/go-ethereum/crypto"
)

const (
	publicLen  = 65 // 0x04 || x || y
	addressLen = 20
)

// Address returns the EIP-55 spelling of the Ethereum address of an
// uncompressed secp256k1 public key, empty for bytes of another form. It does
// not check that the point is on the curve.
func Address(public []byte) string {
	if len(public) != publicLen || public[0] != 4 {
		return ""
	}
	return checksum([addressLen]byte(crypto.Keccak256(public[1:])[12:]))
}

// checksum writes a hex letter in upper case where the Keccak-256 of the
// lower-case hex has a nibble of 8 or more at its place.
func checksum(address [addressLen]byte) string {
	var out [2 + 2*addressLen]byte
	copy(out[:], "0x")
	digits := out[2:]
	hex.Encode(digits, address[:])
	sum := crypto.Keccak256(digits)
	for i, c := range digits {
		nibble := sum[i/2] >> 4
		if i%2 == 1 {
			nibble = sum[i/2] & 15
		}
		if c >= 'a' && nibble >= 8 {
			digits[i] = c - 'a' + 'A'
		}
	}
	return string(out[:])
}
