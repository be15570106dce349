package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	mrand "math/rand/v2"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"
	"golang.org/x/sync/errgroup"

	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/awshttp"
	"github.com/keyhold/keyhold/internal/awslocal/dynoxide"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/parent/intake"
	"github.com/keyhold/keyhold/parent/lease"
	"github.com/keyhold/keyhold/parent/pipeline"
	"github.com/keyhold/keyhold/parent/signclient"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/dynamo"
)

const pool = "main"

// withStore runs f on fresh tables of a database in memory.
func withStore(ctx context.Context, observe func(dynamo.Usage), f func(*dynamodb.Client, *dynamo.Store) error) (err error) {
	db, err := dynoxide.Start(ctx, dynoxide.Options{})
	if err != nil {
		return fmt.Errorf("start the local DynamoDB (make tools installs it): %w", err)
	}
	defer func() { err = errors.Join(err, db.Kill()) }()
	endpoint := db.Endpoint()
	client := dynamodb.New(dynamodb.Options{
		Region: "us-east-1", BaseEndpoint: &endpoint, HTTPClient: awshttp.New(awshttp.Options{}),
		Credentials: credentials.NewStaticCredentialsProvider("bench", "bench", ""),
	})
	s := dynamo.New(client, dynamo.Options{Observe: observe})
	if err := s.CreateTables(ctx); err != nil {
		return fmt.Errorf("create the tables: %w", err)
	}
	return f(client, s)
}

const (
	unitRecords = 10_000
	unitBatch   = 500
	unitKeys    = 20
)

// writeUnits counts what claim, receipt and commit of an undisturbed run
// consume, index writes included.
func writeUnits(ctx context.Context, _ options) (rows []row, err error) {
	var meter dynamo.Meter
	err = withStore(ctx, meter.Observe, func(_ *dynamodb.Client, s *dynamo.Store) error { return signSome(ctx, s) })
	if err != nil {
		return nil, err
	}
	batches := unitRecords / unitBatch
	total, parts := 0.0, []string{}
	for _, op := range []string{"claim batch", "put receipt", "commit batch"} {
		u := 0.0
		for name, usage := range meter.Totals() {
			if strings.HasPrefix(name, op) {
				u += usage.Write
			}
		}
		if u == 0 {
			return nil, fmt.Errorf("no %q was counted", op)
		}
		total += u
		parts = append(parts, fmt.Sprintf("%s %.1f", op, u/float64(batches)))
	}
	return []row{{
		name: "write units per record, claim, receipt and commit", value: total / unitRecords, unit: "units", atMost: 0.17,
		raw: "units per batch of 500: " + strings.Join(parts, ", "),
	}}, nil
}

func signSome(ctx context.Context, s *dynamo.Store) error {
	enclave, err := enclavetest.New(ctx, enclavetest.Options{Keys: unitKeys})
	if err != nil {
		return err
	}
	defer enclave.Close()
	if err := putKeys(ctx, s, enclave); err != nil {
		return err
	}
	var lines strings.Builder
	if err := intake.Generate(&lines, unitRecords, payloadSize, 1, false); err != nil {
		return err
	}
	_, err = intake.Run(ctx, s, strings.NewReader(lines.String()), intake.Options{
		Pool: pool, Kind: record.Message, BatchSize: unitBatch, SigLen: record.Secp256k1.SignatureLen(), Now: time.Now,
	})
	if err != nil {
		return err
	}
	return drain(ctx, s, enclave)
}

func putKeys(ctx context.Context, s *dynamo.Store, enclave *enclavetest.Server) error {
	var keys []store.Key
	for _, e := range enclave.Sealed().Entries {
		entry, err := sealed.DecodeEntry(e)
		if err != nil {
			return err
		}
		keys = append(keys, store.Key{ID: entry.Public.KeyID, Keyring: sealed.KeyringID(entry.Public.Keyring, entry.Public.Epoch), Pool: pool, Sealed: e})
	}
	return s.PutKeys(ctx, keys)
}

// drain lets one parent sign until nothing is ready.
func drain(ctx context.Context, s *dynamo.Store, enclave *enclavetest.Server) error {
	ctx, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() {
		ended <- pipeline.Run(ctx, pipeline.Config{
			Store: s, Workers: 2, Owner: "bench", Rand: mrand.New(mrand.NewPCG(1, 2)), Logger: slog.New(slog.DiscardHandler), //nolint:gosec // jitter
			Enclaves: []pipeline.Enclave{{Name: "bench", Connect: func(ctx context.Context) (*signclient.Client, error) {
				return signclient.Connect(ctx, enclave.Dial, signclient.Options{})
			}}},
		})
	}()
	defer stop()
	for {
		open := 0
		for shard := range store.ReadyShards {
			n, err := s.CountReady(ctx, shard)
			if err != nil {
				return errors.Join(err, ctx.Err())
			}
			open += n
		}
		if open == 0 {
			stop()
			return <-ended
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case err := <-ended:
			return errors.Join(errors.New("the pipeline ended early"), err)
		case <-ctx.Done():
			return errors.Join(ctx.Err(), <-ended)
		}
	}
}

