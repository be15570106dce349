package kms

import (
	"context"
	"time"
)

// FaultKind is what goes wrong with one request.
type FaultKind uint8

// The kinds.
const (
	NoFault       FaultKind = iota
	Throttle                // ThrottlingException, nothing done
	InternalError           // KMSInternalException with status 500, nothing done
	DropBefore              // the connection closes, nothing done
	DropAnswer              // done, then the connection closes without an answer
)

// Fault is the fate of one request: first the delay, then the kind.
type Fault struct {
	Kind  FaultKind
	Delay time.Duration
}

// wait returns early when the client has gone.
func (f Fault) wait(ctx context.Context) {
	if f.Delay <= 0 {
		return
	}
	timer := time.NewTimer(f.Delay)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
