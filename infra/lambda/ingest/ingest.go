package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"strings"
	"time"

	"github.com/keyhold/keyhold/internal/payload"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/parent/intake"
	"github.com/keyhold/keyhold/parent/store"
)

// incoming is where files must be: incoming/POOL/KIND/NAME.jsonl.
const incoming = "incoming"

// notice is what S3 puts into a message of the queue. It sends one without
// records when the notification is set up.
type notice struct {
	Event   string
	Records []struct {
		S3 struct {
			Bucket struct{ Name string }
			Object struct {
				Key       string
				VersionID string `json:"versionId"`
			}
		}
	}
}

// Objects reads what was put into the bucket.
type Objects interface {
	// Open returns exactly that version.
	Open(ctx context.Context, bucket, key, version string) (io.ReadCloser, error)
}

// Ingest imports files that were put into a bucket. The same file again does
// nothing, and one that was interrupted goes on where it stopped, since an import is
// named after the hash of its input.
type Ingest struct {
	Bucket  string
	Store   store.Store
	Objects Objects
	Now     func() time.Time
	Logger  *slog.Logger
}

var (
	errMessage = errors.New("the message is no notification of S3")
	errPlace   = errors.New("want incoming/POOL/KIND/NAME.jsonl")
	errNoKey   = errors.New("no key in the pool: there is none yet, or all are in use and the message comes again")
)

// Message imports every file that a message tells of.
func (i *Ingest) Message(ctx context.Context, body string) error {
	var n notice
	if err := json.Unmarshal([]byte(body), &n); err != nil {
		return errMessage
	}
	if n.Event == "s3:TestEvent" {
		return nil
	}
	if len(n.Records) == 0 {
		return errMessage
	}
	var errs []error
	for _, r := range n.Records {
		errs = append(errs, i.file(ctx, r.S3.Bucket.Name, r.S3.Object.Key, r.S3.Object.VersionID))
	}
	return errors.Join(errs...)
}

func (i *Ingest) file(ctx context.Context, bucket, escaped, version string) error {
	if bucket != i.Bucket {
		return errors.New("the file is in another bucket")
	}
	key, err := url.QueryUnescape(escaped) // S3 writes keys like form values
	if err != nil {
		return errPlace
	}
	o, err := place(key)
	if err != nil {
		return err
	}
	o.Now = i.Now
	if o.SigLen, err = i.sigLen(ctx, o.Pool, o.Kind); err != nil {
		return err
	}
	body, err := i.Objects.Open(ctx, bucket, key, version)
	if err != nil {
		return fmt.Errorf("read the file: %w", err)
	}
	sum, err := intake.Run(ctx, i.Store, body, o)
	if err = errors.Join(err, body.Close()); err != nil {
		return err
	}
	i.Logger.InfoContext(ctx, "file imported", slog.String("import_id", string(sum.Import.ID)), slog.Int("records", sum.Import.Records),
		slog.Int("batches", sum.Import.Batches), slog.Bool("already", sum.Already))
	return nil
}

// place says what the path of a file asks for.
func place(key string) (intake.Options, error) {
	part := strings.Split(key, "/")
	if len(part) != 4 || part[0] != incoming || !strings.HasSuffix(part[3], ".jsonl") {
		return intake.Options{}, errPlace
	}
	kind, err := record.ParseKind(part[2])
	if err != nil {
		return intake.Options{}, errPlace
	}
	if err := record.CheckPool(part[1]); err != nil {
		return intake.Options{}, errPlace
	}
	return intake.Options{Pool: part[1], Kind: kind}, nil
}

// sigLen learns from a key of the pool how long its signatures are.
func (i *Ingest) sigLen(ctx context.Context, pool string, kind record.Kind) (int, error) {
	id, err := i.anyKey(ctx, pool)
	if err != nil {
		return 0, err
	}
	k, err := i.Store.Key(ctx, id)
	if err != nil {
		return 0, fmt.Errorf("read a key of the pool: %w", err)
	}
	e, err := sealed.DecodeEntry(k.Sealed)
	if err != nil {
		return 0, fmt.Errorf("read a key of the pool: %w", err)
	}
	if _, err := payload.NewHasher(e.Public.Algorithm, kind); err != nil {
		return 0, fmt.Errorf("the keys of the pool sign no such records: %w", err)
	}
	return e.Public.Algorithm.SignatureLen(), nil
}

// anyKey finds a key of the pool: an idle one, or else one that is in use.
func (i *Ingest) anyKey(ctx context.Context, pool string) (record.KeyID, error) {
	for shard := range store.IdleShards {
		idle, err := i.Store.Idle(ctx, pool, shard, 1)
		if err != nil {
			return record.KeyID{}, fmt.Errorf("look for a key of the pool: %w", err)
		}
		if len(idle) > 0 {
			return idle[0].KeyID, nil
		}
	}
	for shard := range store.ReadyShards {
		id, err := i.busyKey(ctx, pool, shard)
		if err != nil || !id.IsZero() {
			return id, err
		}
	}
	return record.KeyID{}, errNoKey
}

const (
	farAhead = time.Hour // claimed batches are visible again within a lease
	pageLen  = 100
)

// busyKey is the key of a claimed batch of the pool in the first page of a shard.
func (i *Ingest) busyKey(ctx context.Context, pool string, shard int) (id record.KeyID, err error) {
	page, err := i.Store.Ready(ctx, shard, i.Now().Add(farAhead), pageLen, "")
	if err != nil {
		return id, fmt.Errorf("look for a key of the pool: %w", err)
	}
	for _, batch := range page.Batches {
		b, err := i.Store.Batch(ctx, batch)
		switch {
		case errors.Is(err, store.ErrNotFound): // the index is behind
		case err != nil:
			return id, fmt.Errorf("look for a key of the pool: %w", err)
		case b.Pool == pool && !b.KeyID.IsZero():
			return b.KeyID, nil
		}
	}
	return id, nil
}
