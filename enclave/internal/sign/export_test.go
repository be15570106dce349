package sign

import "github.com/keyhold/keyhold/enclave/internal/keyring"

// TestingOnlySkipVerify lets a benchmark measure signing alone.
func (e *Engine) TestingOnlySkipVerify() {
	e.verify = func(*keyring.Signer, []byte) bool { return true }
}

// TestingOnlyFailVerify lets the n-th signature from now, counted from 0, be a
// bad one.
func (e *Engine) TestingOnlyFailVerify(n int) {
	e.verify = func(s *keyring.Signer, sig []byte) bool {
		n--
		return n != -1 && s.Verify(sig)
	}
}

// TestingOnlyGates returns how many keys fences are remembered of, and how many
// of them are in use or wanted.
func (e *Engine) TestingOnlyGates() (keys, used int) {
	e.gates.mu.Lock()
	defer e.gates.mu.Unlock()
	for _, k := range e.gates.keys {
		if k.turn != nil {
			used++
		}
	}
	return len(e.gates.keys), used
}

// TestingOnlyLane returns the lane of that number.
func (e *Engine) TestingOnlyLane(n uint32) *Lane {
	e.lanes.mu.Lock()
	defer e.lanes.mu.Unlock()
	return e.lanes.all[n]
}

// TestingOnlyDoorHeld reports whether a suspect is at work or waits for others
// to end.
func (e *Engine) TestingOnlyDoorHeld() bool { return len(e.alone.door) > 0 }
