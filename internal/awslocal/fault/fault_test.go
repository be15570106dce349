package fault_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"
	"github.com/aws/smithy-go"
	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/awshttp"
	"github.com/keyhold/keyhold/internal/awslocal/fault"
)

// service counts the requests it applied.
type service struct {
	*httptest.Server
	applied atomic.Int64
}

func newService(t *testing.T) *service {
	t.Helper()
	s := &service{}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			t.Errorf("read request: %v", err)
		}
		s.applied.Add(1)
		w.Header().Set("Content-Type", "application/x-amz-json-1.0")
		_, _ = io.WriteString(w, `{"Attributes":{"id":{"S":"a record"}}}`)
	}))
	t.Cleanup(s.Close)
	return s
}

// client returns an SDK client whose requests pass through the faults that choose asks for.
func (s *service) client(attempts int, choose fault.Choose) (*dynamodb.Client, *fault.Transport) {
	var faults *fault.Transport
	httpClient := awshttp.New(awshttp.Options{Wrap: func(next http.RoundTripper) http.RoundTripper {
		faults = fault.New(next, choose)
		return faults
	}})
	return dynamodb.New(dynamodb.Options{
		Region:       "us-east-1",
		BaseEndpoint: aws.String(s.URL),
		Credentials:  credentials.NewStaticCredentialsProvider("AKIDEXAMPLE", "example", ""),
		HTTPClient:   httpClient,
		Retryer: retry.NewStandard(func(o *retry.StandardOptions) {
			o.MaxAttempts = attempts
			o.Backoff = retry.BackoffDelayerFunc(func(int, error) (time.Duration, error) { return 0, nil })
		}),
	}), faults
}

func item() map[string]types.AttributeValue {
	return map[string]types.AttributeValue{"id": &types.AttributeValueMemberS{Value: "1"}}
}

func put(ctx context.Context, c *dynamodb.Client) error {
	_, err := c.PutItem(ctx, &dynamodb.PutItemInput{TableName: aws.String("t"), Item: item()})
	return err
}

func transact(ctx context.Context, c *dynamodb.Client) error {
	put := types.TransactWriteItem{Put: &types.Put{TableName: aws.String("t"), Item: item()}}
	_, err := c.TransactWriteItems(ctx, &dynamodb.TransactWriteItemsInput{TransactItems: []types.TransactWriteItem{put, put, put}})
	return err
}

func always(k fault.Kind) fault.Choose {
	return func(fault.Call) fault.Fault { return fault.Fault{Kind: k} }
}

func TestTheSDKSeesEachFaultAsAWSGivesIt(t *testing.T) {
	for _, tc := range []struct {
		kind    fault.Kind
		call    func(context.Context, *dynamodb.Client) error
		code    string // of the SDK's API error; empty where the connection broke
		applied int64
	}{
		{fault.Throttle, put, "ProvisionedThroughputExceededException", 0},
		{fault.RateLimit, put, "ThrottlingException", 0},
		{fault.ServerError, put, "InternalServerError", 0},
		{fault.TransactionConflict, put, "TransactionConflictException", 0},
		{fault.TransactionConflict, transact, "TransactionCanceledException", 0},
		{fault.DropRequest, put, "", 0},
		{fault.DropAnswer, put, "", 1},
		{fault.CutAnswer, put, "", 1},
		{fault.DropAnswer, transact, "", 1},
	} {
		t.Run(tc.kind.String()+" "+tc.code, func(t *testing.T) {
			s := newService(t)
			c, faults := s.client(1, always(tc.kind))
			err := tc.call(t.Context(), c)
			if err == nil {
				t.Fatal("the call succeeded")
			}
			var code string
			if apiErr, ok := errors.AsType[smithy.APIError](err); ok {
				code = apiErr.ErrorCode()
			}
			if code != tc.code {
				t.Errorf("code %q, want %q (%v)", code, tc.code, err)
			}
			if got := s.applied.Load(); got != tc.applied {
				t.Errorf("applied %d times, want %d", got, tc.applied)
			}
			if got := faults.Count(tc.kind); got != 1 {
				t.Errorf("counted %d faults, want 1", got)
			}
		})
	}
}

