// Package store says what Keyhold keeps in DynamoDB and under which conditions
// it may change: the contracts Queue, Leases, Intake, Archive and Keyrings, and
// their sentinel errors. It holds no implementation; memory and dynamo do, and
// storetest checks both against the sentences here.
package store

import (
	"context"
	"errors"
	"time"

	"github.com/keyhold/keyhold/internal/record"
)

// Every method that writes is conditional. A nil error means durable. A sentinel
// error means that nothing was written. Any other error means unknown: read
// again before trying again, never guess. Implementations recognise their own
// earlier write whose answer was lost (by claim id, token or content) and
// return nil for it.
var (
	// ErrNotFound: there is no such item.
	ErrNotFound = errors.New("store: not found")
	// ErrFenced: another claim has been made of the batch or the key since.
	ErrFenced = errors.New("store: fenced out")
	// ErrTaken: a claim lost its race; batch or key is not as it was seen.
	ErrTaken = errors.New("store: taken")
	// ErrDiffers: an item of this name is there with other content.
	ErrDiffers = errors.New("store: differs")
	// ErrAborted: the import was aborted.
	ErrAborted = errors.New("store: import aborted")
	// ErrThrottled: the service asked to slow down, and retries ran out.
	ErrThrottled = errors.New("store: throttled")
	// ErrNoTables: the tables are not there.
	ErrNoTables = errors.New("store: tables missing")
)

// Shards of the ready and idle indexes.
const (
	ReadyShards      = 16
	IdleShards       = 16
	QuarantinedShard = ReadyShards      // of the ready index: batches that wait for an operator
	KeptAttempts     = 5                // newest attempts kept in a control item
	ClaimSkew        = 60 * time.Second // how far ahead of its own clock a parent looks into the ready index
	ImportWindow     = 16               // batches of one import that are written out of order at most
)

// Batch is a control item.
type Batch struct {
	ID          record.BatchID
	ImportID    record.ImportID
	State       record.State
	Pool        string
	Kind        record.Kind
	KeyID       record.KeyID // zero until the first claim; from import where Pinned
	Pinned      bool         // the import named the key
	Fence       record.Fence // of the batch; 0 before the first claim
	KeyFence    record.Fence // of the key under the newest claim
	Owner       string       // process that holds or last held it
	ClaimID     string       // random per claim: recognises one's own write
	BootID      record.BootID
	Lease       time.Duration
	Attempts    int       // claims that were not given back
	History     []Attempt // the newest KeptAttempts, oldest first
	Crashed     []uint32  // ascending: records that took an enclave down
	Count       int       // records
	Refused     int       // of them, once SIGNED
	PayloadRoot [32]byte
	Used        uint64 // stamp that the newest claim gave the key
	UsedBefore  uint64 // stamp that the key had before it
	VisibleAt   time.Time
	ClaimedAt   time.Time // zero before the first claim
	CommittedAt time.Time // zero until SIGNED
	Receipt     ReceiptRef
}

// Attempt is one claim that was not given back, and how it ended.
type Attempt struct {
	Owner    string
	KeyFence record.Fence
	End      string // "", "lost" (taken over), "signed", "quarantined" or a refusal code
}

// ReceiptRef names a receipt in the receipts table.
type ReceiptRef struct {
	BootID record.BootID
	Lane   uint32
	Seq    uint64 // 0: none
}

// Lease is the lease item of one key.
type Lease struct {
	KeyID   record.KeyID
	Pool    string
	Fence   record.Fence
	Owner   string // empty: idle
	BatchID record.BatchID
	BootID  record.BootID
	Lease   time.Duration
	Used    uint64 // Lamport stamp of the newest claim; 0: never used
}

// Idle reports whether nobody holds the key.
func (l *Lease) Idle() bool { return l.Owner == "" }

// IdleKey is an entry of the idle index. It may be stale; a claim finds out.
type IdleKey struct {
	KeyID record.KeyID
	Fence record.Fence
	Used  uint64
}

// ReadyPage is a page of the ready index, in order of VisibleAt. It may be stale.
type ReadyPage struct {
	Batches []record.BatchID
	Next    string // token of the next page, empty at the end
}