const (
	picks   = 2000
	perFill = 50 // picks from one fill of the window
)

// keyPick compares taking the next key out of a large and a small pool.
func keyPick(ctx context.Context, o options) (rows []row, err error) {
	const small = 100
	var took [2]time.Duration
	for i, n := range []int{small, o.pool} {
		o.say("filling a pool of %d keys", n)
		err = withStore(ctx, nil, func(c *dynamodb.Client, s *dynamo.Store) (err error) {
			if err := fill(ctx, c, s, pool, n); err != nil {
				return err
			}
			took[i], err = pickMany(ctx, s, pool)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return []row{{
		name: fmt.Sprintf("picking a key, %d in the pool against %d", o.pool, small), value: float64(took[1]) / float64(took[0]), unit: "x", atMost: 3,
		raw: fmt.Sprintf("%s against %s a pick, fills of the window included", took[1].Round(100*time.Nanosecond), took[0].Round(100*time.Nanosecond)),
	}}, nil
}

// fill makes a pool of n idle keys. One key a shard goes through PutKeys; their
// lease items are the templates of the others, which are written in bulk: a
// million transactions would take longer than all other measures together.
func fill(ctx context.Context, c *dynamodb.Client, s *dynamo.Store, name string, n int) error {
	keys := make([]store.Key, store.IdleShards)
	for i := range keys {
		keys[i] = store.Key{ID: randomKey(i), Keyring: "bench#1", Pool: name, Sealed: []byte{0}}
	}
	if err := s.PutKeys(ctx, keys); err != nil {
		return fmt.Errorf("fill a pool: %w", err)
	}
	templates, err := leaseTemplates(ctx, c, keys)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	const part = 25 // items, the limit of BatchWriteItem
	for at := store.IdleShards; at < n; at += part {
		var puts []types.WriteRequest
		for i := at; i < min(at+part, n); i++ {
			item := maps.Clone(templates[i%store.IdleShards].item)
			id := randomKey(i)
			item[templates[i%store.IdleShards].keyName] = &types.AttributeValueMemberB{Value: id[:]}
			puts = append(puts, types.WriteRequest{PutRequest: &types.PutRequest{Item: item}})
		}
		g.Go(func() error {
			out, err := c.BatchWriteItem(ctx, &dynamodb.BatchWriteItemInput{RequestItems: map[string][]types.WriteRequest{leasesTable: puts}})
			if err != nil || len(out.UnprocessedItems) > 0 {
				return fmt.Errorf("fill a pool: %d items left: %w", len(out.UnprocessedItems), err)
			}
			return nil
		})
	}
	return g.Wait()
}

// randomKey returns an id that lives in that shard.
func randomKey(i int) (id record.KeyID) {
	rand.Read(id[:])
	id[0] = byte(i % store.IdleShards) //nolint:gosec // below 16
	return id
}

const leasesTable = "leases"

// template is a lease item and the attribute that holds its key id.
type template struct {
	item    map[string]types.AttributeValue
	keyName string
}

func leaseTemplates(ctx context.Context, c *dynamodb.Client, keys []store.Key) ([]template, error) {
	out, err := c.Scan(ctx, &dynamodb.ScanInput{TableName: aws.String(leasesTable)})
	if err != nil {
		return nil, fmt.Errorf("read lease items: %w", err)
	}
	found := make([]template, len(keys))
	for _, item := range out.Items {
		for name, v := range item {
			if b, ok := v.(*types.AttributeValueMemberB); ok && len(b.Value) == len(record.KeyID{}) {
				for i, k := range keys {
					if k.ID == record.KeyID(b.Value) {
						found[i] = template{item, name}
					}
				}
			}
		}
	}
	for i := range found {
		if found[i].item == nil {
			return nil, fmt.Errorf("the lease item of key %s is not in the first page", keys[i].ID)
		}
	}
	return found, nil
}

// pickMany takes keys as the claimer does, and fills the window as often as a
// small pool needs it.
func pickMany(ctx context.Context, s *dynamo.Store, name string) (time.Duration, error) {
	began := time.Now()
	elapsed := func() time.Duration { return time.Since(began) }
	for range picks / perFill {
		w := lease.NewWindow(s, name, elapsed, time.Minute)
		for range perFill {
			if _, ok, err := w.Next(ctx); err != nil || !ok {
				return 0, errors.Join(errors.New("the pool has no idle key"), err)
			}
		}
	}
	return time.Since(began) / picks, nil
}
