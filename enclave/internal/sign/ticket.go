package sign

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"math"
	"time"

	"github.com/keyhold/keyhold/enclave/internal/secret"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

const (
	ticketSecretLen = 32 // bytes
	ticketBody      = 32 + 8
	ticketDomain    = "keyhold-ticket-v1\x00"
)

// tickets issues and opens tickets. It remembers none.
type tickets struct {
	bootID record.BootID
	secret *secret.Bytes
}

// issue returns the ticket of that moment, or none once the secret is erased.
func (t *tickets) issue(now time.Duration) wire.Ticket {
	b := make([]byte, 0, wire.TicketLen)
	b = append(b, t.bootID[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(max(now, 0)))
	mac, err := t.mac(b)
	if err != nil {
		return nil
	}
	return append(b, mac...)
}

// open returns the moment at which a ticket of this boot was issued.
func (t *tickets) open(k wire.Ticket) (time.Duration, error) {
	if len(k) != wire.TicketLen {
		return 0, refusal.TicketInvalid
	}
	mac, err := t.mac(k[:ticketBody])
	if err != nil || !hmac.Equal(mac, k[ticketBody:]) {
		return 0, refusal.TicketInvalid
	}
	ns := binary.BigEndian.Uint64(k[len(t.bootID):ticketBody])
	if record.BootID(k[:len(t.bootID)]) != t.bootID || ns > math.MaxInt64 {
		return 0, refusal.TicketInvalid
	}
	return time.Duration(ns), nil
}

func (t *tickets) mac(b []byte) (sum []byte, err error) {
	err = t.secret.Use(func(key []byte) error {
		h := hmac.New(sha256.New, key)
		h.Write([]byte(ticketDomain))
		h.Write(b)
		sum = h.Sum(nil)
		return nil
	})
	return sum, err
}
