package dynamo

import (
	"context"
	"maps"
	"sync"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"
	"github.com/aws/smithy-go/middleware"
)

// Usage is the capacity that one call consumed, indexes included. A call that
// failed reports none.
type Usage struct {
	Operation string  // "claim batch", "commit batch", "put receipt" ...: as in error texts
	Read      float64 // read units
	Write     float64 // write units
}

// observeAs reports what calls of an operation consume.
func (s *Store) observeAs(operation string) option {
	if s.observe == nil {
		return func(*dynamodb.Options) {}
	}
	return func(o *dynamodb.Options) {
		o.APIOptions = append(o.APIOptions, func(stack *middleware.Stack) error {
			return stack.Initialize.Add(middleware.InitializeMiddlewareFunc("KeyholdUsage", func(
				ctx context.Context, in middleware.InitializeInput, next middleware.InitializeHandler,
			) (middleware.InitializeOutput, middleware.Metadata, error) {
				out, metadata, err := next.HandleInitialize(ctx, in)
				if err == nil {
					u := usage(out.Result)
					u.Operation = operation
					s.observe(u)
				}
				return out, metadata, err
			}), middleware.Before)
		})
	}
}

func usage(output any) Usage {
	switch out := output.(type) {
	case *dynamodb.GetItemOutput:
		return Usage{Read: units(out.ConsumedCapacity)}
	case *dynamodb.QueryOutput:
		return Usage{Read: units(out.ConsumedCapacity)}
	case *dynamodb.ScanOutput:
		return Usage{Read: units(out.ConsumedCapacity)}
	case *dynamodb.PutItemOutput:
		return Usage{Write: units(out.ConsumedCapacity)}
	case *dynamodb.UpdateItemOutput:
		return Usage{Write: units(out.ConsumedCapacity)}
	case *dynamodb.TransactWriteItemsOutput:
		var u Usage
		for i := range out.ConsumedCapacity {
			u.Write += units(&out.ConsumedCapacity[i])
		}
		return u
	}
	return Usage{}
}

func units(c *types.ConsumedCapacity) float64 {
	if c == nil {
		return 0
	}
	return aws.ToFloat64(c.CapacityUnits)
}

// Meter sums usage up by operation. Its zero value is ready, and safe for
// concurrent use.
type Meter struct {
	mu    sync.Mutex
	total map[string]Usage
	calls map[string]int
}

// Observe is for Options.Observe.
func (m *Meter) Observe(u Usage) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.total == nil {
		m.total, m.calls = map[string]Usage{}, map[string]int{}
	}
	sum := m.total[u.Operation]
	m.total[u.Operation] = Usage{Operation: u.Operation, Read: sum.Read + u.Read, Write: sum.Write + u.Write}
	m.calls[u.Operation]++
}

// Totals is the usage since the start by operation.
func (m *Meter) Totals() map[string]Usage {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.total)
}

// Calls is the number of successful calls by operation.
func (m *Meter) Calls() map[string]int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.calls)
}
