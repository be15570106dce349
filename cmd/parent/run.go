package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"syscall"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsconfig "github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/internal/awshttp"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent"
	"github.com/keyhold/keyhold/parent/egress"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/dynamo"
	"github.com/keyhold/keyhold/parent/watch/sdnotify"
)

// run wires the parent to AWS and vsock.
func run(ctx context.Context, o *options, log *slog.Logger) error {
	raw, err := os.ReadFile(o.config)
	if err != nil {
		return fmt.Errorf("--config: %w: %w", err, refusal.UsageWrong)
	}
	parsed, err := config.Parse(raw)
	if err != nil {
		return fmt.Errorf("--config %s: %w: %w", o.config, refusal.ConfigInvalid, err)
	}
	images, err := o.images()
	if err != nil {
		return err
	}
	cfg := parent.Config{
		EnclaveConfig: raw, Root: attestation.AWSRoot(), Images: images,
		Credentials: egress.InstanceRole("", nil), Workers: o.workers, Lease: o.lease, Logger: log,
	}
	for _, cid := range o.cids {
		cfg.Enclaves = append(cfg.Enclaves, parent.Enclave{Name: fmt.Sprintf("cid-%d", cid), Dial: dialEnclave(uint32(cid))}) //nolint:gosec // G115: validate bounds it
	}
	if cfg.Store, err = openStore(ctx, o, parsed, log); err != nil {
		return err
	}
	closeAll, err := o.listenAll(ctx, &cfg, log)
	defer closeAll()
	if err != nil {
		return err
	}
	log.InfoContext(ctx, "parent starts", slog.Int("enclaves", len(o.cids)), slog.String("listen", o.listen))
	service, err := sdnotify.FromEnv(os.LookupEnv, os.Getpid())
	if err != nil {
		return fmt.Errorf("%w: %w", err, refusal.UsageWrong)
	}
	told := reporter{service: service, listen: o.listen, log: log}
	stop := told.start(ctx)
	defer stop()
	return parent.Run(ctx, cfg)
}

// openStore connects to DynamoDB. Tables that are not there end the program; a
// DynamoDB that does not answer now may do so later.
func openStore(ctx context.Context, o *options, parsed *config.Config, log *slog.Logger) (store.Store, error) {
	s, err := o.connect(ctx, parsed)
	if err != nil {
		return nil, err
	}
	switch err := s.CheckTables(ctx); {
	case errors.Is(err, store.ErrNoTables):
		return nil, fmt.Errorf("%w: %w", refusal.TablesMissing, err)
	case err != nil && ctx.Err() == nil:
		log.WarnContext(ctx, "tables not checked", slog.Any("error", err))
	}
	return s, nil
}

// connect makes the client of DynamoDB. It sends nothing.
func (o *options) connect(ctx context.Context, parsed *config.Config) (*dynamo.Store, error) {
	var load []func(*awsconfig.LoadOptions) error
	if o.region != "" {
		load = append(load, awsconfig.WithRegion(o.region))
	}
	cfg, err := awsconfig.LoadDefaultConfig(ctx, load...)
	if err != nil {
		return nil, fmt.Errorf("read the AWS configuration: %w", err)
	}
	// Where the environment names further roots, only the SDK's own client trusts them.
	if os.Getenv("AWS_CA_BUNDLE") == "" {
		cfg.HTTPClient = awshttp.New(awshttp.Options{MaxIdleConnsPerHost: max(1, 4*o.workers*len(o.cids))})
	}
	if cfg.Region == "" {
		cfg.Region = regionOf(parsed.KMSKeyARN)
	}
	client := dynamodb.NewFromConfig(cfg, func(d *dynamodb.Options) {
		if endpoint := os.Getenv(envEndpoint); endpoint != "" {
			d.BaseEndpoint = aws.String(endpoint)
		}
	})
	return dynamo.New(client, dynamo.Options{Prefix: o.tablePrefix}), nil
}

// regionOf a valid key ARN; "" where there is none.
func regionOf(arn string) string {
	if parts := strings.Split(arn, ":"); len(parts) > 3 {
		return parts[3]
	}
	return ""
}

// listenAll opens the listeners of cfg. What it returns closes them all, which
// parent.Run has done before where it got so far.
func (o *options) listenAll(ctx context.Context, cfg *parent.Config, log *slog.Logger) (closeAll func(), err error) {
	var open []net.Listener
	closeAll = func() {
		for _, ln := range open {
			if err := ln.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
				log.DebugContext(ctx, "listener did not close", slog.Any("error", err))
			}
		}
	}
	if o.listen != "" {
		var lc net.ListenConfig
		if cfg.HTTP, err = lc.Listen(ctx, "tcp", o.listen); err != nil {
			return closeAll, fmt.Errorf("--listen: %w", portError(err))
		}
		open = append(open, cfg.HTTP)
	}
	for port, list := range map[uint32]*[]net.Listener{wire.KMSPort: &cfg.KMSListeners, wire.CredsPort: &cfg.CredentialListeners} {
		ln, err := listenEnclaves(port, o.cids, log)
		if err != nil {
			return closeAll, err
		}
		open, *list = append(open, ln), []net.Listener{ln}
	}
	return closeAll, nil
}

// portError gives a port that is taken its code.
func portError(err error) error {
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("%w: %w", refusal.PortInUse, err)
	}
	return err
}
