package dynamo

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"

	"github.com/keyhold/keyhold/parent/store"
)

const (
	activeWithin = 5 * time.Minute // a new table takes seconds, one with an index up to minutes
	activePoll   = 100 * time.Millisecond
)

// attribute is a key attribute with its type.
type attribute struct {
	name string
	kind types.ScalarAttributeType
}

type keySchema struct{ hash, sort attribute }

type tableSchema struct {
	name  string
	key   keySchema
	index string // name of the one index, or none
	by    keySchema
	with  []string // attributes that the index has beside the keys
}

func schemas() []tableSchema {
	const s, n, b = types.ScalarAttributeTypeS, types.ScalarAttributeTypeN, types.ScalarAttributeTypeB
	return []tableSchema{
		{name: tableImports, key: keySchema{hash: attribute{aImport, s}}},
		{
			name: tableBatches, key: keySchema{hash: attribute{aBatch, s}},
			index: indexReady, by: keySchema{attribute{aReadyShard, n}, attribute{aVisible, n}},
		},
		{name: tableSegments, key: keySchema{attribute{aBatch, s}, attribute{aPart, s}}},
		{name: tableRecords, key: keySchema{hash: attribute{aRecord, s}}},
		{name: tableKeys, key: keySchema{hash: attribute{aKey, b}}},
		{
			name: tableLeases, key: keySchema{hash: attribute{aKey, b}},
			index: indexIdle, by: keySchema{attribute{aIdleShard, s}, attribute{aUsed, n}}, with: []string{aFence},
		},
		{name: tableKeyrings, key: keySchema{hash: attribute{aKeyring, s}}},
		{name: tableBoots, key: keySchema{hash: attribute{aBoot, b}}},
		{name: tableReceipts, key: keySchema{attribute{aLane, b}, attribute{aSeq, n}}},
	}
}

// CreateTables creates the tables that are not there and waits until all can be
// used. It changes none that is there.
func (s *Store) CreateTables(ctx context.Context) error {
	for _, t := range schemas() {
		_, err := s.client.CreateTable(ctx, s.createInput(t))
		if _, exists := errors.AsType[*types.ResourceInUseException](err); err != nil && !exists {
			return fmt.Errorf("create table %s: %w", s.prefix+t.name, err)
		}
	}
	wait := dynamodb.NewTableExistsWaiter(s.client, func(o *dynamodb.TableExistsWaiterOptions) {
		o.MinDelay, o.MaxDelay = activePoll, 20*activePoll
	})
	for _, t := range schemas() {
		if err := wait.Wait(ctx, &dynamodb.DescribeTableInput{TableName: s.table(t.name)}, activeWithin); err != nil {
			return fmt.Errorf("wait for table %s: %w", s.prefix+t.name, err)
		}
	}
	return s.CheckTables(ctx)
}

// Tables returns what CreateTables would ask for, for who makes the tables by
// other means.
func Tables(prefix string) []*dynamodb.CreateTableInput {
	s := &Store{prefix: prefix}
	var all []*dynamodb.CreateTableInput
	for _, t := range schemas() {
		all = append(all, s.createInput(t))
	}
	return all
}

func (s *Store) createInput(t tableSchema) *dynamodb.CreateTableInput {
	in := &dynamodb.CreateTableInput{
		TableName:   s.table(t.name),
		BillingMode: types.BillingModePayPerRequest,
		KeySchema:   t.key.elements(),
	}
	defined := map[string]bool{}
	for _, a := range []attribute{t.key.hash, t.key.sort, t.by.hash, t.by.sort} {
		if a.name != "" && !defined[a.name] {
			defined[a.name] = true
			in.AttributeDefinitions = append(in.AttributeDefinitions,
				types.AttributeDefinition{AttributeName: aws.String(a.name), AttributeType: a.kind})
		}
	}
	if t.index == "" {
		return in
	}
	projection := &types.Projection{ProjectionType: types.ProjectionTypeKeysOnly}
	if t.with != nil {
		projection = &types.Projection{ProjectionType: types.ProjectionTypeInclude, NonKeyAttributes: t.with}
	}
	in.GlobalSecondaryIndexes = []types.GlobalSecondaryIndex{{
		IndexName: aws.String(t.index), KeySchema: t.by.elements(), Projection: projection,
	}}
	return in
}

func (k keySchema) elements() []types.KeySchemaElement {
	e := []types.KeySchemaElement{{AttributeName: aws.String(k.hash.name), KeyType: types.KeyTypeHash}}
	if k.sort.name != "" {
		e = append(e, types.KeySchemaElement{AttributeName: aws.String(k.sort.name), KeyType: types.KeyTypeRange})
	}
	return e
}

var errSchema = errors.New("the table has another layout")

// CheckTables reports whether every table is there with the right keys and
// indexes. ErrNoTables.
func (s *Store) CheckTables(ctx context.Context) error {
	for _, t := range schemas() {
		what := "check table " + s.prefix + t.name
		out, err := s.client.DescribeTable(ctx, &dynamodb.DescribeTableInput{TableName: s.table(t.name)})
		if err != nil {
			return readFault(what, err)
		}
		if out.Table == nil || out.Table.TableStatus == types.TableStatusCreating || out.Table.TableStatus == types.TableStatusDeleting {
			return fmt.Errorf("%s: %w", what, store.ErrNoTables)
		}
		if !t.matches(out.Table) {
			return fmt.Errorf("%s: %w", what, errSchema)
		}
	}
	return nil
}

func (t *tableSchema) matches(d *types.TableDescription) bool {
	if !t.key.matches(d.KeySchema) {
		return false
	}
	for _, g := range d.GlobalSecondaryIndexes {
		if aws.ToString(g.IndexName) == t.index {
			return t.by.matches(g.KeySchema)
		}
	}
	return t.index == ""
}

func (k keySchema) matches(got []types.KeySchemaElement) bool {
	want := k.elements()
	if len(got) != len(want) {
		return false
	}
	for i := range want {
		if aws.ToString(got[i].AttributeName) != aws.ToString(want[i].AttributeName) || got[i].KeyType != want[i].KeyType {
			return false
		}
	}
	return true
}
