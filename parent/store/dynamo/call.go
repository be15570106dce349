package dynamo

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"
	"github.com/aws/smithy-go"
	"github.com/aws/smithy-go/middleware"

	"github.com/keyhold/keyhold/parent/store"
)

type option = func(*dynamodb.Options)

// refused is a write that did not happen because conditions did not hold: what
// became of its items, in their order.
type refused []outcome

type outcome struct {
	failed bool // the condition on this item
	old    item // what was in the table then; nil where there was none, or where failed is false
}

// attempts watches the attempts of one call. The SDK reports the last error
// only, but an attempt before it may have been applied with its answer lost.
type attempts struct {
	unknown bool // written by one attempt after the other
}

func (a *attempts) watch(o *dynamodb.Options) {
	o.APIOptions = append(o.APIOptions, func(stack *middleware.Stack) error {
		each := middleware.FinalizeMiddlewareFunc("KeyholdAttempt", func(
			ctx context.Context, in middleware.FinalizeInput, next middleware.FinalizeHandler,
		) (middleware.FinalizeOutput, middleware.Metadata, error) {
			out, metadata, err := next.HandleFinalize(ctx, in)
			a.unknown = a.unknown || err != nil && !declined(err)
			return out, metadata, err
		})
		return stack.Finalize.Insert(each, "Retry", middleware.After)
	})
}

// declined reports whether the service said that it did not apply a request. Of
// a broken connection, a 500 and an answer that cannot be read it is not known.
func declined(err error) bool {
	api, isAPI := errors.AsType[smithy.APIError](err)
	answer, isAnswer := errors.AsType[*awshttp.ResponseError](err)
	if !isAPI || !isAnswer || api.ErrorCode() == "TransactionInProgressException" {
		return false
	}
	status := answer.HTTPStatusCode()
	return status >= http.StatusBadRequest && status < http.StatusInternalServerError && status != http.StatusRequestTimeout
}

// fault gives err the contract's meaning. A sentinel says that nothing was
// written, so where an attempt's outcome is unknown there is none.
func (a *attempts) fault(what string, err error) error {
	if a.unknown {
		return fmt.Errorf("%s: outcome unknown: %w", what, err)
	}
	return readFault(what, err)
}

// refuse is fault for a write whose condition failed. An attempt before may have
// been applied, and its item changed by others since.
func (a *attempts) refuse(what string, sentinel error) error {
	if a.unknown {
		return fmt.Errorf("%s: outcome unknown: the item is not as it was", what)
	}
	return fmt.Errorf("%s: %w", what, sentinel)
}

