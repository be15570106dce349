package fault

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"syscall"
	"time"
)

// The errors a broken connection gives: the SDK tells from them that trying again may help.
var (
	errNotSent = &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	errLost    = &net.OpError{Op: "read", Net: "tcp", Err: syscall.ECONNRESET}
)

func (t *Transport) carryOut(req *http.Request, call Call, kind Kind) (*http.Response, error) {
	switch kind {
	case None:
		return t.next.RoundTrip(req)
	case Throttle:
		return refuse(req, http.StatusBadRequest, "ProvisionedThroughputExceededException", nil)
	case RateLimit:
		return refuse(req, http.StatusBadRequest, "ThrottlingException", nil)
	case ServerError:
		return refuse(req, http.StatusInternalServerError, "InternalServerError", nil)
	case TransactionConflict:
		return conflict(req, call)
	case DropRequest:
		closeBody(req)
		return nil, errNotSent
	case DropAnswer:
		res, err := t.next.RoundTrip(req)
		if err != nil {
			return nil, err
		}
		discard(res)
		return nil, errLost
	case CutAnswer:
		return cut(t.next.RoundTrip(req))
	default:
		closeBody(req)
		return nil, fmt.Errorf("inject a fault: %v is none", kind)
	}
}

type cancellationReason struct {
	Code    string `json:"Code"`
	Message string `json:"Message,omitempty"`
}

// conflict answers as DynamoDB does when another transaction holds the first item.
func conflict(req *http.Request, call Call) (*http.Response, error) {
	if call.Operation != "TransactWriteItems" && call.Operation != "TransactGetItems" {
		return refuse(req, http.StatusBadRequest, "TransactionConflictException", nil)
	}
	var transaction struct {
		TransactItems []json.RawMessage
	}
	if err := json.NewDecoder(req.Body).Decode(&transaction); err != nil {
		closeBody(req)
		return nil, fmt.Errorf("inject a conflict: read the transaction: %w", err)
	}
	reasons := make([]cancellationReason, len(transaction.TransactItems)) // one for each item, in order
	for i := range reasons {
		reasons[i].Code = "None"
	}
	if len(reasons) > 0 {
		reasons[0] = cancellationReason{Code: "TransactionConflict", Message: "Transaction is ongoing for the item"}
	}
	return refuse(req, http.StatusBadRequest, "TransactionCanceledException", reasons)
}

// refuse answers in the place of the service, which does not see the request.
func refuse(req *http.Request, status int, code string, reasons []cancellationReason) (*http.Response, error) {
	closeBody(req)
	body, err := json.Marshal(struct {
		Type    string               `json:"__type"`
		Message string               `json:"message"`
		Reasons []cancellationReason `json:"CancellationReasons,omitempty"`
	}{"com.amazonaws.fault#" + code, "injected", reasons})
	if err != nil {
		return nil, fmt.Errorf("inject %s: %w", code, err)
	}
	return &http.Response{
		Status:     fmt.Sprintf("%d %s", status, http.StatusText(status)),
		StatusCode: status,
		Proto:      "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header:        http.Header{"Content-Type": {req.Header.Get("Content-Type")}},
		Body:          io.NopCloser(bytes.NewReader(body)),
		ContentLength: int64(len(body)),
		Request:       req,
	}, nil
}

// cut lets half of the body through and then breaks the connection.
func cut(res *http.Response, err error) (*http.Response, error) {
	if err != nil {
		return nil, err
	}
	body, err := io.ReadAll(res.Body)
	discard(res)
	if err != nil {
		return nil, fmt.Errorf("inject a cut: read the answer: %w", err)
	}
	res.Body = io.NopCloser(io.MultiReader(bytes.NewReader(body[:len(body)/2]), broken{}))
	return res, nil
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, errLost }

func wait(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// discard reads the answer to its end, so that the connection under it can serve again.
func discard(res *http.Response) {
	_, _ = io.Copy(io.Discard, res.Body) // the answer is to be lost
	_ = res.Body.Close()
}

func closeBody(req *http.Request) {
	if req.Body != nil {
		_ = req.Body.Close() // nothing was sent from it
	}
}
