package keyring

import "github.com/keyhold/keyhold/internal/sealed"

// TestingOnlySeal seals any private bytes under any public part, as nobody
// outside of a test can.
func TestingOnlySeal(r *Ring, p sealed.Public, private []byte) ([]byte, error) {
	return r.in().seal(p, private)
}
