package attest_test

import (
	"encoding/hex"
	"testing"

	"github.com/keyhold/keyhold/enclave/internal/attest"
)

// The digests come from `printf ... | sha384sum`, not from the code under test.
func TestUserDataVectors(t *testing.T) {
	const prefix = "6b6579686f6c642d6174746573746174696f6e2d763100" // "keyhold-attestation-v1", NUL
	tests := []struct {
		name      string
		kind      attest.Kind
		statement string
		want      string
	}{
		{"kms has no statement", attest.KindKMS, "", prefix + "6b6d7300" +
			"38b060a751ac96384cd9327eb1b1e36a21fdb71114be07434c0cc7bf63f6e1da274edebfe76f65fbd51ad2f14898b95b"},
		{"boot", attest.KindBoot, "abc", prefix + "626f6f7400" +
			"cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed8086072ba1e7cc2358baeca134c825a7"},
		{"challenge", attest.KindChallenge, "abc", prefix + "6368616c6c656e676500" +
			"cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed8086072ba1e7cc2358baeca134c825a7"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := hex.EncodeToString(attest.UserData(tt.kind, []byte(tt.statement))); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}
