package hostvsock

import (
	"encoding/binary"
	"errors"
)

// Operations and flags of a packet (virtio 1.2, section 5.10.6).
const (
	opRequest       = 1
	opResponse      = 2
	opReset         = 3
	opShutdown      = 4
	opData          = 5
	opCreditUpdate  = 6
	opCreditRequest = 7

	flagNoReceive = 1 // of opShutdown: the sender will receive no more
	flagNoSend    = 2 // of opShutdown: the sender will send no more

	typeStream = 1

	headerLen = 44
)

// header is the head of every packet.
type header struct {
	srcCID, dstCID   uint64
	srcPort, dstPort uint32
	len              uint32
	typ, op          uint16
	flags            uint32
	alloc            uint32 // size of the sender's receive buffer
	forwarded        uint32 // bytes that have left it so far
}

var errPacket = errors.New("vsock: the driver sent a malformed packet")

// parse splits a packet. Its length must be the one that it states.
func parse(p []byte) (h header, data []byte, err error) {
	if len(p) < headerLen {
		return header{}, nil, errPacket
	}
	le := binary.LittleEndian
	h = header{
		srcCID: le.Uint64(p), dstCID: le.Uint64(p[8:]), srcPort: le.Uint32(p[16:]), dstPort: le.Uint32(p[20:]),
		len: le.Uint32(p[24:]), typ: le.Uint16(p[28:]), op: le.Uint16(p[30:]), flags: le.Uint32(p[32:]),
		alloc: le.Uint32(p[36:]), forwarded: le.Uint32(p[40:]),
	}
	data = p[headerLen:]
	if uint64(h.len) != uint64(len(data)) || h.op != opData && len(data) > 0 {
		return header{}, nil, errPacket
	}
	return h, data, nil
}

func (h *header) append(b []byte) []byte {
	le := binary.LittleEndian
	b = le.AppendUint64(b, h.srcCID)
	b = le.AppendUint64(b, h.dstCID)
	b = le.AppendUint32(b, h.srcPort)
	b = le.AppendUint32(b, h.dstPort)
	b = le.AppendUint32(b, h.len)
	b = le.AppendUint16(b, h.typ)
	b = le.AppendUint16(b, h.op)
	b = le.AppendUint32(b, h.flags)
	b = le.AppendUint32(b, h.alloc)
	return le.AppendUint32(b, h.forwarded)
}