func TestAConflictGivesAReasonForEachItem(t *testing.T) {
	c, _ := newService(t).client(1, always(fault.TransactionConflict))
	canceled, ok := errors.AsType[*types.TransactionCanceledException](transact(t.Context(), c))
	if !ok {
		t.Fatal("the error is no TransactionCanceledException")
	}
	var codes []string
	for _, r := range canceled.CancellationReasons {
		codes = append(codes, aws.ToString(r.Code))
	}
	if diff := cmp.Diff([]string{"TransactionConflict", "None", "None"}, codes); diff != "" {
		t.Errorf("reasons (-want +got):\n%s", diff)
	}
}

func TestTheSDKTriesAgainAfterEachFaultAndALostAnswerIsAppliedTwice(t *testing.T) {
	for _, tc := range []struct {
		kind    fault.Kind
		applied int64
	}{
		{fault.Throttle, 1},
		{fault.RateLimit, 1},
		{fault.ServerError, 1},
		{fault.DropRequest, 1},
		{fault.DropAnswer, 2},
	} {
		t.Run(tc.kind.String(), func(t *testing.T) {
			s := newService(t)
			step := fault.Step{Operation: "PutItem", Nth: 1, Fault: fault.Fault{Kind: tc.kind}}
			c, faults := s.client(2, fault.Script(step))
			if err := put(t.Context(), c); err != nil {
				t.Fatalf("put: %v", err)
			}
			if got := s.applied.Load(); got != tc.applied {
				t.Errorf("applied %d times, want %d", got, tc.applied)
			}
			if got := faults.Calls("PutItem"); got != 2 {
				t.Errorf("%d attempts, want 2", got)
			}
			want := []fault.Injection{{Call: fault.Call{Operation: "PutItem", Nth: 1, Overall: 1}, Fault: step.Fault}}
			if diff := cmp.Diff(want, faults.Injected()); diff != "" {
				t.Errorf("injected (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDelaysAreKeptAndEndWithTheContext(t *testing.T) {
	for _, tc := range []struct {
		name    string
		fault   fault.Fault
		patient bool
		sent    bool
		took    time.Duration
	}{
		{"before", fault.Fault{Before: 3 * time.Second}, true, true, 3 * time.Second},
		{"after", fault.Fault{After: 3 * time.Second}, true, true, 3 * time.Second},
		{"before, given up", fault.Fault{Before: time.Hour}, false, false, 10 * time.Second},
		{"after, given up", fault.Fault{After: time.Hour}, false, true, 10 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				sent := false
				network := roundTripFunc(func(*http.Request) (*http.Response, error) {
					sent = true
					return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}, nil
				})
				faults := fault.New(network, func(fault.Call) fault.Fault { return tc.fault })
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://localhost/", http.NoBody)
				if err != nil {
					t.Fatal(err)
				}
				start := time.Now()
				res, err := faults.RoundTrip(req)
				if err == nil {
					err = res.Body.Close()
				}
				if patient := !errors.Is(err, context.DeadlineExceeded); patient != tc.patient {
					t.Errorf("error %v, want an answer: %v", err, tc.patient)
				}
				if sent != tc.sent {
					t.Errorf("sent %v, want %v", sent, tc.sent)
				}
				if took := time.Since(start); took != tc.took {
					t.Errorf("took %v, want %v", took, tc.took)
				}
			})
		})
	}
}

func TestTheBodyIsClosedWhateverIsInjected(t *testing.T) {
	for kind := fault.None; kind <= fault.CutAnswer+1; kind++ { // one past the last is no kind
		t.Run(kind.String(), func(t *testing.T) {
			s := newService(t)
			body := &closeRecorder{}
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.URL, body)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("X-Amz-Target", "DynamoDB_20120810.TransactWriteItems")
			res, err := fault.New(http.DefaultTransport, always(kind)).RoundTrip(req)
			if err == nil {
				err = res.Body.Close()
			}
			if failed, want := err != nil, kind >= fault.TransactionConflict && kind != fault.CutAnswer; failed != want {
				t.Errorf("error %v, want one: %v", err, want)
			}
			if !body.closed.Load() {
				t.Error("the body was left open")
			}
		})
	}
}

type closeRecorder struct{ closed atomic.Bool }

func (*closeRecorder) Read([]byte) (int, error) { return 0, io.EOF }

func (c *closeRecorder) Close() error {
	c.closed.Store(true)
	return nil
}

type roundTripFunc func(*http.Request) (*http.Response, error)

func (f roundTripFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
