package nsm

import (
	"fmt"
	"sync"

	"github.com/hf/nsm"
	"github.com/hf/nsm/request"
	"github.com/hf/nsm/response"
)

// device is the part of hf/nsm's session that is used here. The library's own
// hook for tests (Options.Syscall) is not: a growing stack loses the length
// that the hook wrote.
type device interface {
	Send(request.Request) (response.Response, error)
	Close() error
}

// session adds to hf/nsm what it leaves to its callers: a refusal of the
// device is an error, a call after Close is an error instead of a panic, and
// Close waits for the call in progress.
type session struct {
	mu  sync.Mutex
	dev device // nil once closed
}

// Open opens /dev/nsm. Outside of a Nitro enclave there is none and it fails.
func Open() (Session, error) {
	dev, err := nsm.OpenDefaultSession()
	if err != nil {
		return nil, fmt.Errorf("open NSM device: %w", err)
	}
	return &session{dev: dev}, nil
}

// Attest implements Session.
func (s *session) Attest(req AttestRequest) ([]byte, error) {
	if err := req.Check(); err != nil {
		return nil, fmt.Errorf("attest: %w", err)
	}
	res, err := s.send(&request.Attestation{
		PublicKey: orNil(req.PublicKey),
		UserData:  orNil(req.UserData),
		Nonce:     orNil(req.Nonce),
	})
	if err != nil {
		return nil, fmt.Errorf("attest: %w", err)
	}
	if res.Attestation == nil || len(res.Attestation.Document) == 0 {
		return nil, fmt.Errorf("attest: %w", ErrMalformed)
	}
	return res.Attestation.Document, nil
}

// ExtendPCR implements Session.
func (s *session) ExtendPCR(index uint16, data []byte) ([]byte, error) {
	if err := checkExtend(index, data); err != nil {
		return nil, fmt.Errorf("extend PCR: %w", err)
	}
	res, err := s.send(&request.ExtendPCR{Index: index, Data: data})
	if err != nil {
		return nil, fmt.Errorf("extend PCR: %w", err)
	}
	if res.ExtendPCR == nil || len(res.ExtendPCR.Data) != PCRSize {
		return nil, fmt.Errorf("extend PCR: %w", ErrMalformed)
	}
	return res.ExtendPCR.Data, nil
}

// LockPCRs implements Session.
func (s *session) LockPCRs(below uint16) error {
	if below > PCRCount {
		return fmt.Errorf("lock PCRs: %w", ErrInvalidIndex)
	}
	res, err := s.send(&request.LockPCRs{Range: below})
	if err != nil {
		return fmt.Errorf("lock PCRs: %w", err)
	}
	if res.LockPCRs == nil {
		return fmt.Errorf("lock PCRs: %w", ErrMalformed)
	}
	return nil
}

// DescribePCR implements Session.
func (s *session) DescribePCR(index uint16) ([]byte, bool, error) {
	if index >= PCRCount {
		return nil, false, fmt.Errorf("describe PCR: %w", ErrInvalidIndex)
	}
	res, err := s.send(&request.DescribePCR{Index: index})
	if err != nil {
		return nil, false, fmt.Errorf("describe PCR: %w", err)
	}
	if res.DescribePCR == nil || len(res.DescribePCR.Data) != PCRSize {
		return nil, false, fmt.Errorf("describe PCR: %w", ErrMalformed)
	}
	return res.DescribePCR.Data, res.DescribePCR.Lock, nil
}

// Random implements Session. The device answers up to 256 bytes at a time.
func (s *session) Random(p []byte) error {
	for len(p) > 0 {
		res, err := s.send(&request.GetRandom{})
		if err != nil {
			return fmt.Errorf("get random: %w", err)
		}
		if res.GetRandom == nil || len(res.GetRandom.Random) == 0 {
			return fmt.Errorf("get random: %w", ErrMalformed)
		}
		p = p[copy(p, res.GetRandom.Random):]
		clear(res.GetRandom.Random)
	}
	return nil
}

// Close implements Session.
func (s *session) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dev == nil {
		return nil
	}
	err := s.dev.Close()
	s.dev = nil
	if err != nil {
		return fmt.Errorf("close NSM device: %w", err)
	}
	return nil
}

func (s *session) send(req request.Request) (response.Response, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dev == nil {
		return response.Response{}, ErrClosed
	}
	res, err := s.dev.Send(req)
	if err != nil {
		return response.Response{}, fmt.Errorf("ask device: %w", err)
	}
	if res.Error != "" {
		return response.Response{}, refusal(res.Error)
	}
	return res, nil
}

// refusal maps the device's code to ours, so that no bytes from outside reach
// an error text.
func refusal(code response.ErrorCode) Refusal {
	switch r := Refusal(code); r {
	case ErrInvalidArgument, ErrInvalidIndex, ErrInvalidResponse, ErrReadOnlyIndex,
		ErrInvalidOperation, ErrBufferTooSmall, ErrInputTooLarge, ErrInternal, ErrUnknownCode:
		return r
	default:
		return ErrUnknownCode
	}
}

func checkExtend(index uint16, data []byte) error {
	if index >= PCRCount {
		return ErrInvalidIndex
	}
	if len(data) == 0 {
		return ErrInvalidArgument
	}
	if len(data) > MaxExtendData {
		return ErrInputTooLarge
	}
	return nil
}

// orNil makes an empty field CBOR null: the document's public_key, where there
// is one, has at least one byte.
func orNil(b []byte) []byte {
	if len(b) == 0 {
		return nil
	}
	return b
}