// Queue finds work.
type Queue interface {
	// Ready lists batches of a shard that are visible until then.
	Ready(ctx context.Context, shard int, until time.Time, limit int, page string) (ReadyPage, error)
	// CountReady counts a shard of the ready index, whatever their VisibleAt.
	CountReady(ctx context.Context, shard int) (int, error)
	// Batch reads a control item consistently. ErrNotFound.
	Batch(ctx context.Context, id record.BatchID) (Batch, error)
	// Payload reads a payload segment. ErrNotFound.
	Payload(ctx context.Context, id record.BatchID) ([]byte, error)
}

// Claim is everything that one claim writes. Control and lease change together
// or not at all.
type Claim struct {
	Batch   Batch // as read consistently: Fence and State are the condition
	KeyID   record.KeyID
	KeySeen record.Fence // the condition on the lease item
	// TakeOver: the lease is held for this very batch under KeySeen, and the
	// caller has watched it run out or has fenced it off. Otherwise it must be idle.
	TakeOver bool
	Owner    string
	ClaimID  string
	BootID   record.BootID
	Lease    time.Duration
	Used     uint64 // highest stamp seen + 1; the item keeps the higher one
	Now      time.Time
	Next     time.Time // VisibleAt from now on: when to look whether it ran out
}

// End is how a claim is given up without a result.
type End struct {
	State   record.State // Ready or Quarantined
	Reason  string       // a refusal code or a word; kept in History
	Attempt bool         // it counts; a claim given back before anything was sent does not
	KeepKey bool         // something was sent: the batch stays with its key
	Now     time.Time
}

// Commit is the result of a claim.
type Commit struct {
	Batch   Batch  // as claimed: Fence, KeyFence, KeyID and ClaimID are the condition
	Result  []byte // record.EncodeResult
	Refused int
	Receipt ReceiptRef // zero where no enclave signed: every record is refused
	Now     time.Time
}

// Leases moves keys and batches together.
type Leases interface {
	// Idle lists idle keys of one shard of a pool, least recently used first.
	Idle(ctx context.Context, pool string, shard, limit int) ([]IdleKey, error)
	// Lease reads a lease item consistently. ErrNotFound.
	Lease(ctx context.Context, id record.KeyID) (Lease, error)
	// Claim takes batch and key in one transaction and returns the batch as
	// claimed. ErrTaken where either is not as seen.
	Claim(ctx context.Context, c Claim) (Batch, error)
	// Commit stores the result, marks the batch SIGNED and frees the key in one
	// transaction. ErrFenced where fences do not match or a result is there.
	Commit(ctx context.Context, c Commit) error
	// Release gives a claim up and frees the key in one transaction. ErrFenced.
	Release(ctx context.Context, b Batch, e End) error
	// NoteCrash adds records to Crashed of a batch that b still holds; claim and
	// lease stay as they are. ErrFenced.
	NoteCrash(ctx context.Context, b Batch, crashed []uint32) error
}

// Import is an imports item.
type Import struct {
	ID         record.ImportID
	State      ImportState
	InputHash  [32]byte // SHA-256 over what was imported
	BatchSize  int
	Pool       string
	Kind       record.Kind
	KeyID      record.KeyID // the named key, zero where any key of the pool will do
	Records    int          // of the input
	Duplicates int          // of them, that were imported before; set when DONE
	Batches    int          // set when DONE
	CreatedAt  time.Time
	DoneAt     time.Time
}

// ImportState is the state of an import.
type ImportState string

// The states of an import.
const (
	ImportOpen    ImportState = "OPEN"
	ImportDone    ImportState = "DONE"
	ImportAborted ImportState = "ABORTED"
)

// RecordRef is a records item: where a record that came with an id is.
type RecordRef struct {
	ID          string
	BatchID     record.BatchID
	Index       int
	PayloadHash [32]byte // SHA-256 over kind and payload
}

