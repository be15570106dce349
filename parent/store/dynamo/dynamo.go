// Package dynamo keeps what package store describes in DynamoDB. Every write of
// it is conditional, none is a BatchWriteItem, and what became of a write whose
// answer was lost is read from the table, never guessed.
package dynamo

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"

	"github.com/keyhold/keyhold/parent/store"
)

// Options of a Store. The zero value serves production with tables that have no
// prefix.
type Options struct {
	// Prefix of all table names, "" for none.
	Prefix string

	// Random gives transaction tokens and jitter. Nil: crypto/rand. It is read by
	// one goroutine at a time.
	Random io.Reader

	// Observe, where set, is told the capacity that each call consumed. It is
	// called from many goroutines. Meter.Observe sums up.
	Observe func(Usage)
}

// Store is a store.Store in DynamoDB. It is safe for concurrent use and holds
// nothing but its client.
type Store struct {
	client   *dynamodb.Client
	prefix   string
	observe  func(Usage)
	capacity types.ReturnConsumedCapacity
	pause    time.Duration // before the first retry of a conflict; doubles

	mu     sync.Mutex
	random io.Reader
}

var _ store.Store = (*Store)(nil)

// New returns a store over the tables that o names; CreateTables makes them.
// The client's retries stay on: the store relies on them.
func New(client *dynamodb.Client, o Options) *Store {
	s := &Store{
		client:   client,
		prefix:   o.Prefix,
		observe:  o.Observe,
		capacity: types.ReturnConsumedCapacityNone,
		pause:    conflictPause,
		random:   o.Random,
	}
	if s.random == nil {
		s.random = rand.Reader
	}
	if s.observe != nil {
		s.capacity = types.ReturnConsumedCapacityIndexes
	}
	return s
}

// token draws a ClientRequestToken. It is drawn for each call and kept through
// its retries. A token made of the content would not do: for ten minutes DynamoDB
// answers it with the success of the first time, whatever has happened since.
func (s *Store) token() (*string, error) {
	var b [16]byte
	if err := s.read(b[:]); err != nil {
		return nil, err
	}
	t := hex.EncodeToString(b[:])
	return &t, nil
}

func (s *Store) read(b []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := io.ReadFull(s.random, b); err != nil {
		return fmt.Errorf("draw random bytes: %w", err)
	}
	return nil
}

const (
	conflictRetries = 12 // then the items are too hot, and the caller backs off
	conflictPause   = 4 * time.Millisecond
	conflictCap     = 64 // times the pause; all retries together take less than 2 s
)

// backOff waits a random time before attempt n+1, n from 0.
func (s *Store) backOff(ctx context.Context, n int) error {
	var b [1]byte
	if err := s.read(b[:]); err != nil {
		return err
	}
	limit := s.pause * time.Duration(min(1<<n, conflictCap))
	timer := time.NewTimer(limit/4 + limit*3/4*time.Duration(b[0])/256)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
