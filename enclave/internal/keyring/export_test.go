package keyring

import (
	"crypto/cipher"

	"github.com/keyhold/keyhold/internal/sealed"
)

// TestingOnlySeal seals any private bytes under any public part, as nobody
// outside of a test can.
func TestingOnlySeal(r *Ring, p sealed.Public, private []byte) ([]byte, error) {
	return r.in().seal(p, private)
}

// TestingOnlyGCM is the cipher of seals under a given key.
func TestingOnlyGCM(key []byte) (cipher.AEAD, error) { return newGCM(key) }
