package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	mrand "math/rand/v2"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"

	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/awshttp"
	"github.com/keyhold/keyhold/internal/awslocal/dynoxide"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/parent/intake"
	"github.com/keyhold/keyhold/parent/pipeline"
	"github.com/keyhold/keyhold/parent/signclient"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/dynamo"
)

const pool = "main"

// withStore runs f on the tables of a database file, which is made where it is
// missing; without a name on fresh tables in memory.
func withStore(ctx context.Context, file string, observe func(dynamo.Usage), f func(*dynamodb.Client, *dynamo.Store) error) (err error) {
	db, err := dynoxide.Start(ctx, dynoxide.Options{DBPath: file})
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
	err = withStore(ctx, "", meter.Observe, func(_ *dynamodb.Client, s *dynamo.Store) error { return signSome(ctx, s) })
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
