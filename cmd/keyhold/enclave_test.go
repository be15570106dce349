package main

import (
	"context"
	"crypto/sha512"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/parent"
)

// appliance is what startEnclave leaves for the script's commands.
type appliance struct {
	server *enclavetest.Server
	raw    []byte // the config
	root   attestation.Root
	image  attestation.Image
}

type applianceKey struct{}

// startEnclave serves an enclave that waits for its config on e.sock, and writes
// config.json, other.json (another valid config) and root.pem.
func startEnclave(t *testing.T, e *testscript.Env) error {
	t.Helper()
	kms := &enclavetest.KMS{}
	server, ca, err := newEnclave(kms)
	if err != nil {
		return err
	}
	raw, err := config.Encode(enclavetest.DefaultConfig())
	if err != nil {
		return err
	}
	other := enclavetest.DefaultConfig()
	other.Lease.MaxMS = 9000
	otherRaw, err := config.Encode(other)
	if err != nil {
		return err
	}
	root := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Root().Raw})
	for name, b := range map[string][]byte{"config.json": raw, "other.json": otherRaw, "root.pem": root} {
		if err := os.WriteFile(filepath.Join(e.WorkDir, name), b, 0o600); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancel(context.Background()) // Setup runs before the script, which has none
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "unix", filepath.Join(e.WorkDir, "e.sock"))
	if err != nil {
		cancel()
		return err
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, ln) }()
	e.Defer(func() {
		cancel()
		server.Close()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	pcrs := nsmtest.Measurements("enclavetest")
	measurements := fmt.Sprintf(`{"Measurements":{"HashAlgorithm":"Sha384 { ... }","PCR0":"%x","PCR1":"%x","PCR2":"%x"}}`, pcrs[0], pcrs[1], pcrs[2])
	if err := os.WriteFile(filepath.Join(e.WorkDir, "eif.json"), []byte(measurements), 0o600); err != nil {
		return err
	}
	pcr0 := pcrs[0]
	e.Values[applianceKey{}] = &appliance{
		server: server, raw: raw, root: attestation.TestRoot(ca.Root()),
		image: attestation.Image{PCRs: map[int][]byte{0: pcr0}},
	}
	e.Setenv(cli.EnvEnclave, "unix:e.sock")
	e.Setenv(cli.EnvConfig, "config.json")
	e.Setenv(cli.EnvTestRoot, "root.pem")
	e.Setenv("PCR0", hex.EncodeToString(pcr0))
	e.Setenv(cli.EnvPCR0, hex.EncodeToString(pcr0))
	return nil
}

func newEnclave(kms *enclavetest.KMS) (*enclavetest.Server, *nsmtest.CA, error) {
	ca, err := nsmtest.NewCA(nil)
	if err != nil {
		return nil, nil, err
	}
	s, err := enclavetest.New(context.Background(), enclavetest.Options{Bare: true, KMS: kms, Device: func() (nsm.Session, error) {
		pcrs := nsmtest.Measurements("enclavetest")
		pcrs[rolePCR], pcrs[instancePCR] = testRegister(testRole), testRegister(testInstance)
		return nsmtest.New(ca, nsmtest.Options{PCRs: pcrs, ModuleID: testInstance + "-enc0123456789abcdef"})
	}})
	return s, ca, err
}

// The instance that the enclave of the scripts is on.
const (
	testRole     = "arn:aws:iam::123456789012:role/Webserver"
	testInstance = "i-1234567890abcdef0"
)

// testRegister is what the hypervisor puts into PCR3 and PCR4.
func testRegister(text string) []byte {
	sum := sha512.Sum384(append(make([]byte, 48), text...))
	return sum[:]
}

func applianceOf(ts *testscript.TestScript) *appliance {
	a, ok := ts.Value(applianceKey{}).(*appliance)
	if !ok {
		ts.Fatalf("no enclave was started")
	}
	return a
}

// restartEnclave is "restart": another boot, without config and keyring.
func restartEnclave(ts *testscript.TestScript, _ bool, _ []string) {
	ts.Check(applianceOf(ts).server.Restart(context.Background()))
}

// runParent is "parent": one that works until the script ends.
func runParent(ts *testscript.TestScript, _ bool, _ []string) {
	a := applianceOf(ts)
	s := scriptStore(ts)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- parent.Run(ctx, parent.Config{
			Store: s, EnclaveConfig: a.raw, Root: a.root, Images: []attestation.Image{a.image},
			Enclaves: []parent.Enclave{{Name: "e", Dial: a.server.Dial}},
		})
	}()
	ts.Defer(func() {
		cancel()
		if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
			ts.Logf("parent: %v", err)
		}
	})
}

// tamper is "tamper TABLE ATTRIBUTE": flips a bit of that attribute in every
// item of a table.
func tamper(ts *testscript.TestScript, _ bool, args []string) {
	ctx := context.Background()
	client := dynamodb.New(dynamodb.Options{
		Region: "local", BaseEndpoint: aws.String(ts.Getenv(cli.EnvEndpoint)),
		Credentials: credentials.NewStaticCredentialsProvider("local", "local", ""),
	})
	table := aws.String(ts.Getenv(cli.EnvTablePrefix) + args[0])
	out, err := client.Scan(ctx, &dynamodb.ScanInput{TableName: table})
	ts.Check(err)
	for _, m := range out.Items {
		v, ok := m[args[1]].(*types.AttributeValueMemberB)
		if !ok || len(v.Value) == 0 {
			ts.Fatalf("table %s has no bytes %s", args[0], args[1])
		}
		v.Value[len(v.Value)/2] ^= 1
		_, err := client.PutItem(ctx, &dynamodb.PutItemInput{TableName: table, Item: m})
		ts.Check(err)
	}
}

// flip is "flip FILE": the last bit of a file.
func flip(ts *testscript.TestScript, _ bool, args []string) {
	b := []byte(ts.ReadFile(args[0]))
	b[len(b)-1] ^= 1
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), b, 0o600))
}