// Intake brings records in.
type Intake interface {
	// OpenImport creates an import, or returns the one that is there. ErrDiffers
	// where that one has another input hash, batch size, pool, kind or key;
	// ErrAborted where it was aborted.
	OpenImport(ctx context.Context, i Import) (Import, error)
	// ReserveRecord puts ref where its id is absent, or where over is not nil and
	// the item still equals *over (an id of an aborted import is taken over so),
	// and returns ref. Where the id is taken it returns the holder, and this call
	// makes ref hold it no more: an id never goes back to who lost it.
	ReserveRecord(ctx context.Context, ref RecordRef, over *RecordRef) (holder RecordRef, err error)
	// PutPayload writes the payload segment, where absent, and returns the one that
	// is there: it decides what the batch holds.
	PutPayload(ctx context.Context, id record.BatchID, payload []byte) ([]byte, error)
	// PutBatch writes the control item READY, where absent and while its import
	// is OPEN, in one transaction. An equal one (same payload root, pool, kind,
	// pinned key) is no error, in whatever state it is; another is ErrDiffers.
	// ErrAborted where the import was aborted.
	PutBatch(ctx context.Context, b Batch) error
	// FinishImport marks an OPEN import DONE with these totals; again with the
	// same totals is no error. ErrAborted.
	FinishImport(ctx context.Context, i Import) error
	// AbortImport marks an OPEN import ABORTED, which is the tombstone that frees
	// its ids, and then deletes its batches that were never claimed (READY, fence
	// 0) with their payloads. Batches that were claimed stay and are signed; kept
	// counts them. DONE is ErrTaken. ABORTED goes on where it stopped.
	AbortImport(ctx context.Context, id record.ImportID) (kept int, err error)
	// Import reads one. ErrNotFound.
	Import(ctx context.Context, id record.ImportID) (Import, error)
	// Imports lists them by id.
	Imports(ctx context.Context) ([]Import, error)
	// Record looks a record with an id up. ErrNotFound.
	Record(ctx context.Context, id string) (RecordRef, error)
	// Requeue puts a QUARANTINED batch back to READY with no attempts and
	// nothing in Crashed. ErrTaken where it is in another state.
	Requeue(ctx context.Context, id record.BatchID, now time.Time) error
}

// Receipt is a receipts item.
type Receipt struct {
	Ref    ReceiptRef
	Signed []byte // encoded receipt.Signed
}

// Boot is a boots item.
type Boot struct {
	ID        record.BootID
	Document  []byte
	Statement []byte
	SeenAt    time.Time
}

// Archive keeps results and their proofs.
type Archive interface {
	// Result reads a result segment. ErrNotFound.
	Result(ctx context.Context, id record.BatchID) ([]byte, error)
	// PutReceipt writes a receipt where absent; the same bytes again is no error,
	// others are ErrDiffers.
	PutReceipt(ctx context.Context, r Receipt) error
	// Receipt reads one. ErrNotFound.
	Receipt(ctx context.Context, ref ReceiptRef) (Receipt, error)
	// Receipts calls f for the receipts of one lane from seq on, in order.
	Receipts(ctx context.Context, boot record.BootID, lane uint32, from uint64, f func(Receipt) error) error
	// PutBoot writes a boot where absent; the same bytes again is no error.
	PutBoot(ctx context.Context, b Boot) error
	// Boot reads one. ErrNotFound.
	Boot(ctx context.Context, id record.BootID) (Boot, error)
	// Boots lists all boots.
	Boots(ctx context.Context) ([]Boot, error)
}

// Key is a sealed_keys item with what the pool needs to know of it.
type Key struct {
	ID      record.KeyID
	Keyring string // sealed.KeyringID
	Pool    string
	Sealed  []byte // encoded sealed.Entry
}

// Keyrings keeps headers and sealed keys.
type Keyrings interface {
	// PutKeyring writes a header where absent; the same again is no error,
	// another is ErrDiffers.
	PutKeyring(ctx context.Context, id string, header []byte) error
	// Keyring reads a header. ErrNotFound.
	Keyring(ctx context.Context, id string) ([]byte, error)
	// PutKeys writes sealed keys and their idle lease items where absent.
	PutKeys(ctx context.Context, keys []Key) error
	// Key reads one sealed key. ErrNotFound.
	Key(ctx context.Context, id record.KeyID) (Key, error)
	// Keys calls f for pages of sealed keys of a keyring, in no order.
	Keys(ctx context.Context, keyring string, f func([]Key) error) error
}

// Store is all of it.
type Store interface {
	Queue
	Leases
	Intake
	Archive
	Keyrings
}
