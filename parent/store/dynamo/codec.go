package dynamo

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

func batchItem(b store.Batch) item {
	m := item{
		aBatch:    text(string(b.ID)),
		aFence:    number(b.Fence),
		aAttempts: number(b.Attempts),
	}
	m.text(aImport, string(b.ImportID))
	m.text(aState, string(b.State))
	m.text(aPool, b.Pool)
	m.text(aKind, string(b.Kind))
	m.id(aKey, b.KeyID)
	if b.Pinned {
		m[aPinned] = &types.AttributeValueMemberBOOL{Value: true}
	}
	m.number(aKeyFence, uint64(b.KeyFence))
	m.text(aOwner, b.Owner)
	m.text(aClaim, b.ClaimID)
	m.id(aBoot, b.BootID)
	m.int(aLease, int(b.Lease))
	if len(b.History) != 0 {
		m[aHistory] = historyList(b.History)
	}
	if len(b.Crashed) != 0 {
		m[aCrashed] = numbers(b.Crashed)
	}
	m.int(aCount, b.Count)
	m.int(aRefused, b.Refused)
	m.id(aRoot, b.PayloadRoot)
	m.number(aUsed, b.Used)
	m.number(aUsedBefore, b.UsedBefore)
	if shard, in := b.Shard(); in {
		m[aReadyShard], m[aVisible] = number(shard), number(int64(0))
		m.time(aVisible, b.VisibleAt)
	}
	m.time(aClaimedAt, b.ClaimedAt)
	m.time(aCommittedAt, b.CommittedAt)
	m.id(aReceiptBoot, b.Receipt.BootID)
	m.number(aReceiptLane, uint64(b.Receipt.Lane))
	m.number(aReceiptSeq, b.Receipt.Seq)
	return m
}

func readBatch(m item) (store.Batch, error) {
	r := reader{m: m}
	b := store.Batch{
		ID:          record.BatchID(r.text(aBatch)),
		ImportID:    record.ImportID(r.text(aImport)),
		State:       record.State(r.text(aState)),
		Pool:        r.text(aPool),
		Kind:        record.Kind(r.text(aKind)),
		KeyID:       r.id(aKey),
		Pinned:      r.bool(aPinned),
		Fence:       record.Fence(r.number(aFence)),
		KeyFence:    record.Fence(r.number(aKeyFence)),
		Owner:       r.text(aOwner),
		ClaimID:     r.text(aClaim),
		BootID:      r.id(aBoot),
		Lease:       time.Duration(r.int(aLease)),
		Attempts:    r.int(aAttempts),
		History:     readHistory(&r),
		Crashed:     r.numbers(aCrashed),
		Count:       r.int(aCount),
		Refused:     r.int(aRefused),
		PayloadRoot: r.id(aRoot),
		Used:        r.number(aUsed),
		UsedBefore:  r.number(aUsedBefore),
		VisibleAt:   r.time(aVisible),
		ClaimedAt:   r.time(aClaimedAt),
		CommittedAt: r.time(aCommittedAt),
		Receipt: store.ReceiptRef{
			BootID: r.id(aReceiptBoot), Lane: r.uint32(aReceiptLane), Seq: r.number(aReceiptSeq),
		},
	}
	if r.err != nil {
		return store.Batch{}, fmt.Errorf("batch: %w", r.err)
	}
	return b, nil
}

func historyList(history []store.Attempt) types.AttributeValue {
	var l types.AttributeValueMemberL
	for _, a := range history {
		l.Value = append(l.Value, &types.AttributeValueMemberL{Value: []types.AttributeValue{
			text(a.Owner), number(a.KeyFence), text(a.End),
		}})
	}
	return &l
}

func readHistory(r *reader) []store.Attempt {
	var history []store.Attempt
	for _, v := range r.list(aHistory) {
		l, ok := v.(*types.AttributeValueMemberL)
		if !ok || len(l.Value) != 3 {
			r.fail(aHistory)
			return nil
		}
		entry := reader{m: item{"0": l.Value[0], "1": l.Value[1], "2": l.Value[2]}}
		a := store.Attempt{Owner: entry.text("0"), KeyFence: record.Fence(entry.number("1")), End: entry.text("2")}
		if entry.err != nil {
			r.fail(aHistory)
			return nil
		}
		history = append(history, a)
	}
	return history
}

func leaseItem(l store.Lease) item {
	m := item{aKey: binaryID(l.KeyID), aFence: number(l.Fence), aUsed: number(l.Used)}
	m.text(aPool, l.Pool)
	m.text(aOwner, l.Owner)
	m.text(aBatch, string(l.BatchID))
	m.id(aBoot, l.BootID)
	m.int(aLease, int(l.Lease))
	if l.Idle() {
		m[aIdleShard] = text(idleShard(l.Pool, store.IdleShard(l.KeyID)))
	}
	return m
}

