package main

import (
	"bufio"
	"compress/gzip"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"

	"github.com/keyhold/keyhold/internal/awslocal/dynoxide"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/lease"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/dynamo"
)

const (
	smallPool   = 100
	picks       = 2000
	perFill     = 50 // picks from one fill of the window
	leasesTable = "leases"
)

// keyPick compares taking the next key out of a large and a small pool.
func keyPick(ctx context.Context, o options) (rows []row, err error) {
	dir, err := os.MkdirTemp("", "keyhold-bench-")
	if err != nil {
		return nil, fmt.Errorf("make a folder: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	var p pattern
	if err := withStore(ctx, "", nil, func(c *dynamodb.Client, s *dynamo.Store) error {
		p, err = leasePattern(ctx, c, s)
		return err
	}); err != nil {
		return nil, err
	}
	var took [2]time.Duration
	for i, n := range []int{smallPool, o.pool} {
		o.say("filling a pool of %d keys", n)
		file := filepath.Join(dir, fmt.Sprint(n))
		if err := p.fill(ctx, file, n); err != nil {
			return nil, err
		}
		err = withStore(ctx, file+".db", nil, func(_ *dynamodb.Client, s *dynamo.Store) (err error) {
			took[i], err = pickMany(ctx, s)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return []row{{
		name: fmt.Sprintf("picking a key, %d in the pool against %d", o.pool, smallPool), value: float64(took[1]) / float64(took[0]), unit: "x", atMost: 3,
		raw: fmt.Sprintf("%s against %s a pick, fills of the window included", took[1].Round(100*time.Nanosecond), took[0].Round(100*time.Nanosecond)),
	}}, nil
}

// pattern is how an idle lease item looks, one for each shard, and its table. It
// is read from the store's own writes, so that this program knows no attributes.
type pattern struct {
	table   *types.TableDescription
	shards  [store.IdleShards]map[string]types.AttributeValue
	keyName string // attribute of the key id
}

func leasePattern(ctx context.Context, c *dynamodb.Client, s *dynamo.Store) (p pattern, err error) {
	keys := make([]store.Key, store.IdleShards)
	for i := range keys {
		keys[i] = store.Key{ID: randomKey(i), Keyring: "bench#1", Pool: pool, Sealed: []byte{0}}
	}
	if err := s.PutKeys(ctx, keys); err != nil {
		return p, fmt.Errorf("write lease items: %w", err)
	}
	table, err := c.DescribeTable(ctx, &dynamodb.DescribeTableInput{TableName: aws.String(leasesTable)})
	if err != nil {
		return p, fmt.Errorf("describe the leases: %w", err)
	}
	p.table, p.keyName = table.Table, aws.ToString(table.Table.KeySchema[0].AttributeName)
	out, err := c.Scan(ctx, &dynamodb.ScanInput{TableName: aws.String(leasesTable)})
	if err != nil {
		return p, fmt.Errorf("read lease items: %w", err)
	}
	for _, item := range out.Items {
		if id, ok := item[p.keyName].(*types.AttributeValueMemberB); ok {
			p.shards[store.IdleShard(record.KeyID(id.Value))] = item
		}
	}
	for i := range p.shards {
		if p.shards[i] == nil {
			return p, fmt.Errorf("no lease item of shard %d was read", i)
		}
	}
	return p, nil
}

// fill makes the database file name.db with a pool of n idle keys. It goes
// through an export file, since a million writes over HTTP would take longer
// than all other measures together.
func (p pattern) fill(ctx context.Context, name string, n int) error {
	data := filepath.Join(name, leasesTable, "data")
	if err := os.MkdirAll(data, 0o700); err != nil {
		return fmt.Errorf("make a folder: %w", err)
	}
	if err := writeFile(filepath.Join(data, "items.json.gz"), func(w io.Writer) error {
		z := gzip.NewWriter(w)
		enc := json.NewEncoder(z)
		for i := range n {
			if err := enc.Encode(map[string]any{"Item": p.item(i)}); err != nil {
				return err
			}
		}
		return z.Close()
	}); err != nil {
		return err
	}
	schema := name + ".schema.json"
	if err := writeFile(schema, func(w io.Writer) error { return json.NewEncoder(w).Encode([]any{p.schema()}) }); err != nil {
		return err
	}
	binary, err := dynoxide.Find()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, binary, "import", "--source", name, "--schema", schema, "--output", name+".db") //nolint:gosec // of tools/
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("import lease items: %w: %s", err, out)
	}
	return nil
}

// item i in the form of an export.
func (p pattern) item(i int) map[string]any {
	item := maps.Clone(p.shards[i%store.IdleShards])
	id := randomKey(i)
	item[p.keyName] = &types.AttributeValueMemberB{Value: id[:]}
	out := map[string]any{}
	for name, v := range item {
		switch v := v.(type) {
		case *types.AttributeValueMemberB:
			out[name] = map[string]any{"B": v.Value}
		case *types.AttributeValueMemberN:
			out[name] = map[string]any{"N": v.Value}
		case *types.AttributeValueMemberS:
			out[name] = map[string]any{"S": v.Value}
		}
	}
	return out
}

// schema of the table as DescribeTable answers it, as far as it matters.
func (p pattern) schema() any {
	var indexes []any
	for _, x := range p.table.GlobalSecondaryIndexes {
		indexes = append(indexes, map[string]any{"IndexName": x.IndexName, "KeySchema": x.KeySchema, "Projection": x.Projection})
	}
	return map[string]any{"Table": map[string]any{
		"TableName": leasesTable, "KeySchema": p.table.KeySchema, "AttributeDefinitions": p.table.AttributeDefinitions,
		"BillingModeSummary": map[string]any{"BillingMode": "PAY_PER_REQUEST"}, "GlobalSecondaryIndexes": indexes,
	}}
}

func writeFile(name string, f func(io.Writer) error) (err error) {
	file, err := os.Create(name)
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	w := bufio.NewWriter(file)
	if err := errors.Join(f(w), w.Flush(), file.Close()); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// randomKey returns an id that lives in that shard.
func randomKey(i int) (id record.KeyID) {
	rand.Read(id[:])
	id[0] = byte(i % store.IdleShards) //nolint:gosec // below 16
	return id
}

// pickMany takes keys as the claimer does, and fills the window as often as a
// small pool needs it.
func pickMany(ctx context.Context, s *dynamo.Store) (time.Duration, error) {
	began := time.Now()
	elapsed := func() time.Duration { return time.Since(began) }
	for range picks / perFill {
		w := lease.NewWindow(s, pool, elapsed, time.Minute)
		for range perFill {
			if _, ok, err := w.Next(ctx); err != nil || !ok {
				return 0, errors.Join(errors.New("the pool has no idle key"), err)
			}
		}
	}
	return time.Since(began) / picks, nil
}
