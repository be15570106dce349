// Command ingest is the Lambda function that imports the files that are put into
// a Keyhold bucket. It refuses a file that is not wholly valid, and one whose
// place does not say which pool shall sign it, and as what.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/aws/aws-lambda-go/events"
	"github.com/aws/aws-lambda-go/lambda"
	awsconfig "github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/keyhold/keyhold/parent/store/dynamo"
)

func main() {
	log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	i, err := connect(context.Background(), os.Getenv, log)
	if err != nil {
		log.Error("ingest does not start", slog.Any("error", err))
		os.Exit(1)
	}
	lambda.Start(function{i})
}

func connect(ctx context.Context, env func(string) string, log *slog.Logger) (*Ingest, error) {
	cfg, err := awsconfig.LoadDefaultConfig(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the AWS configuration: %w", err)
	}
	return &Ingest{
		Bucket:  env("KEYHOLD_BUCKET"),
		Store:   dynamo.New(dynamodb.NewFromConfig(cfg), dynamo.Options{Prefix: env("KEYHOLD_TABLE_PREFIX")}),
		Objects: bucket{s3.NewFromConfig(cfg)}, Now: time.Now, Logger: log,
	}, nil
}

// function decodes events itself, so that calls can be followed from main.
type function struct{ i *Ingest }

// Invoke implements lambda.Handler. The event source hands messages out one by
// one, so that a bad one takes no others along.
func (f function) Invoke(ctx context.Context, payload []byte) ([]byte, error) {
	var e events.SQSEvent
	if err := json.Unmarshal(payload, &e); err != nil || len(e.Records) == 0 {
		return nil, errMessage
	}
	for _, m := range e.Records {
		if err := f.i.Message(ctx, m.Body); err != nil {
			f.i.Logger.ErrorContext(ctx, "message not imported", slog.String("message_id", m.MessageId), slog.Any("error", err))
			return nil, err
		}
	}
	return []byte("{}"), nil
}

// bucket is Objects.
type bucket struct{ client *s3.Client }

func (b bucket) Open(ctx context.Context, name, key, version string) (io.ReadCloser, error) {
	in := &s3.GetObjectInput{Bucket: &name, Key: &key}
	if version != "" {
		in.VersionId = &version
	}
	out, err := b.client.GetObject(ctx, in)
	if err != nil {
		return nil, err
	}
	return out.Body, nil
}
