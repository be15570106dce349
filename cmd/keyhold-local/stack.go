package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"golang.org/x/sync/errgroup"

	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/internal/awshttp"
	"github.com/keyhold/keyhold/internal/awslocal/dynoxide"
	"github.com/keyhold/keyhold/internal/awslocal/kms"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/signclient"
	"github.com/keyhold/keyhold/parent/store/dynamo"
)

// What local mode calls itself in AWS's terms.
const (
	region      = "us-east-1"
	account     = "000000000000"
	parentRole  = "arn:aws:iam::" + account + ":role/keyhold-local-parent"
	tablePrefix = "keyhold-"
	keyringName = "local"
	policyName  = "default"
	poolName    = "main"
	maxKeys     = 2_000_000 // per algorithm and policy
)

// size of a stack.
type size struct {
	parents, enclaves, workers int
}

// stack is everything that runs on this machine for one folder.
type stack struct {
	size
	log      *slog.Logger
	store    *dynamo.Store
	config   *config.Config
	raw      []byte // of config
	endpoint string
	kmsAddr  string

	group   *errgroup.Group // the supervisor's own goroutines and the children that last
	ctx     context.Context //nolint:containedctx // ends the group; children that start later need it
	running func() error    // stops the parents; nil where they are not running
}

// startStack starts database, KMS and enclaves and returns when the tables are
// there. Parents are started and stopped apart. The stack is to be waited for
// also where it did not come up.
func startStack(ctx context.Context, database string, n size, log *slog.Logger) (*stack, error) {
	s := &stack{size: n, log: log}
	s.group, s.ctx = errgroup.WithContext(ctx)
	if err := checkSpace(log); err != nil {
		return s, err
	}
	if err := s.startDatabase(database); err != nil { //nolint:contextcheck // the database ends with the stack
		return s, err
	}
	if err := s.store.CreateTables(ctx); err != nil {
		return s, fmt.Errorf("create the tables: %w", err)
	}
	if err := s.startKMS(); err != nil {
		return s, err
	}
	for i := range n.enclaves {
		c := &child{name: fmt.Sprintf("enclave-%d", i), args: s.args("enclave", i), log: log}
		s.group.Go(func() error { return c.keep(s.ctx) })
	}
	return s, nil
}

func (s *stack) args(kind string, index int) []string {
	return []string{
		"process", kind, "--index", strconv.Itoa(index), "--parents", strconv.Itoa(s.parents),
		"--enclaves", strconv.Itoa(s.enclaves), "--workers", strconv.Itoa(s.workers),
		"--endpoint", s.endpoint, "--kms", s.kmsAddr,
	}
}

// startDatabase starts dynoxide and keeps it running on the same port.
func (s *stack) startDatabase(binary string) error {
	out, err := os.OpenFile(filepath.Join(logs, "dynamodb.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("start the local DynamoDB: %w", full(err))
	}
	o := dynoxide.Options{Binary: binary, DBPath: databaseFile, Logger: s.log, Output: out}
	db, err := dynoxide.Start(s.ctx, o)
	if err != nil {
		return errors.Join(fmt.Errorf("start the local DynamoDB: %w", known(err)), out.Close())
	}
	s.endpoint = db.Endpoint()
	s.store = openStore(s.endpoint, nil)
	_, port, err := net.SplitHostPort(hostOf(s.endpoint))
	if err == nil {
		o.Port, err = strconv.Atoi(port)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("start the local DynamoDB: %w", err), db.Kill(), out.Close())
	}
	s.group.Go(func() (err error) {
		defer func() { err = errors.Join(err, out.Close()) }()
		return s.keepDatabase(db, o)
	})
	return nil
}

func (s *stack) keepDatabase(db *dynoxide.Server, o dynoxide.Options) error {
	for {
		if err := writePID("dynamodb", db.PID()); err != nil {
			s.log.WarnContext(s.ctx, "process id not written", slog.Any("error", err))
		}
		select {
		case <-s.ctx.Done():
			return db.Stop(context.WithoutCancel(s.ctx))
		case <-db.Done():
		}
		s.log.WarnContext(s.ctx, "process ended and is started again", slog.String("process", "dynamodb"))
		if err := db.Kill(); err != nil {
			return fmt.Errorf("clean up after the local DynamoDB: %w", err)
		}
		var err error
		for wait := restartFirst; ; wait = min(2*wait, restartLongest) {
			if db, err = dynoxide.Start(s.ctx, o); err == nil {
				break
			}
			if spaceErr := checkSpace(s.log); spaceErr != nil {
				return spaceErr
			}
			s.log.WarnContext(s.ctx, "local DynamoDB does not start", slog.Any("error", err))
			select {
			case <-time.After(wait):
			case <-s.ctx.Done():
				return nil
			}
		}
	}
}

// known gives the launcher's errors their codes.
func known(err error) error {
	switch {
	case errors.Is(err, dynoxide.ErrNotFound):
		return fmt.Errorf("%w: %w", err, refusal.ServiceMissing)
	case errors.Is(err, dynoxide.ErrInUse):
		return fmt.Errorf("%w: %w", err, refusal.DirBusy)
	case errors.Is(err, dynoxide.ErrPortInUse):
		return fmt.Errorf("%w: %w", err, refusal.PortInUse)
	}
	return full(err)
}

