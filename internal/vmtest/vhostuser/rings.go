package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
)

// handleRing does the requests that are about one queue.
func (b *Backend) handleRing(m *message) ([]byte, error) {
	switch m.request {
	case reqSetVringNum, reqSetVringBase, reqGetVringBase, reqSetVringEnable:
		index, num, err := m.ringState()
		if err != nil {
			return nil, err
		}
		q, err := b.find(index)
		if err != nil {
			return nil, err
		}
		return q.setState(m.request, num)
	case reqSetVringAddr:
		return nil, b.setAddresses(m)
	case reqSetVringKick, reqSetVringCall:
		word, err := m.u64()
		if err != nil || word>>9 != 0 {
			return nil, errBody
		}
		q, err := b.find(uint32(word & ringIndex))
		if err != nil {
			return nil, err
		}
		if m.request == reqSetVringKick {
			return nil, q.setKick(m)
		}
		return nil, q.setCall(m, word&noFD != 0)
	}
	return nil, errors.New("it is not understood")
}

func (b *Backend) find(index uint32) (*Queue, error) {
	if index >= uint32(len(b.queues)) { //nolint:gosec // a handful
		return nil, fmt.Errorf("queue %d of %d", index, len(b.queues))
	}
	return b.queues[index], nil
}

func (q *Queue) setState(request, num uint32) ([]byte, error) {
	switch request {
	case reqSetVringNum:
		if num == 0 || num > maxQueueSize || bits.OnesCount32(num) != 1 {
			return nil, fmt.Errorf("a ring of %d entries", num)
		}
		if q.kick != nil {
			return nil, fmt.Errorf("queue %d runs", q.index)
		}
		q.size, q.avail = uint16(num), nil
	case reqSetVringBase:
		if num > 0xffff || q.kick != nil {
			return nil, fmt.Errorf("queue %d cannot begin at %d", q.index, num)
		}
		q.lastAvail = uint16(num)
	case reqGetVringBase: // which ends the queue
		if err := q.stop(); err != nil {
			return nil, fmt.Errorf("stop queue %d: %w", q.index, err)
		}
		state := binary.LittleEndian.AppendUint32(nil, uint32(q.index)) //nolint:gosec // a handful
		return binary.LittleEndian.AppendUint32(state, uint32(q.lastAvail)), nil
	case reqSetVringEnable:
		q.enabled = num == 1
		q.begin()
	}
	return nil, nil
}

func (b *Backend) setAddresses(m *message) error {
	const bodyLen = 40 // ring, flags, and the addresses of desc, used, avail and log
	if len(m.body) != bodyLen {
		return errBody
	}
	le := binary.LittleEndian
	q, err := b.find(le.Uint32(m.body))
	if err != nil {
		return err
	}
	if le.Uint32(m.body[4:]) != 0 {
		return fmt.Errorf("queue %d: logging was not offered", q.index)
	}
	for i := range q.addrs {
		q.addrs[i] = le.Uint64(m.body[8+8*i:])
	}
	if err := q.place(); err != nil {
		return fmt.Errorf("queue %d: %w", q.index, err)
	}
	q.usedIdx = le.Uint16(q.used[2:]) // it goes on where an earlier run ended
	return nil
}

func (q *Queue) setKick(m *message) error {
	if q.backend.features&FeatureVersion1 == 0 {
		return fmt.Errorf("the driver is older than virtio 1: %w", ErrFeatures)
	}
	if err := q.stop(); err != nil {
		return fmt.Errorf("stop queue %d: %w", q.index, err)
	}
	f, err := m.takeEvent()
	if err != nil {
		return err
	}
	q.kick = f
	q.backend.kicks.Add(1)
	go q.backend.waitForKicks(q.index, f)
	q.begin()
	return nil
}

// begin looks at what the driver put into the queue before it ran.
func (q *Queue) begin() {
	if q.live() {
		q.backend.device.Kick(q.index)
	}
}

// setCall takes the eventfd that interrupts the driver. It is written at once:
// chains may have been given back while the old one was in place, whose
// interrupt nobody saw, and the driver would wait for ever.
func (q *Queue) setCall(m *message, none bool) error {
	if q.call != nil {
		if err := q.call.Close(); err != nil {
			return fmt.Errorf("queue %d: close the old eventfd: %w", q.index, err)
		}
		q.call = nil
	}
	if none {
		return nil
	}
	f, err := m.takeEvent()
	if err != nil {
		return err
	}
	q.call = f
	q.signal()
	return nil
}
