package kms_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awskms "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/smithy-go"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/internal/awslocal/kms"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	account = "111122223333"
	region  = "eu-central-1"
)

var start = time.Date(2031, 5, 6, 7, 8, 9, 0, time.UTC)

// fixture is a server, called without sockets. The clock of the SDK's signer
// is the real one, so the server's is too unless a test sets it.
type fixture struct {
	*kms.Server
	opt kms.Options
	ca  *nsmtest.CA
	now time.Time // zero: the real time
}

func (f *fixture) clock() time.Time {
	if f.now.IsZero() {
		return time.Now()
	}
	return f.now
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{}
	ca, err := nsmtest.NewCA(f.clock)
	if err != nil {
		t.Fatal(err)
	}
	f.ca = ca
	f.opt = kms.Options{
		Dir: t.TempDir(), CertDir: t.TempDir(), Account: account, Region: region, Root: ca.Root(), Now: f.clock,
		Logger: slog.New(slog.DiscardHandler),
		Credentials: func(id string) (kms.Credential, bool) {
			c, ok := map[string]kms.Credential{
				"ROOT": {SecretAccessKey: "root-secret", PrincipalARN: rootARN},
				"ROLE": {SecretAccessKey: "role-secret", SessionToken: "role-token", PrincipalARN: roleARN},
				"ELSE": {SecretAccessKey: "else-secret", PrincipalARN: strangerA},
				"GONE": {SecretAccessKey: "gone-secret", PrincipalARN: rootARN, Expires: start},
			}[id]
			return c, ok
		},
	}
	f.restart(t)
	return f
}

func (f *fixture) restart(t *testing.T) {
	t.Helper()
	s, err := kms.New(f.opt)
	if err != nil {
		t.Fatal(err)
	}
	f.Server = s
}

// RoundTrip hands requests to the handler, as net/http's server would.
func (f *fixture) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Host = r.URL.Host
	rec := httptest.NewRecorder()
	f.Handler().ServeHTTP(rec, r)
	return rec.Result(), nil
}

func (f *fixture) as(accessKey string) *awskms.Client {
	secrets := map[string]aws.Credentials{
		"ROOT": {AccessKeyID: "ROOT", SecretAccessKey: "root-secret"},
		"ROLE": {AccessKeyID: "ROLE", SecretAccessKey: "role-secret", SessionToken: "role-token"},
		"ELSE": {AccessKeyID: "ELSE", SecretAccessKey: "else-secret"},
	}
	return awskms.New(awskms.Options{
		Region:           region,
		Credentials:      aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) { return secrets[accessKey], nil }),
		HTTPClient:       &http.Client{Transport: f},
		RetryMaxAttempts: 1,
	})
}

