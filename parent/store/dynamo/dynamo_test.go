package dynamo_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"

	"github.com/keyhold/keyhold/internal/awshttp"
	"github.com/keyhold/keyhold/internal/awslocal/dynoxide/dynoxidetest"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/dynamo"
	"github.com/keyhold/keyhold/parent/store/storetest"
)

var tables atomic.Int64

// prefix names tables of their own for one test.
func prefix() string { return fmt.Sprintf("t%d-", tables.Add(1)) }

// newClient returns a client of the service that tests use, with faults between
// the two where wrap is not nil.
func newClient(t *testing.T, wrap func(http.RoundTripper) http.RoundTripper) *dynamodb.Client {
	t.Helper()
	endpoint := dynoxidetest.Endpoint(t)
	httpClient := awshttp.New(awshttp.Options{Wrap: wrap})
	if strings.HasSuffix(endpoint, ".amazonaws.com") {
		cfg, err := config.LoadDefaultConfig(t.Context(), config.WithHTTPClient(httpClient))
		if err != nil {
			t.Fatal(err)
		}
		return dynamodb.NewFromConfig(cfg, func(o *dynamodb.Options) { o.BaseEndpoint = aws.String(endpoint) })
	}
	return dynamodb.New(dynamodb.Options{
		Region:       "us-east-1",
		BaseEndpoint: aws.String(endpoint),
		Credentials:  credentials.NewStaticCredentialsProvider("local", "local", ""),
		HTTPClient:   httpClient,
	})
}

// newStore returns a store with tables of its own, which go with the test.
func newStore(t *testing.T, o dynamo.Options) *dynamo.Store {
	t.Helper()
	if o.Prefix == "" {
		o.Prefix = prefix()
	}
	client := newClient(t, nil)
	s := dynamo.New(client, o)
	if err := s.CreateTables(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dropTables(t, client, o.Prefix) })
	return s
}

func dropTables(t *testing.T, client *dynamodb.Client, prefix string) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	for _, name := range dynamo.TestingOnlyTables() {
		if _, err := client.DeleteTable(ctx, &dynamodb.DeleteTableInput{TableName: aws.String(prefix + name)}); err != nil {
			t.Errorf("drop table: %v", err)
		}
	}
}

func TestDynamoDBKeepsTheContracts(t *testing.T) {
	dynoxidetest.Endpoint(t) // one server for all of them
	storetest.Run(t, func(t *testing.T) store.Store {
		t.Helper()
		return newStore(t, dynamo.Options{})
	})
}

func TestTablesAreCreatedOnceAndFoundAgain(t *testing.T) {
	s := newStore(t, dynamo.Options{})
	if err := s.CreateTables(t.Context()); err != nil {
		t.Errorf("create again: %v", err)
	}
	if err := s.CheckTables(t.Context()); err != nil {
		t.Errorf("check: %v", err)
	}
}

func TestMissingTablesHaveASentinel(t *testing.T) {
	ctx := t.Context()
	s := dynamo.New(newClient(t, nil), dynamo.Options{Prefix: prefix()})
	_, read := s.Imports(ctx)
	_, query := s.CountReady(ctx, 0)
	for name, err := range map[string]error{
		"check":       s.CheckTables(ctx),
		"scan":        read,
		"query":       query,
		"put":         s.PutKeyring(ctx, "ring", []byte("header")),
		"transaction": s.PutBatch(ctx, newBatch(0)),
	} {
		if !errors.Is(err, store.ErrNoTables) {
			t.Errorf("%s: error %v, want %v", name, err, store.ErrNoTables)
		}
	}
}

func TestATableOfAnotherLayoutIsRefused(t *testing.T) {
	client, name := newClient(t, nil), prefix()
	s := dynamo.New(client, dynamo.Options{Prefix: name})
	wrong := dynamo.TestingOnlyCreateInput(s, "imports")
	wrong.TableName = aws.String(name + "segments") // one key instead of two
	if _, err := client.CreateTable(t.Context(), wrong); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dropTables(t, client, name) })
	err := s.CreateTables(t.Context())
	if err == nil || errors.Is(err, store.ErrNoTables) || !strings.Contains(err.Error(), "another layout") {
		t.Errorf("error %v, want the layout", err)
	}
}
