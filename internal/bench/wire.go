package main

import (
	"bytes"
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/wire"
)

const wireBatch = 100

// wireShare measures encoding, framing, reading and decoding of request and
// answer, both ends together, as a share of signing and verifying the batch.
func wireShare(context.Context, options) ([]row, error) {
	rs := make([]record.Record, wireBatch)
	out := make([]record.Outcome, wireBatch)
	for i := range rs {
		rs[i].Payload = bytes.Repeat([]byte{byte(i)}, payloadSize)
		out[i].Signature = bytes.Repeat([]byte{byte(i)}, record.Secp256k1.SignatureLen())
	}
	request := &wire.Sign{
		Ticket: make(wire.Ticket, wire.TicketLen), BatchID: "run-b0000001", ImportID: "run", BatchFence: 1, KeyFence: 1,
		LeaseMS: 10_000, Kind: record.Message, Payload: record.EncodePayload(rs), Refuse: []uint32{}, Probe: wire.NoProbe,
	}
	answer := &wire.SignReply{
		Result: record.EncodeResult(record.Secp256k1.SignatureLen(), out), Receipt: make([]byte, 700), Ticket: make(wire.Ticket, wire.TicketLen),
	}
	var failed error
	result := testing.Benchmark(func(b *testing.B) {
		b.Helper()
		for b.Loop() {
			if err := exchange(request, answer); err != nil {
				failed = err
				return
			}
		}
	})
	if failed != nil {
		return nil, failed
	}
	const rounds = 200
	bare, err := bareLoop(rounds*wireBatch, 1)
	if err != nil {
		return nil, err
	}
	perBatch := time.Duration(result.NsPerOp())
	signing := bare / rounds
	return []row{{
		name: "wire and framing, share of signing a batch of 100", value: 100 * float64(perBatch) / float64(signing), unit: "%", atMost: 3,
		raw: fmt.Sprintf("%s against %s", perBatch.Round(100*time.Nanosecond), signing.Round(time.Microsecond)),
	}}, nil
}

// exchange is one request and its answer through a buffer.
func exchange(request *wire.Sign, answer *wire.SignReply) error {
	var gotRequest wire.Sign
	if err := pass(request, &gotRequest); err != nil {
		return err
	}
	if _, err := record.DecodePayload(gotRequest.Payload); err != nil {
		return fmt.Errorf("decode the payload: %w", err)
	}
	var gotAnswer wire.SignReply
	if err := pass(answer, &gotAnswer); err != nil {
		return err
	}
	if _, _, err := record.DecodeResult(gotAnswer.Result); err != nil {
		return fmt.Errorf("decode the result: %w", err)
	}
	return nil
}

func pass(from, to any) error {
	b, err := wire.Encode(1, wire.TypeSign, from)
	if err != nil {
		return err
	}
	var stream bytes.Buffer
	if err := wire.WriteFrame(&stream, b); err != nil {
		return err
	}
	frame, err := wire.ReadFrame(&stream)
	if err != nil {
		return err
	}
	m, err := wire.Decode(frame)
	if err != nil {
		return err
	}
	return wire.DecodeBody(m, to)
}
