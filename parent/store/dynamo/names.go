package dynamo

// The tables, without their prefix.
const (
	tableImports  = "imports"
	tableBatches  = "batches"
	tableSegments = "segments"
	tableRecords  = "records"
	tableKeys     = "sealed_keys"
	tableLeases   = "leases"
	tableKeyrings = "keyrings"
	tableBoots    = "boots"
	tableReceipts = "receipts"

	indexReady = "ready" // of batches: aReadyShard, aVisible; keys only
	indexIdle  = "idle"  // of leases: aIdleShard, aUsed; with aFence
)

// The attributes. DynamoDB charges for names, so they are short; none is one of
// its reserved words. A zero value is absent, except for aFence, aAttempts and
// aUsed, which conditions and indexes need. Times are nanoseconds since 1970.
const (
	aImport      = "i"   // S  import id
	aBatch       = "b"   // S  batch id
	aState       = "s"   // S  of a batch or an import
	aPool        = "p"   // S
	aKind        = "kd"  // S
	aKey         = "k"   // B  key id, 32 bytes
	aPinned      = "pin" // BOOL
	aFence       = "f"   // N  of the batch in batches, of the key in leases
	aKeyFence    = "kf"  // N
	aOwner       = "o"   // S
	aClaim       = "c"   // S  claim id
	aBoot        = "bt"  // B  boot id, 32 bytes
	aLease       = "l"   // N  nanoseconds
	aAttempts    = "a"   // N
	aHistory     = "h"   // L  of L: owner S, key fence N, end S
	aCrashed     = "x"   // NS
	aCount       = "n"   // N  records of a batch, batches of an import
	aRefused     = "r"   // N
	aRoot        = "pr"  // B  payload root, 32 bytes
	aUsed        = "u"   // N
	aUsedBefore  = "ub"  // N
	aReadyShard  = "rs"  // N  0 to 16
	aVisible     = "va"  // N
	aClaimedAt   = "ca"  // N
	aCommittedAt = "cm"  // N
	aReceiptBoot = "rb"  // B  of the receipt, 32 bytes
	aReceiptLane = "rl"  // N
	aReceiptSeq  = "rq"  // N
	aIdleShard   = "ps"  // S  pool#shard, two digits

	aPart = "q" // S  of a segment: payload or result
	aData = "d" // B  segment, keyring header, receipt, boot document

	aInputHash  = "ih" // B  32 bytes
	aBatchSize  = "bs" // N
	aRecords    = "rn" // N
	aDuplicates = "du" // N
	aCreatedAt  = "ct" // N
	aDoneAt     = "dn" // N
	aEnd        = "e"  // N  of an aborted import: its batches have lower numbers

	aRecord = "id" // S  record id
	aIndex  = "n"  // N  of a record in its batch
	aHash   = "ph" // B  payload hash, 32 bytes

	aKeyring   = "kr" // S
	aSealed    = "e"  // B
	aStatement = "st" // B
	aSeenAt    = "sn" // N
	aLane      = "l"  // B  boot id, then the lane in 4 bytes big-endian
	aSeq       = "n"  // N
)

const (
	partPayload = "payload"
	partResult  = "result"
)
