package wire

import "github.com/keyhold/keyhold/internal/record"

// Ticket is the enclave's word for "now": boot id || monotonic nanoseconds since
// boot, big-endian || HMAC-SHA-256 of both under a secret of this boot. 72 bytes.
// It comes with every answer that a parent may base a claim on.
type Ticket []byte

// TicketLen is the length of a Ticket in bytes.
const TicketLen = 32 + 8 + 32

// State says how far an enclave has come.
type State string

// The states of an enclave.
const (
	StateWaiting    State = "waiting"    // for configure
	StateConfigured State = "configured" // waits for create_keyring or load
	StateReady      State = "ready"      // signs
)

// Hello opens a connection.
type Hello struct{}

// HelloReply names the boot and the lane of this connection.
type HelloReply struct {
	BootID     record.BootID `cbor:"boot_id"`
	Lane       uint32        `cbor:"lane"`
	State      State         `cbor:"state"`
	ConfigHash []byte        `cbor:"config_hash"` // SHA-256, empty while waiting
	Document   []byte        `cbor:"document"`    // boot document, empty until ready
	Statement  []byte        `cbor:"statement"`   // boot statement, empty until ready
	Ticket     Ticket        `cbor:"ticket"`
}

// Configure hands over the config. The first one counts; the same again is
// answered with Already.
type Configure struct {
	Config []byte `cbor:"config"`
}

// ConfigureReply says what was measured.
type ConfigureReply struct {
	Already bool   `cbor:"already"`
	PCR16   []byte `cbor:"pcr16"` // 48 bytes
}

// CreateKeyring asks for a new data key and so for a new, empty keyring under
// the config's name and seal epoch.
type CreateKeyring struct{}

// CreateKeyringReply carries the header to store.
type CreateKeyringReply struct {
	Header    []byte `cbor:"header"` // sealed.Header
	Document  []byte `cbor:"document"`
	Statement []byte `cbor:"statement"`
}

// Load opens a keyring, or adds sealed keys to the one that is open. The header
// comes with every part, so any connection can go on.
type Load struct {
	Header []byte   `cbor:"header"`
	Keys   [][]byte `cbor:"keys"` // sealed.Entry each, at most MaxLoadKeys
}

// LoadReply counts the keys. Keys that the enclave refuses do not stop the rest;
// their places in the request are in Refused.
type LoadReply struct {
	Already   bool     `cbor:"already"` // this keyring was open before
	Loaded    uint64   `cbor:"loaded"`  // keys of this request that are open now
	Total     uint64   `cbor:"total"`   // keys that this enclave holds
	Refused   []uint32 `cbor:"refused"`
	Document  []byte   `cbor:"document"`
	Statement []byte   `cbor:"statement"`
}

// AddKeys makes new keys. Their receipt goes into the lane of this connection.
type AddKeys struct {
	Algorithm record.Algorithm `cbor:"algorithm"`
	Policy    string           `cbor:"policy"`
	Count     uint32           `cbor:"count"` // 1 to MaxAddKeys
	Ack       uint64           `cbor:"ack"`   // see Sign.Ack
}

// AddKeysReply carries the sealed keys to store.
type AddKeysReply struct {
	Keys    [][]byte `cbor:"keys"`
	Receipt []byte   `cbor:"receipt"` // encoded receipt.Signed
}

// GetTicket asks for a fresh ticket.
type GetTicket struct{}

// TicketReply carries it.
type TicketReply struct {
	Ticket Ticket `cbor:"ticket"`
}

// NoProbe is the Probe of a request that signs the whole batch.
const NoProbe = -1

// Sign asks for the signatures of one batch.
type Sign struct {
	Ticket     Ticket          `cbor:"ticket"` // older than the claim
	BatchID    record.BatchID  `cbor:"batch_id"`
	ImportID   record.ImportID `cbor:"import_id"`
	BatchFence record.Fence    `cbor:"batch_fence"`
	KeyID      record.KeyID    `cbor:"key_id"`
	KeyFence   record.Fence    `cbor:"key_fence"`
	LeaseMS    int64           `cbor:"lease_ms"`
	Kind       record.Kind     `cbor:"kind"`
	Payload    []byte          `cbor:"payload"` // record.EncodePayload
	Refuse     []uint32        `cbor:"refuse"`  // ascending; records that took an enclave down: refused with enclave_crash
	Alone      bool            `cbor:"alone"`   // a suspect: no other batch is signed meanwhile
	Probe      int             `cbor:"probe"`   // NoProbe, or the one record to try; nothing is released then
	Ack        uint64          `cbor:"ack"`     // highest seq of this lane that is stored
}

