package dynamo_test

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"

	"github.com/keyhold/keyhold/internal/awslocal/fault"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/dynamo"
)

// Batch and lease change together, so only a hand in the table can part them.
func TestALeaseThatMovedOnAloneFencesItsBatchOff(t *testing.T) {
	for name, write := range map[string]func(*dynamo.Store, store.Batch) error{
		"commit": func(s *dynamo.Store, b store.Batch) error {
			return s.Commit(t.Context(), store.Commit{Batch: b, Result: []byte("result"), Now: start})
		},
		"release": func(s *dynamo.Store, b store.Batch) error {
			return s.Release(t.Context(), b, store.End{State: record.Ready, Now: start})
		},
	} {
		t.Run(name, func(t *testing.T) {
			tables := prefix()
			s := newStore(t, dynamo.Options{Prefix: tables})
			fill(t, s, 1, 1)
			b := must[store.Batch](t)(s.Claim(t.Context(), claimOf(0)))
			_, err := newClient(t, nil).UpdateItem(t.Context(), &dynamodb.UpdateItemInput{
				TableName:                 aws.String(tables + "leases"),
				Key:                       map[string]types.AttributeValue{"k": &types.AttributeValueMemberB{Value: b.KeyID[:]}},
				UpdateExpression:          aws.String("SET f = f + :one"),
				ExpressionAttributeValues: map[string]types.AttributeValue{":one": &types.AttributeValueMemberN{Value: "1"}},
			})
			noError(t, err)
			if err := write(s, b); !errors.Is(err, store.ErrFenced) {
				t.Errorf("error %v, want %v", err, store.ErrFenced)
			}
			if got := must[store.Batch](t)(s.Batch(t.Context(), b.ID)); got.State != b.State {
				t.Errorf("the batch is %s, want %s", got.State, b.State)
			}
		})
	}
}

func TestAnAbortThatBrokeOffGoesOnWhereItStopped(t *testing.T) {
	const batches, applied = 60, 30
	tables := prefix()
	s := newStore(t, dynamo.Options{Prefix: tables})
	fill(t, s, batches, 0)
	broken := faulty(t, tables, func(c fault.Call) fault.Fault {
		if c.Operation == "TransactWriteItems" && c.Nth > applied {
			return fault.Fault{Kind: fault.ServerError}
		}
		return fault.Fault{}
	})
	if _, err := broken.AbortImport(t.Context(), importID); err == nil {
		t.Fatal("the abort did not break off")
	}
	left := 0
	for n := range batches {
		if b, err := s.Batch(t.Context(), newBatch(n).ID); present(t, b, err) {
			left++
		}
	}
	if left != batches-applied {
		t.Fatalf("%d batches are left, want %d", left, batches-applied)
	}
	must[int](t)(s.AbortImport(t.Context(), importID))
	for n := range batches {
		if b, err := s.Batch(t.Context(), newBatch(n).ID); present(t, b, err) {
			t.Errorf("batch %d is still there", n)
		}
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestAConditionThatFailsBesideAConflictIsTriedAgain(t *testing.T) {
	const canceled = `{"__type":"com.amazonaws.dynamodb.v20120810#TransactionCanceledException",` +
		`"CancellationReasons":[{"Code":"TransactionConflict"},{"Code":"ConditionalCheckFailed"}]}`
	tables := prefix()
	clean := newStore(t, dynamo.Options{Prefix: tables})
	fill(t, clean, 0, 0)
	var calls atomic.Int64
	s := dynamo.New(newClient(t, func(next http.RoundTripper) http.RoundTripper {
		return roundTripper(func(r *http.Request) (*http.Response, error) {
			if !strings.HasSuffix(r.Header.Get("X-Amz-Target"), ".TransactWriteItems") || calls.Add(1) > 1 {
				return next.RoundTrip(r)
			}
			return &http.Response{
				StatusCode: http.StatusBadRequest, Request: r, ContentLength: int64(len(canceled)),
				Header: http.Header{"Content-Type": {"application/x-amz-json-1.0"}},
				Body:   io.NopCloser(strings.NewReader(canceled)),
			}, nil
		})
	}), dynamo.Options{Prefix: tables})
	noError(t, s.PutBatch(t.Context(), newBatch(0)))
	if n := calls.Load(); n != 2 {
		t.Errorf("%d transactions, want 2", n)
	}
	must[store.Batch](t)(clean.Batch(t.Context(), newBatch(0).ID))
}