func readLease(m item) (store.Lease, error) {
	r := reader{m: m}
	l := store.Lease{
		KeyID:   r.id(aKey),
		Pool:    r.text(aPool),
		Fence:   record.Fence(r.number(aFence)),
		Owner:   r.text(aOwner),
		BatchID: record.BatchID(r.text(aBatch)),
		BootID:  r.id(aBoot),
		Lease:   time.Duration(r.int(aLease)),
		Used:    r.number(aUsed),
	}
	if r.err != nil {
		return store.Lease{}, fmt.Errorf("lease: %w", r.err)
	}
	return l, nil
}

func idleShard(pool string, shard int) string { return fmt.Sprintf("%s#%02d", pool, shard) }

func importItem(i store.Import) item {
	m := item{aImport: text(string(i.ID)), aState: text(string(i.State))}
	m.id(aInputHash, i.InputHash)
	m.int(aBatchSize, i.BatchSize)
	m.text(aPool, i.Pool)
	m.text(aKind, string(i.Kind))
	m.id(aKey, i.KeyID)
	m.int(aRecords, i.Records)
	m.int(aDuplicates, i.Duplicates)
	m.int(aCount, i.Batches)
	m.time(aCreatedAt, i.CreatedAt)
	m.time(aDoneAt, i.DoneAt)
	return m
}

func readImport(m item) (store.Import, error) {
	r := reader{m: m}
	i := store.Import{
		ID:         record.ImportID(r.text(aImport)),
		State:      store.ImportState(r.text(aState)),
		InputHash:  r.id(aInputHash),
		BatchSize:  r.int(aBatchSize),
		Pool:       r.text(aPool),
		Kind:       record.Kind(r.text(aKind)),
		KeyID:      r.id(aKey),
		Records:    r.int(aRecords),
		Duplicates: r.int(aDuplicates),
		Batches:    r.int(aCount),
		CreatedAt:  r.time(aCreatedAt),
		DoneAt:     r.time(aDoneAt),
	}
	if r.err != nil {
		return store.Import{}, fmt.Errorf("import: %w", r.err)
	}
	return i, nil
}

func recordItem(ref store.RecordRef) item {
	m := item{aRecord: text(ref.ID), aBatch: text(string(ref.BatchID)), aIndex: number(ref.Index)}
	m[aHash] = binary32(ref.PayloadHash)
	return m
}

func readRecord(m item) (store.RecordRef, error) {
	r := reader{m: m}
	ref := store.RecordRef{
		ID:          r.text(aRecord),
		BatchID:     record.BatchID(r.text(aBatch)),
		Index:       r.int(aIndex),
		PayloadHash: r.id(aHash),
	}
	if r.err != nil {
		return store.RecordRef{}, fmt.Errorf("record: %w", r.err)
	}
	return ref, nil
}

func keyItem(k store.Key) item {
	m := item{aKey: binaryID(k.ID)}
	m.text(aKeyring, k.Keyring)
	m.text(aPool, k.Pool)
	m.binary(aSealed, k.Sealed)
	return m
}

func readKey(m item) (store.Key, error) {
	r := reader{m: m}
	k := store.Key{ID: r.id(aKey), Keyring: r.text(aKeyring), Pool: r.text(aPool), Sealed: r.binary(aSealed)}
	if r.err != nil {
		return store.Key{}, fmt.Errorf("key: %w", r.err)
	}
	return k, nil
}

func bootItem(b store.Boot) item {
	m := item{aBoot: binary32(b.ID)}
	m.binary(aData, b.Document)
	m.binary(aStatement, b.Statement)
	m.time(aSeenAt, b.SeenAt)
	return m
}

func readBoot(m item) (store.Boot, error) {
	r := reader{m: m}
	b := store.Boot{ID: r.id(aBoot), Document: r.binary(aData), Statement: r.binary(aStatement), SeenAt: r.time(aSeenAt)}
	if r.err != nil {
		return store.Boot{}, fmt.Errorf("boot: %w", r.err)
	}
	return b, nil
}

func laneKey(boot record.BootID, lane uint32) types.AttributeValue {
	return bytesValue(binary.BigEndian.AppendUint32(append(make([]byte, 0, len(boot)+4), boot[:]...), lane))
}

func receiptKey(ref store.ReceiptRef) item {
	return item{aLane: laneKey(ref.BootID, ref.Lane), aSeq: number(ref.Seq)}
}

func readReceipt(boot record.BootID, lane uint32, m item) (store.Receipt, error) {
	r := reader{m: m}
	v := store.Receipt{
		Ref:    store.ReceiptRef{BootID: boot, Lane: lane, Seq: r.number(aSeq)},
		Signed: r.binary(aData),
	}
	if r.err != nil {
		return store.Receipt{}, fmt.Errorf("receipt: %w", r.err)
	}
	return v, nil
}

func binaryID(id record.KeyID) types.AttributeValue { return binary32(id) }

func binary32(b [32]byte) types.AttributeValue { return bytesValue(b[:]) }