func wantError(t *testing.T, err error, want string) {
	t.Helper()
	var api smithy.APIError
	if !errors.As(err, &api) || api.ErrorCode() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func (f *fixture) key(t *testing.T, policy string) string {
	t.Helper()
	arn, err := f.CreateKey([]byte(policy))
	if err != nil {
		t.Fatal(err)
	}
	return arn
}

// open lets the role use the key in every way.
func open() string {
	return policyOf(`{"Effect":"Allow","Principal":{"AWS":["` + roleARN + `","` + rootARN + `"]},"Action":"kms:*","Resource":"*"}`)
}

func TestTheSDKSeesAKMS(t *testing.T) {
	f := newFixture(t)
	root := f.as("ROOT")
	created, err := root.CreateKey(t.Context(), &awskms.CreateKeyInput{Description: aws.String("local"), Policy: aws.String(open())})
	if err != nil {
		t.Fatal(err)
	}
	arn := created.KeyMetadata.Arn
	described, err := root.DescribeKey(t.Context(), &awskms.DescribeKeyInput{KeyId: created.KeyMetadata.KeyId})
	if err != nil {
		t.Fatal(err)
	}
	checkMetadata(t, described.KeyMetadata, *arn)
	policy, err := root.GetKeyPolicy(t.Context(), &awskms.GetKeyPolicyInput{KeyId: arn})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(open(), *policy.Policy); diff != "" {
		t.Errorf("policy (-want +got):\n%s", diff)
	}
	grants, err := root.ListGrants(t.Context(), &awskms.ListGrantsInput{KeyId: arn})
	if err != nil || len(grants.Grants) != 0 || grants.Truncated {
		t.Errorf("grants: %+v, %v", grants, err)
	}
	if diff := cmp.Diff([]string{*arn}, f.KeyARNs()); diff != "" {
		t.Errorf("keys (-want +got):\n%s", diff)
	}
}

func checkMetadata(t *testing.T, m *types.KeyMetadata, arn string) {
	t.Helper()
	if *m.Arn != arn || *m.Description != "local" || m.KeyState != types.KeyStateEnabled || m.KeySpec != types.KeySpecSymmetricDefault ||
		m.Origin != types.OriginTypeAwsKms || *m.MultiRegion || m.CreationDate.IsZero() {
		t.Errorf("metadata: %+v", m)
	}
}

func TestWithoutRecipientThePlaintextIsAnswered(t *testing.T) {
	f := newFixture(t)
	arn, c := f.key(t, open()), f.as("ROLE")
	encCtx := map[string]string{"a": "1", "b": "2"}
	made, err := c.GenerateDataKey(t.Context(), &awskms.GenerateDataKeyInput{KeyId: &arn, KeySpec: types.DataKeySpecAes256, EncryptionContext: encCtx})
	if err != nil {
		t.Fatal(err)
	}
	opened, err := c.Decrypt(t.Context(), &awskms.DecryptInput{CiphertextBlob: made.CiphertextBlob, EncryptionContext: encCtx})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(made.Plaintext, opened.Plaintext); diff != "" || len(opened.Plaintext) != 32 {
		t.Errorf("plaintext of %d bytes (-made +opened):\n%s", len(opened.Plaintext), diff)
	}
	if *opened.KeyId != arn || *made.KeyId != arn || opened.CiphertextForRecipient != nil || opened.EncryptionAlgorithm != types.EncryptionAlgorithmSpecSymmetricDefault {
		t.Errorf("answer: %+v", opened)
	}
}

func TestCiphertextsAreBoundToKeyAndContext(t *testing.T) {
	f := newFixture(t)
	arn, other, c := f.key(t, open()), f.key(t, open()), f.as("ROLE")
	encCtx := map[string]string{"a": "1"}
	made, err := c.GenerateDataKey(t.Context(), &awskms.GenerateDataKeyInput{KeyId: &arn, KeySpec: types.DataKeySpecAes128, EncryptionContext: encCtx})
	if err != nil {
		t.Fatal(err)
	}
	blob := made.CiphertextBlob
	decrypt := func(keyID string, blob []byte, encCtx map[string]string) error {
		in := &awskms.DecryptInput{CiphertextBlob: blob, EncryptionContext: encCtx}
		if keyID != "" {
			in.KeyId = &keyID
		}
		_, err := c.Decrypt(t.Context(), in)
		return err
	}
	wantError(t, decrypt(other, blob, encCtx), "IncorrectKeyException")
	wantError(t, decrypt(arn, blob, map[string]string{"a": "2"}), "InvalidCiphertextException")
	wantError(t, decrypt(arn, blob, nil), "InvalidCiphertextException")
	// Length prefixes keep {"a": "1"} apart from other splits of the same letters.
	wantError(t, decrypt(arn, blob, map[string]string{"a1": ""}), "InvalidCiphertextException")
	for i := range blob {
		mutant := bytes.Clone(blob)
		mutant[i] ^= 1
		if err := decrypt(arn, mutant, encCtx); err == nil {
			t.Fatalf("byte %d flipped: opened", i)
		}
		if err := decrypt(arn, blob[:i], encCtx); err == nil {
			t.Fatalf("cut at %d: opened", i)
		}
	}
	if err := decrypt(arn, blob, encCtx); err != nil {
		t.Errorf("unchanged: %v", err)
	}
}

func TestKeysAndCAOutliveTheServer(t *testing.T) {
	f := newFixture(t)
	arn := f.key(t, open())
	made, err := f.as("ROLE").GenerateDataKey(t.Context(), &awskms.GenerateDataKeyInput{KeyId: &arn, KeySpec: types.DataKeySpecAes256})
	if err != nil {
		t.Fatal(err)
	}
	ca := f.CACertificate()
	f.restart(t)
	opened, err := f.as("ROLE").Decrypt(t.Context(), &awskms.DecryptInput{CiphertextBlob: made.CiphertextBlob})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(made.Plaintext, opened.Plaintext); diff != "" {
		t.Error("another plaintext after the restart")
	}
	if diff := cmp.Diff(ca, f.CACertificate()); diff != "" {
		t.Error("another CA after the restart")
	}
	for _, dir := range []string{f.opt.CertDir, filepath.Join(f.opt.Dir, "keys")} {
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 1 {
			t.Fatalf("%s: %d files, %v", dir, len(entries), err)
		}
		if info, err := entries[0].Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", entries[0].Name(), info.Mode(), err)
		}
	}
}

