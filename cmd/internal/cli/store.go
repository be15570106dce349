package cli

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsconfig "github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	smithyhttp "github.com/aws/smithy-go/transport/http"
	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/internal/awshttp"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/dynamo"
)

// The environment that stands for flags that were not given.
const (
	EnvTablePrefix  = "KEYHOLD_TABLE_PREFIX"
	EnvEndpoint     = "KEYHOLD_DYNAMODB_ENDPOINT" // a DynamoDB other than that of the region
	EnvEnclave      = "KEYHOLD_ENCLAVE"
	EnvConfig       = "KEYHOLD_CONFIG"
	EnvPCR0         = "KEYHOLD_PCR0" // several with commas between them
	EnvMeasurements = "KEYHOLD_MEASUREMENTS"
	EnvTestRoot     = "KEYHOLD_TEST_ROOT"
)

// DefaultTablePrefix of all table names.
const DefaultTablePrefix = "keyhold-"

// localRegion signs requests to an endpoint of one's own, where none is named.
const localRegion = "us-east-1"

// StoreOptions say which tables to use.
type StoreOptions struct {
	Prefix   string
	Region   string               // empty: that of the environment or of the AWS profile
	Endpoint string               // URL; empty: that of the region
	Unmade   bool                 // the tables need not be there yet
	Observe  func(u dynamo.Usage) // told the capacity of each call; may be nil
}

// AddFlags lets c's command line fill o; the environment gives the defaults.
func (o *StoreOptions) AddFlags(c *cobra.Command) {
	prefix, ok := os.LookupEnv(EnvTablePrefix)
	if !ok {
		prefix = DefaultTablePrefix
	}
	o.Endpoint = os.Getenv(EnvEndpoint)
	c.Flags().StringVar(&o.Prefix, "table-prefix", prefix, "start of all table `names` (env "+EnvTablePrefix+")")
	c.Flags().StringVar(&o.Region, "region", "", "AWS `region` of the tables (env AWS_REGION, or the AWS profile)")
}

// OpenStore returns a store over tables that are there. Its errors carry
// store_unreachable and tables_missing.
func OpenStore(ctx context.Context, o StoreOptions) (*dynamo.Store, error) {
	client, where, err := newClient(ctx, o)
	if err != nil {
		return nil, err
	}
	s := dynamo.New(client, dynamo.Options{Prefix: o.Prefix, Observe: o.Observe})
	if o.Unmade {
		return s, nil
	}
	err = s.CheckTables(ctx)
	switch {
	case err == nil:
		return s, nil
	case errors.Is(err, store.ErrNoTables):
		return nil, fmt.Errorf("no tables %s* in %s: %w", o.Prefix, where, refusal.TablesMissing)
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	}
	if send, unsent := errors.AsType[*smithyhttp.RequestSendError](err); unsent {
		err = send.Err // the SDK's own text around it says nothing
	}
	return nil, fmt.Errorf("DynamoDB in %s: %w (%w); check --region and %s", where, err, refusal.StoreUnreachable, EnvEndpoint)
}

// newClient also says, for error texts, where it leads.
func newClient(ctx context.Context, o StoreOptions) (c *dynamodb.Client, where string, err error) {
	var load []func(*awsconfig.LoadOptions) error
	local := false
	if o.Region != "" {
		load = append(load, awsconfig.WithRegion(o.Region))
	}
	if o.Endpoint != "" {
		u, err := url.Parse(o.Endpoint)
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return nil, "", Usagef("%s must be a URL like http://127.0.0.1:8000", EnvEndpoint)
		}
		if local = onLoopback(u.Hostname()); local { // a local database asks for a signature and checks none
			load = append(load, awsconfig.WithCredentialsProvider(credentials.NewStaticCredentialsProvider("local", "local", "")))
		}
	}
	cfg, err := awsconfig.LoadDefaultConfig(ctx, load...)
	if err != nil {
		return nil, "", fmt.Errorf("load the AWS configuration: %w", err)
	}
	// The SDK refuses to start with a client that is not its own where the
	// environment names further roots, and only its own would trust them.
	if local || os.Getenv("AWS_CA_BUNDLE") == "" {
		cfg.HTTPClient = awshttp.New(awshttp.Options{})
	}
	where = "region " + cfg.Region
	if o.Endpoint != "" {
		where = o.Endpoint
		if cfg.Region == "" {
			cfg.Region = localRegion
		}
	}
	if cfg.Region == "" {
		return nil, "", Usagef("no AWS region: give --region or set AWS_REGION")
	}
	return dynamodb.NewFromConfig(cfg, func(d *dynamodb.Options) {
		if o.Endpoint != "" {
			d.BaseEndpoint = aws.String(o.Endpoint)
		}
	}), where, nil
}

func onLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback()
}