// SignReply carries the outcomes. After a probe Result and Receipt are empty.
type SignReply struct {
	Result  []byte `cbor:"result"`  // record.EncodeResult
	Receipt []byte `cbor:"receipt"` // encoded receipt.Signed
	Ticket  Ticket `cbor:"ticket"`
}

// Cancel asks that nothing signed under KeyFence or an older fence of the key be
// released any more. The answer means: nothing will be.
type Cancel struct {
	KeyID    record.KeyID `cbor:"key_id"`
	KeyFence record.Fence `cbor:"key_fence"`
}

// Fence asks that nothing under a fence lower than Fence be released any more.
type Fence struct {
	KeyID record.KeyID `cbor:"key_id"`
	Fence record.Fence `cbor:"fence"`
}

// FenceReply answers Cancel and Fence.
type FenceReply struct {
	Ticket Ticket `cbor:"ticket"`
}

// LaneSeq names a receipt.
type LaneSeq struct {
	Lane uint32 `cbor:"lane"`
	Seq  uint64 `cbor:"seq"`
}

// Receipts acknowledges what is stored and asks for what is not acknowledged in
// lanes without a connection, and in this one.
type Receipts struct {
	Ack []LaneSeq `cbor:"ack"` // everything up to Seq of that lane is stored
}

// ReceiptsReply carries the receipts that are still to be stored, in lane order.
type ReceiptsReply struct {
	Receipts [][]byte `cbor:"receipts"`
	Ticket   Ticket   `cbor:"ticket"`
}

// Attest is a challenge.
type Attest struct {
	Nonce []byte `cbor:"nonce"` // 1 to MaxNonce bytes
}

// AttestReply proves who answers: a fresh document with that nonce, and the
// signed heads of all lanes.
type AttestReply struct {
	Document []byte `cbor:"document"`
	Heads    []byte `cbor:"heads"` // encoded receipt.Signed of receipt.Heads
}

// GetStatus asks for counters and, with Lines, for what the enclave logged.
type GetStatus struct {
	After uint64 `cbor:"after"` // seq of the newest line that the asker has; 0: none
	Lines uint32 `cbor:"lines"` // at most so many lines, up to MaxLogLines
}

// StatusReply is for people and metrics.
type StatusReply struct {
	State           State       `cbor:"state"`
	Keys            uint64      `cbor:"keys"`
	Signed          uint64      `cbor:"signed"`           // records, since boot
	Refused         uint64      `cbor:"refused"`          // records, since boot
	RecordRefusals  []CodeCount `cbor:"record_refusals"`  // the same by code
	RequestRefusals []CodeCount `cbor:"request_refusals"` // requests that were answered with an error, by code
	Batches         uint64      `cbor:"batches"`
	Panics          uint64      `cbor:"panics"` // requests that ended in a panic
	Connections     uint32      `cbor:"connections"`
	Lanes           uint32      `cbor:"lanes"`
	HeapBytes       uint64      `cbor:"heap_bytes"`
	UptimeMS        int64       `cbor:"uptime_ms"`
	TimeMS          int64       `cbor:"time_ms"`   // the enclave's clock, Unix milliseconds
	Proofs          uint64      `cbor:"proofs"`    // times that the key policy was proved since boot
	ProvedMS        int64       `cbor:"proved_ms"` // uptime_ms of the last one; 0 before the first
	Lines           []LogLine   `cbor:"lines"`     // after GetStatus.After, oldest first
	Newest          uint64      `cbor:"newest"`    // seq of the newest line there is
	Dropped         uint64      `cbor:"dropped"`   // lines after GetStatus.After that are lost
}

// CodeCount counts refusals with one code of package refusal.
type CodeCount struct {
	Code  string `cbor:"code"`
	Count uint64 `cbor:"count"`
}

// LogLine is one thing that happened in an enclave. Everybody on the parent
// instance can read it.
type LogLine struct {
	Seq      uint64    `cbor:"seq"` // 1, 2, ... of one boot
	UptimeMS int64     `cbor:"uptime_ms"`
	Level    string    `cbor:"level"` // INFO, WARN, ERROR
	Event    string    `cbor:"event"` // a fixed text
	Attrs    []LogAttr `cbor:"attrs"`
}

// LogAttr is a number, or a text that the enclave's list of such texts names.
type LogAttr struct {
	Key   string `cbor:"key"`
	Value string `cbor:"value"`
}

// Error answers a request that was refused.
type Error struct {
	Code   string `cbor:"code"` // of package refusal
	Text   string `cbor:"text"` // its fixed text
	Ticket Ticket `cbor:"ticket"`
}