func TestDamagedFoldersAreRefused(t *testing.T) {
	damage := map[string]func(f *fixture, keyFile string) error{
		"a key that is no JSON": func(_ *fixture, file string) error { return os.WriteFile(file, []byte("x"), 0o600) },
		"a key under another name": func(_ *fixture, file string) error {
			return os.Rename(file, filepath.Join(filepath.Dir(file), "01234567-89ab-4def-8123-456789abcdef.json"))
		},
		"a CA that is no PEM": func(f *fixture, _ string) error {
			return os.WriteFile(filepath.Join(f.opt.CertDir, "kms-ca.pem"), []byte("x"), 0o600)
		},
	}
	for name, do := range damage {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			arn := f.key(t, open())
			if err := do(f, filepath.Join(f.opt.Dir, "keys", arn[strings.LastIndex(arn, "/")+1:]+".json")); err != nil {
				t.Fatal(err)
			}
			if _, err := kms.New(f.opt); err == nil {
				t.Error("accepted")
			}
		})
	}
}

func TestAKeyThatCannotBeStoredIsNotMade(t *testing.T) {
	f := newFixture(t)
	arn := f.key(t, open())
	if err := os.RemoveAll(filepath.Join(f.opt.Dir, "keys")); err != nil {
		t.Fatal(err)
	}
	_, err := f.as("ROOT").CreateKey(t.Context(), &awskms.CreateKeyInput{})
	wantError(t, err, "KMSInternalException")
	_, err = f.as("ROOT").PutKeyPolicy(t.Context(), &awskms.PutKeyPolicyInput{KeyId: &arn, Policy: aws.String(policyOf(allow(`{}`))), BypassPolicyLockoutSafetyCheck: true})
	wantError(t, err, "KMSInternalException")
	if diff := cmp.Diff([]string{arn}, f.KeyARNs()); diff != "" {
		t.Errorf("keys (-want +got):\n%s", diff)
	}
	got, err := f.as("ROOT").GetKeyPolicy(t.Context(), &awskms.GetKeyPolicyInput{KeyId: &arn})
	if err != nil || *got.Policy != open() {
		t.Errorf("the policy changed although it could not be stored: %v", err)
	}
}

func TestPutKeyPolicy(t *testing.T) {
	f := newFixture(t)
	arn := f.key(t, open())
	put := func(who, policy string, bypass bool) error {
		_, err := f.as(who).PutKeyPolicy(t.Context(), &awskms.PutKeyPolicyInput{KeyId: &arn, Policy: &policy, BypassPolicyLockoutSafetyCheck: bypass})
		return err
	}
	wantError(t, put("ELSE", open(), true), "AccessDeniedException")
	wantError(t, put("ROOT", `{"Version":"2012-10-17","Statement":[]}`, true), "MalformedPolicyDocumentException")
	wantError(t, put("ROOT", policyOf(allow(`{}`)), false), "MalformedPolicyDocumentException") // would lock root out
	if err := put("ROOT", policyOf(allow(`{}`)), true); err != nil {
		t.Fatal(err)
	}
	wantError(t, put("ROOT", open(), false), "AccessDeniedException") // and now it is
	_, err := f.as("ROOT").GetKeyPolicy(t.Context(), &awskms.GetKeyPolicyInput{KeyId: &arn})
	wantError(t, err, "AccessDeniedException")
	if err := f.PutKeyPolicy(arn, []byte(open())); err != nil {
		t.Fatal(err)
	}
	if err := put("ROOT", open(), false); err != nil {
		t.Error(err)
	}
}

