package checker

import (
	"crypto/sha256"
	"encoding/binary"
	"math/bits"
)

// Keccak-256 as Ethereum uses it: the sponge of FIPS 202 with the padding of the submission. The
// standard library has the standard's padding only.

var roundConstants = [24]uint64{
	0x0000000000000001, 0x0000000000008082, 0x800000000000808a, 0x8000000080008000, 0x000000000000808b, 0x0000000080000001,
	0x8000000080008081, 0x8000000000008009, 0x000000000000008a, 0x0000000000000088, 0x0000000080008009, 0x000000008000000a,
	0x000000008000808b, 0x800000000000008b, 0x8000000000008089, 0x8000000000008003, 0x8000000000008002, 0x8000000000000080,
	0x000000000000800a, 0x800000008000000a, 0x8000000080008081, 0x8000000000008080, 0x0000000080000001, 0x8000000080008008,
}

const keccakRate = 136 // bytes

func keccak256(b []byte) (sum [32]byte) {
	var state [25]uint64
	padded := append(append(make([]byte, 0, len(b)+keccakRate), b...), 1)
	for len(padded)%keccakRate != 0 {
		padded = append(padded, 0)
	}
	padded[len(padded)-1] |= 0x80
	for ; len(padded) > 0; padded = padded[keccakRate:] {
		for i := range keccakRate / 8 {
			state[i] ^= binary.LittleEndian.Uint64(padded[8*i:])
		}
		permute(&state)
	}
	for i := range 4 {
		binary.LittleEndian.PutUint64(sum[8*i:], state[i])
	}
	return sum
}

// permute is Keccak-f[1600], FIPS 202 section 3; lane (x, y) is at x + 5y.
func permute(a *[25]uint64) {
	for _, constant := range roundConstants {
		var c [5]uint64
		for x := range c {
			c[x] = a[x] ^ a[x+5] ^ a[x+10] ^ a[x+15] ^ a[x+20]
		}
		for i := range a {
			a[i] ^= c[(i+4)%5] ^ bits.RotateLeft64(c[(i+1)%5], 1)
		}
		x, y, lane := 1, 0, a[1]
		for t := range 24 { // rho and pi walk all lanes but the first
			x, y = y, (2*x+3*y)%5
			next := a[x+5*y]
			a[x+5*y] = bits.RotateLeft64(lane, (t+1)*(t+2)/2%64)
			lane = next
		}
		for y := 0; y < 25; y += 5 {
			row := [5]uint64(a[y : y+5])
			for x := range row {
				a[y+x] = row[x] ^ ^row[(x+1)%5]&row[(x+2)%5]
			}
		}
		a[0] ^= constant
	}
}

// leaf is the hash of a Merkle leaf: a domain, the index, and fields with their lengths before them.
func leaf(domain string, index int, parts ...[]byte) [32]byte {
	b := append([]byte(domain), 0)
	b = binary.BigEndian.AppendUint32(b, uint32(index)) //nolint:gosec // of a record in its batch
	for _, p := range parts {
		b = binary.BigEndian.AppendUint32(b, uint32(len(p))) //nolint:gosec // items end at 400 KiB
		b = append(b, p...)
	}
	return sha256.Sum256(b)
}

// merkle is the root by RFC 6962's recursion, with docs/receipts.md's domain for nodes.
func merkle(leaves [][32]byte) [32]byte {
	switch len(leaves) {
	case 0:
		return [32]byte{}
	case 1:
		return leaves[0]
	}
	k := 1 << (bits.Len(uint(len(leaves)-1)) - 1)
	left, right := merkle(leaves[:k]), merkle(leaves[k:])
	return sha256.Sum256(append(append([]byte("keyhold-node-v1\x00"), left[:]...), right[:]...))
}
