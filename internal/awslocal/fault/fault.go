// Package fault injects what goes wrong between the AWS SDK and a service, below the SDK, so that its
// retries and our handling of unknown outcomes run as they do in production. It refuses to guess:
// what it injects is chosen by the test and can be counted.
package fault

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// Kind is what happens to a request.
type Kind int

// The kinds of faults. The service sees nothing of a request, up to DropRequest; after DropAnswer and
// CutAnswer it has applied it.
const (
	None                Kind = iota // the request goes through
	Throttle                        // 400 ProvisionedThroughputExceededException
	RateLimit                       // 400 ThrottlingException
	ServerError                     // 500 InternalServerError
	TransactionConflict             // 400 TransactionCanceledException with that reason; TransactionConflictException outside a transaction
	DropRequest                     // the connection breaks before the service has the request
	DropAnswer                      // the service applies the request, then the connection breaks
	CutAnswer                       // as DropAnswer, but in the middle of the answer's body
)

var kindNames = [...]string{
	None: "none", Throttle: "throttle", RateLimit: "rate_limit", ServerError: "server_error",
	TransactionConflict: "transaction_conflict", DropRequest: "drop_request", DropAnswer: "drop_answer", CutAnswer: "cut_answer",
}

// String is the kind's name in snake case.
func (k Kind) String() string {
	if k < 0 || int(k) >= len(kindNames) {
		return fmt.Sprintf("kind(%d)", int(k))
	}
	return kindNames[k]
}

// Fault is what is done to one request.
type Fault struct {
	Kind   Kind
	Before time.Duration // wait before the request is sent, or the fault happens
	After  time.Duration // hold the answer, or the error, back that long
}

// Call is one attempt of the SDK; its retries count as calls.
type Call struct {
	Operation string // after the dot of X-Amz-Target, such as "TransactWriteItems"
	Nth       int    // of this operation, from 1
	Overall   int    // of all operations, from 1
}

// Choose says what happens to a call. It is called once for each, from many goroutines.
type Choose func(Call) Fault

// Injection is a fault that was carried out.
type Injection struct {
	Call  Call
	Fault Fault
}

// Transport is a RoundTripper that injects faults. Hand it to awshttp.Options.Wrap.
type Transport struct {
	next   http.RoundTripper
	choose Choose

	mu       sync.Mutex
	calls    map[string]int
	overall  int
	injected []Injection
}

// New puts the faults that choose asks for in front of next. A nil choose asks for none.
func New(next http.RoundTripper, choose Choose) *Transport {
	if choose == nil {
		choose = func(Call) Fault { return Fault{} }
	}
	return &Transport{next: next, choose: choose, calls: map[string]int{}}
}

// RoundTrip sends req, or fails as asked. It closes req's body in either case.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	call := t.count(operation(req))
	f := t.choose(call)
	if f != (Fault{}) {
		t.note(Injection{call, f})
	}
	if err := wait(req.Context(), f.Before); err != nil {
		closeBody(req)
		return nil, err
	}
	res, err := t.carryOut(req, call, f.Kind)
	if waitErr := wait(req.Context(), f.After); waitErr != nil && err == nil {
		discard(res)
		return nil, waitErr
	}
	return res, err
}

// Calls is how many requests of an operation arrived, injected or not.
func (t *Transport) Calls(operation string) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.calls[operation]
}

// Operations is all operations that arrived, with their number.
func (t *Transport) Operations() map[string]int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.calls)
}

// Injected is everything that was injected, in order.
func (t *Transport) Injected() []Injection {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.injected)
}

// Count is how often a kind was injected.
func (t *Transport) Count(k Kind) int {
	n := 0
	for _, i := range t.Injected() {
		if i.Fault.Kind == k {
			n++
		}
	}
	return n
}

func (t *Transport) count(operation string) Call {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.calls[operation]++
	t.overall++
	return Call{Operation: operation, Nth: t.calls[operation], Overall: t.overall}
}

func (t *Transport) note(i Injection) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.injected = append(t.injected, i)
}

// operation reads "TransactWriteItems" out of "DynamoDB_20120810.TransactWriteItems".
func operation(req *http.Request) string {
	target := req.Header.Get("X-Amz-Target")
	return target[strings.LastIndexByte(target, '.')+1:]
}