// openStore returns the tables behind a local endpoint.
func openStore(endpoint string, observe func(dynamo.Usage)) *dynamo.Store {
	client := dynamodb.New(dynamodb.Options{
		Region: region, BaseEndpoint: &endpoint, HTTPClient: awshttp.New(awshttp.Options{}),
		Credentials: credentials.NewStaticCredentialsProvider(accessKeyID, secretAccessKey, ""),
	})
	return dynamo.New(client, dynamo.Options{Prefix: tablePrefix, Observe: observe})
}

// startKMS serves the emulated KMS and makes sure that there are a key, a config
// that names it, and a key policy that admits this image with this config.
func (s *stack) startKMS() error {
	ca, err := nsmCA()
	if err != nil {
		return err
	}
	server, err := kms.New(kms.Options{
		Dir: kmsFolder, Account: account, Region: region, Root: ca.Root(), Logger: s.log,
		Credentials: func(id string) (kms.Credential, bool) {
			return kms.Credential{SecretAccessKey: secretAccessKey, PrincipalARN: parentRole}, id == accessKeyID
		},
	})
	if err != nil {
		return fmt.Errorf("start the local KMS: %w", full(err))
	}
	if err := s.settleKey(server); err != nil {
		return err
	}
	if err := writeFile(kmsRootFile, server.CACertificate()); err != nil {
		return err
	}
	l, err := (&net.ListenConfig{}).Listen(s.ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("start the local KMS: %w", err)
	}
	s.kmsAddr = l.Addr().String()
	s.group.Go(func() error { return server.Serve(s.ctx, l) })
	return nil
}

func (s *stack) settleKey(server *kms.Server) (err error) {
	s.raw, err = os.ReadFile(configFile)
	if errors.Is(err, fs.ErrNotExist) {
		var arn string
		if arn, err = server.CreateKey(nil); err != nil {
			return fmt.Errorf("create the local KMS key: %w", full(err))
		}
		if s.raw, err = config.Encode(localConfig(arn)); err != nil {
			return fmt.Errorf("write the enclave config: %w", err)
		}
		if err := writeFile(configFile, s.raw); err != nil {
			return err
		}
	}
	if err != nil {
		return fmt.Errorf("read the enclave config: %w", err)
	}
	if s.config, err = config.Parse(s.raw); err != nil {
		return fmt.Errorf("read the enclave config: %w", err)
	}
	pcr16 := config.PCR16(s.raw)
	policy, err := kms.DefaultPolicy(account, parentRole, []kms.Pair{{PCR0: nsmtest.Measurements(image)[0], PCR16: pcr16[:]}})
	if err != nil {
		return fmt.Errorf("make the key policy: %w", err)
	}
	if err := server.PutKeyPolicy(s.config.KMSKeyARN, policy); err != nil {
		return fmt.Errorf("set the key policy: %w", full(err))
	}
	return nil
}

// localConfig permits keys of every algorithm that sign messages.
func localConfig(arn string) *config.Config {
	c := &config.Config{
		Version: 1, KMSKeyARN: arn, Keyring: keyringName, Epochs: []uint32{1}, SealEpoch: 1,
		Policies:  []config.Policy{{Name: policyName, Kinds: []record.Kind{record.Message}}},
		Lease:     config.LeaseLimit{MaxMS: config.DefaultLeaseMaxMS, MarginMS: config.DefaultLeaseMarginMS},
		KeyPolicy: config.DefaultKeyPolicy(),
	}
	for _, a := range []record.Algorithm{record.Ed25519, record.P256, record.RSA2048, record.Secp256k1} { // sorted, as the form demands
		c.Create = append(c.Create, config.Create{Algorithm: a, Policy: policyName, Max: maxKeys})
	}
	return c
}

// startParents starts them; they sign whatever is ready.
func (s *stack) startParents() {
	ctx, cancel := context.WithCancel(s.ctx)
	var g errgroup.Group
	for i := range s.parents {
		c := &child{name: fmt.Sprintf("parent-%d", i), args: s.args("parent", i), log: s.log}
		g.Go(func() error { return c.keep(ctx) })
	}
	s.running = func() error {
		cancel()
		return g.Wait()
	}
}

// stopParents lets them finish what they have.
func (s *stack) stopParents() error {
	if s.running == nil {
		return nil
	}
	stop := s.running
	s.running = nil
	return stop()
}

// close stops everything: parents first, so that claims are given back, the
// database last.
func (s *stack) close(cancel context.CancelFunc) error {
	err := s.stopParents()
	cancel()
	return errors.Join(err, s.group.Wait())
}

// connect reaches enclave i, which may still be starting.
func (s *stack) connect(ctx context.Context, i int) (*signclient.Client, error) {
	dial := func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socketPath("enclave", i))
	}
	for {
		c, err := signclient.Connect(ctx, dial, signclient.Options{})
		if err == nil {
			return c, nil
		}
		select {
		case <-time.After(restartFirst):
		case <-ctx.Done():
			return nil, fmt.Errorf("reach enclave %d: %w", i, errors.Join(ctx.Err(), err))
		}
	}
}
