package enclavetest

import (
	"errors"
	"fmt"
	"net"

	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

// ErrAnswer means an answer that is not the one to the request.
var ErrAnswer = errors.New("enclavetest: the answer is another's")

// Ask sends one request on a connection with nothing else in flight, and reads
// its answer. A refusal is the error.
func Ask[Reply any](conn net.Conn, t wire.Type, req any) (*Reply, error) {
	const id = 1
	frame, err := wire.Encode(id, t, req)
	if err != nil {
		return nil, err
	}
	if err := wire.WriteFrame(conn, frame); err != nil {
		return nil, err
	}
	return Answer[Reply](conn, id, t)
}

// Answer reads the answer to request id of type t.
func Answer[Reply any](conn net.Conn, id uint64, t wire.Type) (*Reply, error) {
	frame, err := wire.ReadFrame(conn)
	if err != nil {
		return nil, err
	}
	m, err := wire.Decode(frame)
	if err != nil {
		return nil, fmt.Errorf("read answer: %w", err)
	}
	if m.Type == wire.TypeError {
		var e wire.Error
		if err := wire.DecodeBody(m, &e); err != nil {
			return nil, fmt.Errorf("read error: %w", err)
		}
		return nil, refusal.Code(e.Code)
	}
	if m.ID != id || m.Type != t {
		return nil, ErrAnswer
	}
	r := new(Reply)
	if err := wire.DecodeBody(m, r); err != nil {
		return nil, fmt.Errorf("read answer: %w", err)
	}
	return r, nil
}