// readFault is fault for a call that writes nothing.
func readFault(what string, err error) error {
	if _, missing := errors.AsType[*types.ResourceNotFoundException](err); missing {
		return fmt.Errorf("%s: %w: %w", what, store.ErrNoTables, err)
	}
	if throttled(err) {
		return fmt.Errorf("%s: %w: %w", what, store.ErrThrottled, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

func throttled(err error) bool {
	api, ok := errors.AsType[smithy.APIError](err)
	if !ok {
		return false
	}
	switch api.ErrorCode() {
	case "ProvisionedThroughputExceededException", "ThrottlingException", "RequestLimitExceeded":
		return true
	}
	return conflict(err)
}

// conflict reports whether the items of a write were busy.
func conflict(err error) bool {
	_, single := errors.AsType[*types.TransactionConflictException](err)
	return single || hasReason(err, "TransactionConflict", "ThrottlingError", "ProvisionedThroughputExceeded")
}

// hasReason reports whether a transaction was cancelled for one of these reasons.
func hasReason(err error, codes ...string) bool {
	canceled, ok := errors.AsType[*types.TransactionCanceledException](err)
	if !ok {
		return false
	}
	for _, r := range canceled.CancellationReasons {
		for _, code := range codes {
			if aws.ToString(r.Code) == code {
				return true
			}
		}
	}
	return false
}

// write runs a conditional write until it has an answer. Of a conflict with a
// transaction under way nothing was applied, but the SDK does not try it again.
func (s *Store) write(ctx context.Context, what string, a *attempts, call func(context.Context, ...option) error) (refused, error) {
	for n := 0; ; n++ {
		err := call(ctx, a.watch, s.observeAs(what))
		if err == nil {
			return nil, nil
		}
		// Beside a conflict a failed condition says little: not all were looked at.
		if r := refusal(err); r != nil && !conflict(err) {
			return r, nil
		}
		if !conflict(err) || n == conflictRetries {
			return nil, a.fault(what, err)
		}
		if err := s.backOff(ctx, n); err != nil {
			return nil, a.fault(what, err)
		}
	}
}

// refusal reads which conditions failed out of err; nil where none did.
func refusal(err error) refused {
	if one, ok := errors.AsType[*types.ConditionalCheckFailedException](err); ok {
		return refused{{failed: true, old: one.Item}}
	}
	if !hasReason(err, "ConditionalCheckFailed") {
		return nil
	}
	canceled, _ := errors.AsType[*types.TransactionCanceledException](err)
	r := make(refused, len(canceled.CancellationReasons))
	for i, reason := range canceled.CancellationReasons {
		r[i].failed = aws.ToString(reason.Code) == "ConditionalCheckFailed"
		r[i].old = reason.Item
	}
	return r
}

// transact writes all or nothing.
func (s *Store) transact(ctx context.Context, what string, items ...types.TransactWriteItem) (refused, error) {
	token, err := s.token()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	r, err := s.write(ctx, what, &attempts{}, func(ctx context.Context, o ...option) error {
		_, err := s.client.TransactWriteItems(ctx, &dynamodb.TransactWriteItemsInput{
			TransactItems:          items,
			ClientRequestToken:     token,
			ReturnConsumedCapacity: s.capacity,
		}, o...)
		return err
	})
	if err == nil && r != nil && len(r) != len(items) {
		return nil, fmt.Errorf("%s: the service gave %d reasons for %d items", what, len(r), len(items))
	}
	return r, err
}

// now is the item that a refused transaction found, read again where the
// transaction was refused for another item; nil where there is none.
func (s *Store) now(ctx context.Context, what string, o outcome, table string, key item) (item, error) {
	if o.failed {
		return o.old, nil
	}
	m, err := s.get(ctx, what, table, key, "")
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil
	}
	return m, err
}

// putAbsent puts m where no item of its key is. Otherwise it returns that item.
func (s *Store) putAbsent(ctx context.Context, what, table, key string, m item) (old item, err error) {
	return s.put(ctx, what, table, m, absent(key))
}

// absent is the condition that there is no item.
func absent(key string) when { return when{expression: "attribute_not_exists(" + key + ")"} }

// put puts m under a condition. Where it does not hold it returns the item that
// is there.
func (s *Store) put(ctx context.Context, what, table string, m item, w when) (old item, err error) {
	return s.putNoting(ctx, what, table, m, w, &attempts{})
}

// putNoting is put for an item that others may change again at once, as
// updateNoting is for update.
func (s *Store) putNoting(ctx context.Context, what, table string, m item, w when, a *attempts) (old item, err error) {
	r, err := s.write(ctx, what, a, func(ctx context.Context, o ...option) error {
		_, err := s.client.PutItem(ctx, &dynamodb.PutItemInput{
			TableName:                           s.table(table),
			Item:                                m,
			ConditionExpression:                 &w.expression,
			ExpressionAttributeValues:           w.values,
			ReturnValuesOnConditionCheckFailure: types.ReturnValuesOnConditionCheckFailureAllOld,
			ReturnConsumedCapacity:              s.capacity,
		}, o...)
		return err
	})
	return oldOf(r, err)
}

// update changes one item. Where its condition does not hold it returns the item
// that is there, empty where there is none.
func (s *Store) update(ctx context.Context, what string, u change) (old item, err error) {
	return s.updateNoting(ctx, what, u, &attempts{})
}

// updateNoting is update for an item that others may change again at once: the
// caller looks at a before it says that nothing was written.
func (s *Store) updateNoting(ctx context.Context, what string, u change, a *attempts) (old item, err error) {
	r, err := s.write(ctx, what, a, func(ctx context.Context, o ...option) error {
		_, err := s.client.UpdateItem(ctx, &dynamodb.UpdateItemInput{
			TableName:                           s.table(u.table),
			Key:                                 u.key,
			UpdateExpression:                    &u.expression,
			ConditionExpression:                 &u.when.expression,
			ExpressionAttributeValues:           u.all(),
			ReturnValuesOnConditionCheckFailure: types.ReturnValuesOnConditionCheckFailureAllOld,
			ReturnConsumedCapacity:              s.capacity,
		}, o...)
		return err
	})
	return oldOf(r, err)
}

// oldOf is the item that stood in the way of a single write; nil where none did.
func oldOf(r refused, err error) (item, error) {
	if err != nil || r == nil {
		return nil, err
	}
	if r[0].old == nil {
		return item{}, nil
	}
	return r[0].old, nil
}

// get reads one item consistently; projection "" is all of it. ErrNotFound.
func (s *Store) get(ctx context.Context, what, table string, key item, projection string) (item, error) {
	in := &dynamodb.GetItemInput{
		TableName:              s.table(table),
		Key:                    key,
		ConsistentRead:         aws.Bool(true),
		ReturnConsumedCapacity: s.capacity,
	}
	if projection != "" {
		in.ProjectionExpression = &projection
	}
	out, err := s.client.GetItem(ctx, in, s.observeAs(what))
	if err != nil {
		return nil, readFault(what, err)
	}
	if out.Item == nil {
		return nil, fmt.Errorf("%s: %w", what, store.ErrNotFound)
	}
	return out.Item, nil
}

func (s *Store) table(name string) *string { return aws.String(s.prefix + name) }