func TestErrorsCarryTheNamesOfAWS(t *testing.T) {
	f := newFixture(t)
	arn, role, root := f.key(t, open()), f.as("ROLE"), f.as("ROOT")
	disabled := f.key(t, open())
	if err := f.SetEnabled(disabled, false); err != nil {
		t.Fatal(err)
	}
	generate := func(keyID string, change func(*awskms.GenerateDataKeyInput)) error {
		in := &awskms.GenerateDataKeyInput{KeyId: &keyID, KeySpec: types.DataKeySpecAes256}
		change(in)
		_, err := role.GenerateDataKey(t.Context(), in)
		return err
	}
	none := func(*awskms.GenerateDataKeyInput) {}
	wantError(t, generate(strings.Replace(arn, "key/", "alias/", 1), none), "NotFoundException")
	wantError(t, generate(arn[:len(arn)-1], none), "NotFoundException")
	wantError(t, generate(disabled, none), "DisabledException")
	wantError(t, generate(arn, func(in *awskms.GenerateDataKeyInput) { in.KeySpec = "" }), "ValidationException")
	wantError(t, generate(arn, func(in *awskms.GenerateDataKeyInput) { in.NumberOfBytes = aws.Int32(32) }), "ValidationException")
	wantError(t, generate(arn, func(in *awskms.GenerateDataKeyInput) { in.KeySpec, in.NumberOfBytes = "", aws.Int32(1025) }), "ValidationException")
	wantError(t, generate(arn, func(in *awskms.GenerateDataKeyInput) { in.EncryptionContext = map[string]string{"A": "1", "a": "2"} }), "ValidationException")
	wantError(t, generate(arn, func(in *awskms.GenerateDataKeyInput) { in.DryRun = aws.Bool(true) }), "SerializationException")
	_, err := role.Encrypt(t.Context(), &awskms.EncryptInput{KeyId: &arn, Plaintext: []byte("x")})
	wantError(t, err, "UnknownOperationException")
	_, err = role.Decrypt(t.Context(), &awskms.DecryptInput{CiphertextBlob: []byte("x")})
	wantError(t, err, "InvalidCiphertextException")
	_, err = root.CreateKey(t.Context(), &awskms.CreateKeyInput{KeySpec: types.KeySpecRsa2048})
	wantError(t, err, "UnsupportedOperationException")
	_, err = f.as("ELSE").CreateKey(t.Context(), &awskms.CreateKeyInput{})
	wantError(t, err, "AccessDeniedException")
	if err := f.SetEnabled("arn:aws:kms:eu-central-1:111122223333:key/x", true); err == nil {
		t.Error("a key that does not exist was enabled")
	}
}

// signedRequest is one that the SDK signed, caught before it is sent.
func (f *fixture) signedRequest(t *testing.T, arn string) (*http.Request, []byte) {
	t.Helper()
	var caught *http.Request
	var body []byte
	c := f.as("ROLE")
	_, err := c.DescribeKey(t.Context(), &awskms.DescribeKeyInput{KeyId: &arn}, func(o *awskms.Options) {
		o.HTTPClient = roundTripper(func(r *http.Request) (*http.Response, error) {
			var err error
			if body, err = io.ReadAll(r.Body); err != nil {
				return nil, err
			}
			caught = r.Clone(context.WithoutCancel(r.Context()))
			caught.Host = r.URL.Host
			return nil, errors.New("caught")
		})
	})
	if caught == nil {
		t.Fatalf("no request was made: %v", err)
	}
	return caught, body
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) Do(r *http.Request) (*http.Response, error) { return f(r) }

