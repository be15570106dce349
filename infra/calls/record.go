package calls

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
)

// Request is what a permission of DynamoDB is about.
type Request struct {
	Table  string
	Index  string // empty: the table
	Action string // as in IAM, which knows no transactions but their parts
}

// Answer is how a Recorder answers.
type Answer int

// Answers, so that code goes all its ways.
const (
	Nothing  Answer = iota // 200 and no item
	Refused                // every condition failed
	Refused2               // of a transaction, the second part alone
)

// Recorder is an http.RoundTripper that writes down what DynamoDB is asked for. It
// stores nothing.
type Recorder struct {
	Answer Answer
	Old    map[string]string // by table: the item, as JSON, that stands in the way where Refused

	mu         sync.Mutex
	seen       map[Request]bool
	operations map[Call]bool
}

// Client returns a client whose requests r gets.
func (r *Recorder) Client() *dynamodb.Client {
	return dynamodb.New(dynamodb.Options{
		Region: "us-east-1", HTTPClient: &http.Client{Transport: r}, Retryer: aws.NopRetryer{},
		Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{AccessKeyID: "recorded", SecretAccessKey: "recorded"}, nil
		}),
	})
}

// Requests returns what was asked for, sorted.
func (r *Recorder) Requests() []Request {
	return slices.SortedFunc(maps.Keys(r.seen), func(a, b Request) int {
		return strings.Compare(a.Table+" "+a.Index+" "+a.Action, b.Table+" "+b.Index+" "+b.Action)
	})
}

// Operations returns the operations by which it was asked for, sorted.
func (r *Recorder) Operations() []Call {
	return slices.SortedFunc(maps.Keys(r.operations), func(a, b Call) int { return strings.Compare(a.Action, b.Action) })
}

type part struct{ TableName string }

type body struct {
	part
	IndexName     string
	TransactItems []map[string]part
}

// parts of a transaction, and the permission that each needs.
var parts = map[string]string{"Put": "PutItem", "Update": "UpdateItem", "Delete": "DeleteItem", "ConditionCheck": "ConditionCheckItem"}

// RoundTrip implements http.RoundTripper.
func (r *Recorder) RoundTrip(req *http.Request) (*http.Response, error) {
	_, operation, ok := strings.Cut(req.Header.Get("X-Amz-Target"), ".")
	if !ok {
		return nil, errors.New("no request of DynamoDB")
	}
	raw, err := io.ReadAll(req.Body)
	if err != nil {
		return nil, err
	}
	var b body
	if err := json.Unmarshal(raw, &b); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.seen == nil {
		r.seen, r.operations = map[Request]bool{}, map[Call]bool{}
	}
	r.operations[Call{"dynamodb", operation}] = true
	for _, item := range b.TransactItems {
		for kind, p := range item {
			r.seen[Request{p.TableName, "", parts[kind]}] = true
		}
	}
	if b.TableName != "" {
		r.seen[Request{b.TableName, b.IndexName, operation}] = true
	}
	return r.answer(operation, b.TableName, len(b.TransactItems)), nil
}

func (r *Recorder) answer(operation, table string, items int) *http.Response {
	code, text := http.StatusOK, "{}"
	writes := operation == "PutItem" || operation == "UpdateItem" || operation == "DeleteItem"
	switch {
	case r.Answer == Nothing:
	case writes:
		code, text = http.StatusBadRequest, `{"__type": "com.amazonaws.dynamodb.v20120810#ConditionalCheckFailedException"}`
		if old := r.Old[table]; old != "" {
			text = strings.TrimSuffix(text, "}") + `, "Item": ` + old + "}"
		}
	case items > 0:
		reasons := make([]map[string]string, items)
		for i := range reasons {
			reasons[i] = map[string]string{"Code": "ConditionalCheckFailed"}
			if r.Answer == Refused2 && i != 1 {
				reasons[i]["Code"] = "None"
			}
		}
		list, _ := json.Marshal(reasons) //nolint:errchkjson // strings
		code, text = http.StatusBadRequest, `{"__type": "com.amazonaws.dynamodb.v20120810#TransactionCanceledException", "CancellationReasons": `+string(list)+`}`
	}
	return &http.Response{
		StatusCode: code, Status: http.StatusText(code), Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{"Content-Type": {"application/x-amz-json-1.0"}}, Body: io.NopCloser(bytes.NewReader([]byte(text))), ContentLength: int64(len(text)),
	}
}
