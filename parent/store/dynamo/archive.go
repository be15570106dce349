package dynamo

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

// Result implements store.Archive.
func (s *Store) Result(ctx context.Context, id record.BatchID) ([]byte, error) {
	return s.data(ctx, "read result", tableSegments, segmentKey(id, partResult))
}

// PutReceipt implements store.Archive.
func (s *Store) PutReceipt(ctx context.Context, r store.Receipt) error {
	const what = "put receipt"
	m := receiptKey(r.Ref)
	m[aData] = bytesValue(r.Signed)
	old, err := s.putAbsent(ctx, what, tableReceipts, aLane, m)
	if err != nil || old == nil {
		return err
	}
	there, err := readReceipt(r.Ref.BootID, r.Ref.Lane, old)
	if err == nil && !equal(there.Signed, r.Signed) {
		err = store.ErrDiffers
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// Receipt implements store.Archive.
func (s *Store) Receipt(ctx context.Context, ref store.ReceiptRef) (store.Receipt, error) {
	m, err := s.get(ctx, "read receipt", tableReceipts, receiptKey(ref), "")
	if err != nil {
		return store.Receipt{}, err
	}
	return readReceipt(ref.BootID, ref.Lane, m)
}

// Receipts implements store.Archive.
func (s *Store) Receipts(ctx context.Context, boot record.BootID, lane uint32, from uint64, f func(store.Receipt) error) error {
	const what = "list receipts"
	pages := dynamodb.NewQueryPaginator(s.client, &dynamodb.QueryInput{
		TableName:                 s.table(tableReceipts),
		KeyConditionExpression:    aws.String(aLane + " = :lane AND " + aSeq + " >= :from"),
		ExpressionAttributeValues: item{":lane": laneKey(boot, lane), ":from": number(from)},
		ConsistentRead:            aws.Bool(true),
		ReturnConsumedCapacity:    s.capacity,
	})
	for pages.HasMorePages() {
		out, err := pages.NextPage(ctx, s.observeAs(what))
		if err != nil {
			return readFault(what, err)
		}
		for _, m := range out.Items {
			r, err := readReceipt(boot, lane, m)
			if err != nil {
				return fmt.Errorf("%s: %w", what, err)
			}
			if err := f(r); err != nil {
				return err
			}
		}
	}
	return nil
}

// PutBoot implements store.Archive.
func (s *Store) PutBoot(ctx context.Context, b store.Boot) error {
	const what = "put boot"
	old, err := s.putAbsent(ctx, what, tableBoots, aBoot, bootItem(b))
	if err != nil || old == nil {
		return err
	}
	there, err := readBoot(old)
	if err == nil && (!equal(there.Document, b.Document) || !equal(there.Statement, b.Statement)) {
		err = store.ErrDiffers
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// Boot implements store.Archive.
func (s *Store) Boot(ctx context.Context, id record.BootID) (store.Boot, error) {
	m, err := s.get(ctx, "read boot", tableBoots, item{aBoot: binary32(id)}, "")
	if err != nil {
		return store.Boot{}, err
	}
	return readBoot(m)
}

// Boots implements store.Archive, oldest first.
func (s *Store) Boots(ctx context.Context) ([]store.Boot, error) {
	all, err := scan(ctx, s, "list boots", tableBoots, readBoot)
	slices.SortFunc(all, func(a, b store.Boot) int {
		return cmp.Or(a.SeenAt.Compare(b.SeenAt), slices.Compare(a.ID[:], b.ID[:]))
	})
	return all, err
}