func TestSignaturesAreChecked(t *testing.T) {
	f := newFixture(t)
	arn := f.key(t, open())
	replace := func(header, old, with string) func(*http.Request, *[]byte) {
		return func(r *http.Request, _ *[]byte) {
			before := r.Header.Get(header)
			r.Header.Set(header, strings.Replace(before, old, with, 1))
			if r.Header.Get(header) == before {
				panic("the mutation changed nothing")
			}
		}
	}
	tests := []struct {
		name   string
		change func(*http.Request, *[]byte)
		want   string // empty: accepted
	}{
		{"as signed", func(*http.Request, *[]byte) {}, ""},
		{"no header", func(r *http.Request, _ *[]byte) { r.Header.Del("Authorization") }, "MissingAuthenticationTokenException"},
		{"another algorithm", replace("Authorization", "AWS4-HMAC-SHA256", "AWS4-ECDSA-P256-SHA256"), "IncompleteSignatureException"},
		{"no signature", replace("Authorization", ", Signature=", ", Sig="), "IncompleteSignatureException"},
		{"a field twice", replace("Authorization", ", Signature=", ", Credential=x, Signature="), "IncompleteSignatureException"},
		{"a short signature", replace("Authorization", "Signature=", "Signature=00, X="), "IncompleteSignatureException"},
		{"another service", replace("Authorization", "/kms/", "/s3/"), "InvalidSignatureException"},
		{"another region", replace("Authorization", "/eu-central-1/", "/us-east-1/"), "InvalidSignatureException"},
		{"another key", replace("Authorization", "Credential=ROLE", "Credential=NONE"), "UnrecognizedClientException"},
		{"a key of another secret", func(r *http.Request, b *[]byte) {
			replace("Authorization", "Credential=ROLE", "Credential=ROOT")(r, b)
			r.Header.Del("X-Amz-Security-Token")
			replace("Authorization", ";x-amz-security-token", "")(r, b)
		}, "InvalidSignatureException"},
		{"an expired key", func(r *http.Request, b *[]byte) {
			replace("Authorization", "Credential=ROLE", "Credential=GONE")(r, b)
			r.Header.Del("X-Amz-Security-Token")
			f.now = start
		}, "ExpiredTokenException"},
		{"no token", func(r *http.Request, _ *[]byte) { r.Header.Del("X-Amz-Security-Token") }, "UnrecognizedClientException"},
		{"another token", replace("X-Amz-Security-Token", "role", "rule"), "UnrecognizedClientException"},
		{"no date", func(r *http.Request, _ *[]byte) { r.Header.Del("X-Amz-Date") }, "IncompleteSignatureException"},
		{"another date than in the scope", func(r *http.Request, _ *[]byte) { r.Header.Set("X-Amz-Date", "20010101T000000Z") }, "InvalidSignatureException"},
		{"a header that is not signed", func(r *http.Request, _ *[]byte) { r.Header.Set("X-Amz-More", "1") }, "IncompleteSignatureException"},
		{"host not signed", replace("Authorization", ";host", ""), "IncompleteSignatureException"},
		{"another host", func(r *http.Request, _ *[]byte) { r.Host = "kms.us-east-1.amazonaws.com"; r.URL.Host = r.Host }, "InvalidSignatureException"},
		{"another body", func(_ *http.Request, b *[]byte) { *b = append(*b, ' ') }, "InvalidSignatureException"},
		{"another operation", func(r *http.Request, _ *[]byte) { r.Header.Set("X-Amz-Target", "TrentService.ListGrants") }, "InvalidSignatureException"},
		{"another query", func(r *http.Request, _ *[]byte) { r.URL.RawQuery = "a=b" }, "InvalidSignatureException"},
		{"six minutes late", func(*http.Request, *[]byte) { f.now = time.Now().Add(6 * time.Minute) }, "InvalidSignatureException"},
		{"six minutes early", func(*http.Request, *[]byte) { f.now = time.Now().Add(-6 * time.Minute) }, "InvalidSignatureException"},
		{"four minutes late", func(*http.Request, *[]byte) { f.now = time.Now().Add(4 * time.Minute) }, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			defer func() { f.now = time.Time{} }()
			r, body := f.signedRequest(t, arn)
			tt.change(r, &body)
			r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
			if tt.name == "another body" {
				r.ContentLength-- // the signed length is not what refuses it
			}
			rec := httptest.NewRecorder()
			f.Handler().ServeHTTP(rec, r)
			var got struct {
				Type string `json:"__type"`
			}
			if err := json.Unmarshal(rec.Body.Bytes(), &got); err != nil {
				t.Fatal(err)
			}
			if got.Type != tt.want || (rec.Code == http.StatusOK) != (tt.want == "") {
				t.Errorf("status %d, %q, want %q", rec.Code, got.Type, tt.want)
			}
		})
	}
}

