package serve_test

import (
	"io"
	"sync"
	"testing"

	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/wire"
)

// Whatever a connection sends after hello, the enclave answers it or hangs up,
// panics nowhere and serves the next one.
func FuzzConnection(f *testing.F) {
	s, err := enclavetest.New(f.Context(), enclavetest.Options{Keys: 1, Algorithm: record.Ed25519})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(s.Close)
	seed := func(typ wire.Type, body any) {
		b, err := wire.Encode(1, typ, body)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw(b))
	}
	seed(wire.TypeSign, signRequest(s, make(wire.Ticket, wire.TicketLen), "a", ""))
	seed(wire.TypeConfigure, &wire.Configure{Config: s.Config()})
	seed(wire.TypeLoad, &wire.Load{Header: s.Sealed().Header, Keys: s.Sealed().Entries})
	seed(wire.TypeAddKeys, &wire.AddKeys{Algorithm: record.P256, Policy: "open", Count: 1})
	seed(wire.TypeReceipts, &wire.Receipts{Ack: []wire.LaneSeq{{Lane: 1, Seq: 2}}})
	seed(wire.TypeCancel, &wire.Cancel{KeyID: s.Keys()[0].KeyID, KeyFence: 1})
	seed(wire.TypeFence, &wire.Fence{KeyID: s.Keys()[0].KeyID, Fence: 1})
	seed(wire.TypeAttest, &wire.Attest{Nonce: make([]byte, 64)})
	f.Fuzz(func(t *testing.T, b []byte) {
		conn, _ := hello(t, s)
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := io.Copy(io.Discard, conn); err != nil {
				return // closed by either side
			}
		})
		if _, err := conn.Write(b); err != nil {
			t.Log("the enclave hung up")
		}
		conn.Close()
		wg.Wait()

		next, _ := hello(t, s)
		st, err := enclavetest.Ask[wire.StatusReply](next, wire.TypeStatus, &wire.GetStatus{})
		if err != nil || st.Panics != 0 {
			t.Errorf("status %+v, %v", st, err)
		}
	})
}
