package kms_test

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/enclave/internal/kms"
	localkms "github.com/keyhold/keyhold/internal/awslocal/kms"
	"github.com/keyhold/keyhold/keypolicy"
)

func TestTheLockIsWhatKMSTells(t *testing.T) {
	w := newWorld(t)
	c := w.client(t)
	policy := w.policy(t)
	for name, facts := range map[string]localkms.Facts{
		"of a plain key":       localkms.PlainFacts(),
		"with one grant":       {Origin: "AWS_KMS", KeySpec: "SYMMETRIC_DEFAULT", KeyUsage: "ENCRYPT_DECRYPT", Grants: 1},
		"with pages of grants": {Origin: "AWS_KMS", KeySpec: "SYMMETRIC_DEFAULT", KeyUsage: "ENCRYPT_DECRYPT", Grants: 47},
		"of another kind":      {MultiRegion: true, Origin: "EXTERNAL", KeySpec: "RSA_2048", KeyUsage: "SIGN_VERIFY"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := w.kms.SetFacts(w.keyARN, facts); err != nil {
				t.Fatal(err)
			}
			lock, err := c.ReadLock(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			want := &kms.Lock{Policy: []byte(policy), Key: keypolicy.KeyFacts{
				ARN: w.keyARN, Account: account, KeyManager: "CUSTOMER", KeyState: "Enabled", Enabled: true, MultiRegion: &facts.MultiRegion,
				Origin: facts.Origin, KeySpec: facts.KeySpec, KeyUsage: facts.KeyUsage, Grants: facts.Grants,
			}}
			if diff := cmp.Diff(want, lock); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestTheStateOfAKeyIsTold(t *testing.T) {
	w := newWorld(t)
	if err := w.kms.SetEnabled(w.keyARN, false); err != nil {
		t.Fatal(err)
	}
	lock, err := w.client(t).ReadLock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if lock.Key.Enabled || lock.Key.KeyState != "Disabled" {
		t.Errorf("a disabled key is %+v", lock.Key)
	}
}

// Each of the calls fails in turn: once, and for good.
func TestALockThatCannotBeReadIsNoLock(t *testing.T) {
	w := newWorld(t)
	c := w.client(t)
	if err := w.kms.SetFacts(w.keyARN, localkms.Facts{Grants: 1}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ReadLock(t.Context()); err != nil {
		t.Fatal(err)
	}
	calls := w.calls.Load()
	if calls < 4 {
		t.Fatalf("a lock took %d calls", calls)
	}
	for failing := range calls {
		for _, kind := range []localkms.FaultKind{localkms.Throttle, localkms.InternalError, localkms.DropBefore, localkms.DropAnswer} {
			for once, want := range map[bool]error{true: nil, false: kms.ErrUnreachable} {
				if kind == localkms.Throttle && !once {
					want = kms.ErrThrottled
				}
				w.calls.Store(0)
				w.faults = func(call int64) localkms.Fault {
					if call == failing+1 || call > failing && !once {
						return localkms.Fault{Kind: kind}
					}
					return localkms.Fault{}
				}
				if lock, err := c.ReadLock(t.Context()); !errors.Is(err, want) || (lock != nil) != once {
					t.Errorf("call %d, fault %d, once %v: %v", failing+1, kind, once, err)
				}
			}
		}
	}
}

func TestALockThatMayNotBeReadIsNoLock(t *testing.T) {
	for _, action := range []string{"kms:GetKeyPolicy", "kms:DescribeKey", "kms:ListGrants"} {
		w := newWorld(t)
		if err := w.kms.PutKeyPolicy(w.keyARN, []byte(strings.ReplaceAll(w.policy(t), action, "kms:ListAliases"))); err != nil {
			t.Fatal(err)
		}
		if lock, err := w.client(t).ReadLock(t.Context()); !errors.Is(err, kms.ErrDenied) || lock != nil {
			t.Errorf("without %s: %v", action, err)
		}
	}
}

// What a server with KMS's certificate must not get away with.
func TestALockOfAnotherKeyIsRefused(t *testing.T) {
	const arn = "arn:aws:kms:eu-central-1:111122223333:key/12345678-1234-1234-1234-123456789012"
	good := map[string]string{
		"GetKeyPolicy": `{"Policy":"{}","PolicyName":"default"}`,
		"DescribeKey":  `{"KeyMetadata":{"KeyId":"12345678-1234-1234-1234-123456789012","Arn":"` + arn + `","Enabled":true}}`,
		"ListGrants":   `{"Grants":[],"Truncated":false}`,
	}
	for name, bad := range map[string]struct{ op, reply string }{
		"no policy":                    {"GetKeyPolicy", `{"PolicyName":"default"}`},
		"a policy of another name":     {"GetKeyPolicy", `{"Policy":"{}","PolicyName":"other"}`},
		"no metadata":                  {"DescribeKey", `{}`},
		"metadata of another key":      {"DescribeKey", strings.Replace(good["DescribeKey"], ":key/1", ":key/2", 1)},
		"a page without the next":      {"ListGrants", `{"Grants":[],"Truncated":true}`},
		"a page that is its own next":  {"ListGrants", `{"Grants":[],"Truncated":true,"NextMarker":"a"}`},
		"a reply that is no JSON":      {"ListGrants", `{"Grants":`},
		"more than a reply may be":     {"GetKeyPolicy", `{"Policy":"` + strings.Repeat(" ", 256<<10) + `","PolicyName":"default"}`},
		"grants that are of no number": {"ListGrants", `{"Grants":3,"Truncated":false}`},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.opt.KeyARN = arn
			w.serveTLS(t, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
				op := strings.TrimPrefix(r.Header.Get("X-Amz-Target"), "TrentService.")
				rw.Header().Set("Content-Type", "application/x-amz-json-1.1")
				reply := good[op]
				if op == bad.op {
					reply = bad.reply
				}
				_, _ = rw.Write([]byte(reply))
			}))
			if lock, err := w.client(t).ReadLock(t.Context()); !errors.Is(err, kms.ErrReply) || lock != nil {
				t.Errorf("got %v, want %v", err, kms.ErrReply)
			}
		})
	}
}

// roundTrip is a transport that is one function.
type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// closing is a body that cannot be read once it is closed, as the SDK's.
type closing struct {
	io.Reader
	closed bool
}

func (c *closing) Read(p []byte) (int, error) {
	if c.closed {
		return 0, errors.New("read after close")
	}
	return c.Reader.Read(p) //nolint:wrapcheck // io.EOF must stay itself
}

func (c *closing) Close() error {
	c.closed = true
	return nil
}

// The SDK closes a request's body when the head of the answer is there. net/http
// then broke the connection, and a key policy of some kilobytes never came.
func TestTheTransportHasABodyThatNobodyElseCloses(t *testing.T) {
	var sent io.Reader
	rt := kms.TestingOnlyOnlyHost("kms.test", roundTrip(func(r *http.Request) (*http.Response, error) {
		sent = r.Body
		return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody, Request: r}, nil
	}))
	body := &closing{Reader: strings.NewReader("a request")}
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://kms.test/", body)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := rt.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := body.Close(); err != nil {
		t.Fatal(err)
	}
	if got := readAll(t, sent); string(got) != "a request" {
		t.Errorf("the transport reads %q", got)
	}
}

func TestADebugEnclaveReadsNoLock(t *testing.T) {
	w := newWorld(t)
	debug, err := nsmtest.New(w.ca, nsmtest.Options{Debug: true})
	if err != nil {
		t.Fatal(err)
	}
	w.opt.NSM = debug
	if _, err := w.client(t).ReadLock(t.Context()); !errors.Is(err, kms.ErrDebugEnclave) {
		t.Errorf("got %v, want %v", err, kms.ErrDebugEnclave)
	}
	if n := w.dials.Load(); n != 0 {
		t.Errorf("it dialed %d times", n)
	}
}

// policy is that of the key, as it was put.
func (w *world) policy(t *testing.T) string {
	t.Helper()
	text, err := localkms.DefaultPolicy(account, role, []localkms.Pair{pairOf(t, w.nsm)})
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
