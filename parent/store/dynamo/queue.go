package dynamo

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

var errPage = errors.New("malformed page token")

// Ready implements store.Queue.
func (s *Store) Ready(ctx context.Context, shard int, until time.Time, limit int, page string) (store.ReadyPage, error) {
	const what = "query ready batches"
	start, err := parsePage(shard, page)
	if err != nil {
		return store.ReadyPage{}, fmt.Errorf("%s: %w", what, err)
	}
	out, err := s.client.Query(ctx, &dynamodb.QueryInput{
		TableName:              s.table(tableBatches),
		IndexName:              aws.String(indexReady),
		KeyConditionExpression: aws.String(aReadyShard + " = :shard AND " + aVisible + " <= :until"),
		ExpressionAttributeValues: item{
			":shard": number(shard), ":until": number(until.UnixNano()),
		},
		ExclusiveStartKey:      start,
		Limit:                  aws.Int32(int32(min(max(limit, 1), 1000))),
		ReturnConsumedCapacity: s.capacity,
	}, s.observeAs(what))
	if err != nil {
		return store.ReadyPage{}, readFault(what, err)
	}
	var p store.ReadyPage
	for _, m := range out.Items {
		r := reader{m: m}
		p.Batches = append(p.Batches, record.BatchID(r.text(aBatch)))
		if r.err != nil {
			return store.ReadyPage{}, fmt.Errorf("%s: %w", what, r.err)
		}
	}
	p.Next, err = pageToken(out.LastEvaluatedKey)
	if err != nil {
		return store.ReadyPage{}, fmt.Errorf("%s: %w", what, err)
	}
	return p, nil
}

// pageToken is "<visible at>/<batch id>".
func pageToken(last item) (string, error) {
	if len(last) == 0 {
		return "", nil
	}
	r := reader{m: last}
	token := r.digits(aVisible) + "/" + r.text(aBatch)
	return token, r.err
}

func parsePage(shard int, page string) (item, error) {
	if page == "" {
		return nil, nil
	}
	visible, id, found := strings.Cut(page, "/")
	at, err := strconv.ParseInt(visible, 10, 64)
	if err != nil || !found || id == "" {
		return nil, errPage
	}
	return item{aReadyShard: number(shard), aVisible: number(at), aBatch: text(id)}, nil
}

// CountReady implements store.Queue.
func (s *Store) CountReady(ctx context.Context, shard int) (int, error) {
	const what = "count ready batches"
	pages := dynamodb.NewQueryPaginator(s.client, &dynamodb.QueryInput{
		TableName:                 s.table(tableBatches),
		IndexName:                 aws.String(indexReady),
		KeyConditionExpression:    aws.String(aReadyShard + " = :shard"),
		ExpressionAttributeValues: item{":shard": number(shard)},
		Select:                    types.SelectCount,
		ReturnConsumedCapacity:    s.capacity,
	})
	n := 0
	for pages.HasMorePages() {
		out, err := pages.NextPage(ctx, s.observeAs(what))
		if err != nil {
			return 0, readFault(what, err)
		}
		n += int(out.Count)
	}
	return n, nil
}

// Batch implements store.Queue.
func (s *Store) Batch(ctx context.Context, id record.BatchID) (store.Batch, error) {
	m, err := s.get(ctx, "read batch", tableBatches, item{aBatch: text(string(id))}, "")
	if err != nil {
		return store.Batch{}, err
	}
	return readBatch(m)
}

// Payload implements store.Queue.
func (s *Store) Payload(ctx context.Context, id record.BatchID) ([]byte, error) {
	return s.data(ctx, "read payload", tableSegments, segmentKey(id, partPayload))
}

func segmentKey(id record.BatchID, part string) item {
	return item{aBatch: text(string(id)), aPart: text(part)}
}

// data reads the bytes of an item that holds little else.
func (s *Store) data(ctx context.Context, what, table string, key item) ([]byte, error) {
	m, err := s.get(ctx, what, table, key, "")
	if err != nil {
		return nil, err
	}
	r := reader{m: m}
	b := r.binary(aData)
	if r.err != nil {
		return nil, fmt.Errorf("%s: %w", what, r.err)
	}
	return b, nil
}
