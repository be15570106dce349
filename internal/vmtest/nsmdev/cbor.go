package nsmdev

import (
	"errors"

	"github.com/fxamacker/cbor/v2"

	"github.com/keyhold/keyhold/attestation/nsm"
)

// Module is the NSM that answers. It is nsm.Session and what the NSM's protocol
// has besides.
type Module interface {
	nsm.Session

	// LockPCR locks one register until the enclave ends.
	LockPCR(index uint16) error

	// ModuleID names the enclave.
	ModuleID() string
}

const (
	maxRequest = 4096 // bytes, the driver's limit
	randomLen  = 256  // bytes that the NSM answers at a time

	tooSmall = nsm.ErrBufferTooSmall
)

// request is one of the NSM's, of which serde writes those without parameters as
// a string and the others as a map with one pair.
type request struct {
	DescribePCR *struct {
		Index uint16 `cbor:"index"`
	}
	ExtendPCR *struct {
		Index uint16 `cbor:"index"`
		Data  []byte `cbor:"data"`
	}
	LockPCR *struct {
		Index uint16 `cbor:"index"`
	}
	LockPCRs *struct {
		Range uint16 `cbor:"range"`
	}
	Attestation *struct {
		UserData  []byte `cbor:"user_data"`
		Nonce     []byte `cbor:"nonce"`
		PublicKey []byte `cbor:"public_key"`
	}
}

var decoding = func() cbor.DecMode {
	mode, err := cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		IndefLength:       cbor.IndefLengthForbidden,
		TagsMd:            cbor.TagsForbidden,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
		FieldNameMatching: cbor.FieldNameMatchingCaseSensitive,
		MaxNestedLevels:   4,
	}.DecMode()
	if err != nil {
		panic("nsmdev: fixed CBOR options: " + err.Error())
	}
	return mode
}()

// Answer does what a request of the NSM's driver asks for.
func Answer(m Module, raw []byte) []byte {
	if len(raw) > maxRequest {
		return refusal(nsm.ErrInputTooLarge)
	}
	var name string
	if decoding.Unmarshal(raw, &name) == nil {
		switch name {
		case "DescribeNSM":
			return describe(m)
		case "GetRandom":
			return random(m)
		}
		return refusal(nsm.ErrInvalidOperation)
	}
	var r request
	var pairs map[string]cbor.RawMessage
	if decoding.Unmarshal(raw, &pairs) != nil || len(pairs) != 1 {
		return refusal(nsm.ErrInvalidArgument)
	}
	if decoding.Unmarshal(raw, &r) != nil {
		return refusal(nsm.ErrInvalidOperation)
	}
	return r.answer(m)
}

func (r *request) answer(m Module) []byte {
	switch {
	case r.DescribePCR != nil:
		value, locked, err := m.DescribePCR(r.DescribePCR.Index)
		return outcome("DescribePCR", map[string]any{"lock": locked, "data": value}, err)
	case r.ExtendPCR != nil:
		value, err := m.ExtendPCR(r.ExtendPCR.Index, r.ExtendPCR.Data)
		return outcome("ExtendPCR", map[string]any{"data": value}, err)
	case r.LockPCR != nil:
		return outcome("LockPCR", nil, m.LockPCR(r.LockPCR.Index))
	case r.LockPCRs != nil:
		return outcome("LockPCRs", nil, m.LockPCRs(r.LockPCRs.Range))
	case r.Attestation != nil:
		a := r.Attestation
		doc, err := m.Attest(nsm.AttestRequest{PublicKey: a.PublicKey, UserData: a.UserData, Nonce: a.Nonce})
		return outcome("Attestation", map[string]any{"document": doc}, err)
	}
	return refusal(nsm.ErrInvalidArgument) // a pair whose value is null
}

func describe(m Module) []byte {
	locked := []uint16{}
	for i := range uint16(nsm.PCRCount) {
		_, is, err := m.DescribePCR(i)
		if err != nil {
			return outcome("", nil, err)
		}
		if is {
			locked = append(locked, i)
		}
	}
	return outcome("DescribeNSM", map[string]any{
		"version_major": 1, "version_minor": 0, "version_patch": 0,
		"module_id": m.ModuleID(), "max_pcrs": nsm.PCRCount, "locked_pcrs": locked, "digest": "SHA384",
	}, nil)
}

func random(m Module) []byte {
	b := make([]byte, randomLen)
	err := m.Random(b)
	return outcome("GetRandom", map[string]any{"random": b}, err)
}

// outcome encodes an answer: name alone where it has no fields, as serde does.
func outcome(name string, fields map[string]any, err error) []byte {
	if err != nil {
		code := nsm.ErrInternal
		errors.As(err, &code)
		return refusal(code)
	}
	if fields == nil {
		return encode(name)
	}
	return encode(map[string]any{name: fields})
}

func refusal(code nsm.Refusal) []byte { return encode(map[string]string{"Error": string(code)}) }

func encode(v any) []byte {
	b, err := cbor.Marshal(v)
	if err != nil {
		panic("nsmdev: answers are strings, numbers and bytes: " + err.Error())
	}
	return b
}