func booted(t *testing.T, ca *nsmtest.CA, opt nsmtest.Options) *nsmtest.NSM {
	t.Helper()
	n, err := nsmtest.New(ca, opt)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestRecipientsAreVerified(t *testing.T) {
	f := newFixture(t)
	// Whoever is attested at all may use this key.
	arn := f.key(t, policyOf(allow(`{"Null":{"kms:RecipientAttestation:ImageSha384":"false"}}`), strings.Replace(allow(`{}`), "Decrypt", "GenerateDataKey", 1)))
	c := f.as("ROLE")
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	measured := nsmtest.Options{PCRs: nsmtest.Measurements("image")}
	document := func(n *nsmtest.NSM, publicKey []byte) []byte {
		t.Helper()
		doc, err := n.Attest(nsm.AttestRequest{PublicKey: publicKey})
		if err != nil {
			t.Fatal(err)
		}
		return doc
	}
	good := document(booted(t, f.ca, measured), public)
	mangled := bytes.Clone(good)
	mangled[len(mangled)-1] ^= 1
	otherCA, err := nsmtest.NewCA(f.clock)
	if err != nil {
		t.Fatal(err)
	}
	at := func(d time.Duration) nsmtest.Options {
		o := measured
		o.Now = func() time.Time { return time.Now().Add(d) }
		return o
	}
	const validation, denied = "ValidationException", "AccessDeniedException"
	tests := []struct {
		name     string
		document []byte
		want     string
	}{
		{"good", good, ""},
		{"none", nil, denied}, // the policy wants one
		{"no document", []byte{}, validation},
		{"nonsense", []byte("x"), validation},
		{"signature changed", mangled, validation},
		{"another CA", document(booted(t, otherCA, measured), public), validation},
		{"a debug enclave", document(booted(t, f.ca, nsmtest.Options{Debug: true}), public), denied},
		{"six minutes old", document(booted(t, f.ca, at(-6*time.Minute)), public), validation},
		{"four minutes old", document(booted(t, f.ca, at(-4*time.Minute)), public), ""},
		{"six minutes ahead", document(booted(t, f.ca, at(6*time.Minute)), public), validation},
		{"no public key", document(booted(t, f.ca, measured), nil), validation},
		{"a public key that is none", document(booted(t, f.ca, measured), []byte("x")), validation},
	}
	made, err := c.GenerateDataKey(t.Context(), &awskms.GenerateDataKeyInput{KeyId: &arn, KeySpec: types.DataKeySpecAes256})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			in := &awskms.DecryptInput{CiphertextBlob: made.CiphertextBlob}
			if tt.document != nil {
				in.Recipient = &types.RecipientInfo{AttestationDocument: tt.document, KeyEncryptionAlgorithm: types.KeyEncryptionMechanismRsaesOaepSha256}
			}
			out, err := c.Decrypt(t.Context(), in)
			if tt.want != "" {
				wantError(t, err, tt.want)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if out.Plaintext != nil || len(out.CiphertextForRecipient) == 0 {
				t.Error("want an envelope and no plaintext")
			}
		})
	}
	_, err = c.Decrypt(t.Context(), &awskms.DecryptInput{CiphertextBlob: made.CiphertextBlob, Recipient: &types.RecipientInfo{AttestationDocument: good}})
	wantError(t, err, validation)
}

