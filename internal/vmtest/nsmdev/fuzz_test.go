package nsmdev_test

import (
	"testing"

	"github.com/fxamacker/cbor/v2"
	"github.com/hf/nsm/response"

	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/internal/vmtest/nsmdev"
)

// FuzzEveryRequestHasAnAnswer sends anything: what comes back is of the protocol.
func FuzzEveryRequestHasAnAnswer(f *testing.F) {
	ca, err := nsmtest.NewCA(nil)
	if err != nil {
		f.Fatal(err)
	}
	m, err := nsmtest.New(ca, nsmtest.Options{PCRs: nsmtest.Measurements("image")})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(describeNSM)
	f.Add([]byte("\xa1\x6bDescribePCR\xa1\x65index\x00"))
	f.Add([]byte("\xa1\x69ExtendPCR\xa2\x65index\x10\x64data\x41x"))
	f.Add([]byte("\xa1\x68LockPCRs\xa1\x65range\x11"))
	f.Add([]byte("\xa1\x6bAttestation\xa3\x69user_data\xf6\x65nonce\xf6\x6apublic_key\xf6"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var res response.Response
		if err := cbor.Unmarshal(nsmdev.Answer(m, raw), &res); err != nil {
			t.Errorf("% x is answered by what is no answer: %v", raw, err)
		}
	})
}
