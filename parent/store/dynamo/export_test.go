package dynamo

import (
	"time"

	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"

	"github.com/keyhold/keyhold/parent/store"
)

// TestingOnlyTables lists the tables without their prefix.
func TestingOnlyTables() []string {
	var names []string
	for _, t := range schemas() {
		names = append(names, t.name)
	}
	return names
}

// TestingOnlyCreateInput is how a table is created.
func TestingOnlyCreateInput(s *Store, name string) *dynamodb.CreateTableInput {
	for _, t := range schemas() {
		if t.name == name {
			return s.createInput(t)
		}
	}
	return nil
}

// TestingOnlyImpatient makes s retry conflicts at once.
func TestingOnlyImpatient(s *Store) *Store {
	s.pause = time.Microsecond
	return s
}

// TestingOnlyBatchSize is the size of a control item as DynamoDB counts it.
func TestingOnlyBatchSize(b store.Batch) int { return itemSize(batchItem(b)) }

// TestingOnlyLeaseSize is the size of a lease item as DynamoDB counts it.
func TestingOnlyLeaseSize(l store.Lease) int { return itemSize(leaseItem(l)) }

func itemSize(m item) int {
	n := 0
	for name, v := range m {
		n += len(name) + valueSize(v)
	}
	return n
}

// valueSize follows "DynamoDB item sizes and formats" of the developer guide: a
// number has a byte for two digits and one more, a list 3 bytes and one for each
// element.
func valueSize(v types.AttributeValue) int {
	switch v := v.(type) {
	case *types.AttributeValueMemberS:
		return len(v.Value)
	case *types.AttributeValueMemberB:
		return len(v.Value)
	case *types.AttributeValueMemberN:
		return (len(v.Value)+1)/2 + 1
	case *types.AttributeValueMemberNS:
		n := 0
		for _, d := range v.Value {
			n += (len(d)+1)/2 + 1
		}
		return n
	case *types.AttributeValueMemberL:
		n := 3
		for _, e := range v.Value {
			n += 1 + valueSize(e)
		}
		return n
	}
	return 1
}