func TestTheDefaultPolicyAdmitsPairsAndNothingElse(t *testing.T) {
	pcr := func(b byte) []byte { return bytes.Repeat([]byte{b}, 48) }
	pairs := []kms.Pair{{PCR0: pcr(1), PCR16: pcr(2)}, {PCR0: pcr(3), PCR16: pcr(4)}}
	policy, err := kms.DefaultPolicy(account, roleARN, pairs)
	if err != nil {
		t.Fatal(err)
	}
	hex := func(b byte) string { return strings.Repeat(string([]byte{'0', '0' + b}), 48) }
	context := func(principal string, pcr0, pcr16 byte) map[string]string {
		c := map[string]string{"aws:principalarn": principal}
		if pcr0 != 0 {
			c["kms:recipientattestation:pcr0"], c["kms:recipientattestation:pcr16"] = hex(pcr0), hex(pcr16)
		}
		return c
	}
	tests := []struct {
		principal, action string
		pcr0, pcr16       byte
		want              string
	}{
		{roleARN, "kms:Decrypt", 1, 2, "allowed"},
		{roleARN, "kms:GenerateDataKey", 3, 4, "allowed"},
		{roleARN, "kms:Decrypt", 1, 4, "explicit deny"},
		{roleARN, "kms:Decrypt", 5, 2, "explicit deny"},
		{roleARN, "kms:Decrypt", 0, 0, "explicit deny"},
		{rootARN, "kms:Decrypt", 1, 2, "explicit deny"},
		{roleARN, "kms:Encrypt", 1, 2, "explicit deny"},
		{roleARN, "kms:ReEncryptTo", 1, 2, "explicit deny"},
		{rootARN, "kms:CreateGrant", 0, 0, "explicit deny"},
		{roleARN, "kms:PutKeyPolicy", 1, 2, "explicit deny"},
		{rootARN, "kms:PutKeyPolicy", 0, 0, "explicit deny"},
		{adminARN, "kms:PutKeyPolicy", 0, 0, "allowed"},
		{adminARN, "kms:Decrypt", 1, 2, "explicit deny"},
		{roleARN, "kms:GetKeyPolicy", 0, 0, "allowed"},
		{strangerA, "kms:DescribeKey", 0, 0, "implicit deny"},
	}
	for _, tt := range tests {
		got, err := kms.TestingOnlyDecide(string(policy), testARN, tt.principal, tt.action, context(tt.principal, tt.pcr0, tt.pcr16))
		if err != nil || got != tt.want {
			t.Errorf("%s, %s, PCR0 %d, PCR16 %d: %s, %v, want %s", tt.principal, tt.action, tt.pcr0, tt.pcr16, got, err, tt.want)
		}
	}
	for name, pairs := range map[string][]kms.Pair{
		"three": append(pairs, pairs[0]), "short": {{PCR0: pcr(1)[:47], PCR16: pcr(2)}}, "zero": {{PCR0: pcr(0), PCR16: pcr(2)}},
	} {
		if _, err := kms.DefaultPolicy(account, roleARN, pairs); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestServeEndsWithItsContextAndSpeaksTLS(t *testing.T) {
	f := newFixture(t)
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- f.Serve(ctx, l) }()
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: f.Roots(), ServerName: f.Host()}}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+l.Addr().String(), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusBadRequest || resp.Body.Close() != nil {
		t.Errorf("status %d", resp.StatusCode)
	}
	client.CloseIdleConnections()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := net.Dial("tcp", l.Addr().String()); err == nil { //nolint:noctx // fails at once
		t.Error("the listener is still open")
	}
}

func TestNewNamesWhatIsMissing(t *testing.T) {
	_, err := kms.New(kms.Options{})
	for _, name := range []string{"Dir", "Account", "Region", "Root", "Credentials", "Logger"} {
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s is not named in %v", name, err)
		}
	}
}
