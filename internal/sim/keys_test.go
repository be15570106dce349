package sim_test

import (
	"testing"
	"testing/cryptotest"

	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
)

// keys are the same in every process, since their ids decide about order.
type keys struct {
	ring     enclavetest.Sealed
	public   []sealed.Public
	kms      *enclavetest.KMS
	document []byte
	header   string // id of the keyring
}

// makeKeys makes them once for all schedules: a keyring can be opened again and
// again, which costs less than new keys.
func makeKeys(t *testing.T) *keys {
	t.Helper()
	k := &keys{}
	t.Run("make keys", func(t *testing.T) {
		cryptotest.SetGlobalRandom(t, 1)
		s, err := enclavetest.New(t.Context(), enclavetest.Options{Keys: maxKeys, Algorithm: record.Ed25519})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		k.ring, k.public, k.kms = s.Sealed(), s.Keys(), s.KMS()
		if k.document, err = s.NSM().Attest(nsm.AttestRequest{}); err != nil {
			t.Fatal(err)
		}
		h, err := sealed.DecodeHeader(k.ring.Header)
		if err != nil {
			t.Fatal(err)
		}
		k.header = h.ID()
	})
	if k.header == "" {
		t.FailNow()
	}
	return k
}

// sealed returns the first n keys, or none of them where the enclave is to be
// asked to load each when it is needed.
func (k *keys) sealed(n int, cold bool) *enclavetest.Sealed {
	if cold {
		n = 0
	}
	return &enclavetest.Sealed{Header: k.ring.Header, Entries: k.ring.Entries[:n]}
}
