package kms_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/enclave/internal/kms"
	localkms "github.com/keyhold/keyhold/internal/awslocal/kms"
	"github.com/keyhold/keyhold/internal/receipt"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestDecryptGivesTheGeneratedKeyInBothEncodings(t *testing.T) {
	for name, enc := range map[string]localkms.Encoding{"constructed": localkms.Constructed, "primitive": localkms.Primitive} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(o *localkms.Options) { o.Encoding = enc })
			c := w.client(t)
			wrapped, dek, err := c.GenerateDataKey(t.Context(), encCtx)
			if err != nil {
				t.Fatal(err)
			}
			again, err := c.Decrypt(t.Context(), wrapped, encCtx)
			if err != nil {
				t.Fatal(err)
			}
			if dek.Len() != 32 || !dek.Equal(again) {
				t.Error("the keys differ")
			}
			_, other, err := c.GenerateDataKey(t.Context(), encCtx)
			if err != nil {
				t.Fatal(err)
			}
			if dek.Equal(other) {
				t.Error("two data keys are equal")
			}
		})
	}
}

func TestTheDataKeyIsInNoLog(t *testing.T) {
	w := newWorld(t)
	_, dek, err := w.client(t).GenerateDataKey(t.Context(), encCtx)
	if err != nil {
		t.Fatal(err)
	}
	w.opt.Logger.InfoContext(t.Context(), "key", slog.Any("dek", dek))
	err = dek.Use(func(b []byte) error {
		for _, form := range []string{string(b), hex.EncodeToString(b), strings.ToUpper(hex.EncodeToString(b)), fmt.Sprintf("%d", b)} {
			if strings.Contains(w.log.String(), form) {
				t.Error("the data key is in the log")
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestEveryRequestHasAFreshKeyAndTheKindOfItsDocument(t *testing.T) {
	w := newWorld(t)
	var (
		mu   sync.Mutex
		keys = map[string]bool{}
	)
	w.serveTLS(t, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		body := readAll(t, r.Body)
		var in struct {
			Recipient struct{ AttestationDocument []byte }
		}
		if err := json.Unmarshal(body, &in); err != nil {
			t.Error(err)
		}
		doc, err := attestation.Parse(in.Recipient.AttestationDocument)
		if err != nil {
			t.Error(err)
			return
		}
		mu.Lock()
		keys[string(doc.PublicKey)] = true
		mu.Unlock()
		if diff := cmp.Diff(receipt.UserData(receipt.KindKMS, nil), doc.UserData); diff != "" {
			t.Errorf("user_data (-want +got):\n%s", diff)
		}
		if doc.Nonce != nil {
			t.Error("the document has a nonce")
		}
		rw.WriteHeader(http.StatusBadRequest)
	}))
	c := w.client(t)
	for range 3 {
		if _, _, err := c.GenerateDataKey(t.Context(), encCtx); err == nil {
			t.Error("an empty refusal was taken for an answer")
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if len(keys) != 3 {
		t.Errorf("%d keys in 3 requests", len(keys))
	}
}

func TestNothingFromTheEnvironmentIsUsed(t *testing.T) {
	for name, v := range map[string]string{
		"AWS_ENDPOINT_URL": "https://127.0.0.1:1", "AWS_ENDPOINT_URL_KMS": "https://127.0.0.1:1", "AWS_REGION": "us-east-1",
		"AWS_ACCESS_KEY_ID": "AKIAOTHER", "AWS_SECRET_ACCESS_KEY": "other", "AWS_USE_FIPS_ENDPOINT": "true",
		"HTTPS_PROXY": "http://127.0.0.1:1", "https_proxy": "http://127.0.0.1:1", "AWS_MAX_ATTEMPTS": "1", "AWS_NEW_RETRIES_2026": "true",
		"AWS_CA_BUNDLE": "/nonexistent", "SSL_CERT_FILE": "/nonexistent",
	} {
		t.Setenv(name, v)
	}
	w := newWorld(t)
	if _, _, err := w.client(t).GenerateDataKey(t.Context(), encCtx); err != nil {
		t.Error(err)
	}
}

func TestADebugEnclaveNeverDials(t *testing.T) {
	w := newWorld(t)
	ops := operations(t, w)
	debug, err := nsmtest.New(w.ca, nsmtest.Options{Debug: true})
	if err != nil {
		t.Fatal(err)
	}
	w.opt.NSM = debug
	for name, op := range ops {
		err := op(t.Context(), w.client(t))
		wantCode(t, w, err, kms.CodeDebugEnclave, kms.ClassRefuse)
		if !errors.Is(err, kms.ErrDebugEnclave) {
			t.Errorf("%s: errors.Is does not find ErrDebugEnclave", name)
		}
	}
	if n := w.dials.Load(); n != 0 {
		t.Errorf("%d dials", n)
	}
}

func TestAnNSMThatFailsIsReported(t *testing.T) {
	faults := map[string]nsmtest.Faults{
		"describe fails": {Fault: func(op string) error { return failing(op, nsmtest.OpDescribe) }},
		"attest fails":   {Fault: func(op string) error { return failing(op, nsmtest.OpAttest) }},
		"no document":    {EmptyDocument: true},
	}
	w := newWorld(t)
	for name, f := range faults {
		t.Run(name, func(t *testing.T) {
			w.nsm.SetFaults(f)
			defer w.nsm.SetFaults(nsmtest.Faults{})
			_, _, err := w.client(t).GenerateDataKey(t.Context(), encCtx)
			wantCode(t, w, err, kms.CodeNSM, kms.ClassRetry)
		})
	}
}

func failing(op, which string) error {
	if op == which {
		return errors.New(untrusted)
	}
	return nil
}

func TestKMSRefusesWhoeverThePolicyDoesNotName(t *testing.T) {
	tests := map[string]func(t *testing.T, w *world){
		"another image": func(t *testing.T, w *world) {
			t.Helper()
			w.opt.NSM = bootedNSM(t, w.ca, "another image")
		},
		"another config": func(t *testing.T, w *world) {
			t.Helper()
			n, err := nsmtest.New(w.ca, nsmtest.Options{PCRs: nsmtest.Measurements("image")})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := n.ExtendPCR(16, []byte("another config")); err != nil {
				t.Fatal(err)
			}
			if err := n.LockPCRs(17); err != nil {
				t.Fatal(err)
			}
			w.opt.NSM = n
		},
		"a config that is not locked": func(t *testing.T, w *world) {
			t.Helper()
			n, err := nsmtest.New(w.ca, nsmtest.Options{PCRs: nsmtest.Measurements("image")})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := n.ExtendPCR(16, configDigest); err != nil {
				t.Fatal(err)
			}
			w.opt.NSM = n
		},
		"an NSM of another maker": func(t *testing.T, w *world) {
			t.Helper()
			ca, err := nsmtest.NewCA(w.now)
			if err != nil {
				t.Fatal(err)
			}
			w.opt.NSM = bootedNSM(t, ca, "image")
		},
		"a document that was changed": func(_ *testing.T, w *world) {
			w.nsm.SetFaults(nsmtest.Faults{MangledSignature: true})
		},
		"another role": func(_ *testing.T, w *world) {
			w.credentials[accessKey] = localkms.Credential{
				SecretAccessKey: accessSecret, SessionToken: sessionToken, PrincipalARN: "arn:aws:iam::111122223333:role/other",
			}
		},
		"a key that admits image and config in two pairs, not together": func(t *testing.T, w *world) {
			t.Helper()
			mine, other := pairOf(t, w.nsm), pairOf(t, w.nsm)
			other.PCR0 = bytes.Repeat([]byte{1}, 48)
			mine.PCR16 = bytes.Repeat([]byte{2}, 48)
			policy, err := localkms.DefaultPolicy(account, role, []localkms.Pair{mine, other})
			if err != nil {
				t.Fatal(err)
			}
			if err := w.kms.PutKeyPolicy(w.keyARN, policy); err != nil {
				t.Fatal(err)
			}
		},
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			ops := operations(t, w)
			change(t, w)
			for _, op := range ops {
				wantCode(t, w, op(t.Context(), w.client(t)), kms.CodeDenied, kms.ClassRefuse)
			}
			if n := w.calls.Load(); n != int64(len(ops)) {
				t.Errorf("%d calls for %d refusals: a refusal was retried", n, len(ops))
			}
		})
	}
}

func TestWrappedKeysOfOthersAreRefused(t *testing.T) {
	w := newWorld(t)
	c := w.client(t)
	wrapped, _, err := c.GenerateDataKey(t.Context(), encCtx)
	if err != nil {
		t.Fatal(err)
	}
	w.opt.KeyARN = w.newKey(t)
	foreign, _, err := w.client(t).GenerateDataKey(t.Context(), encCtx)
	if err != nil {
		t.Fatal(err)
	}
	flipped := bytes.Clone(wrapped)
	flipped[len(flipped)-1] ^= 1
	tests := map[string]struct {
		wrapped []byte
		context map[string]string
	}{
		"another KMS key":    {foreign, encCtx},
		"another keyring":    {wrapped, withContext(func(m map[string]string) { m["keyhold:keyring"] = "other" })},
		"another epoch":      {wrapped, withContext(func(m map[string]string) { m["keyhold:epoch"] = "2" })},
		"no context":         {wrapped, nil},
		"context with more":  {wrapped, withContext(func(m map[string]string) { m["more"] = "" })},
		"damaged":            {flipped, encCtx},
		"cut":                {wrapped[:20], encCtx},
		"no ciphertext":      {[]byte(untrusted), encCtx},
		"empty":              {nil, encCtx},
		"longer than KMS is": {make([]byte, 6145), encCtx},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			dek, err := c.Decrypt(t.Context(), tt.wrapped, tt.context)
			if dek != nil {
				t.Error("there is a key beside the error")
			}
			wantCode(t, w, err, kms.CodeWrappedKey, kms.ClassRefuse)
		})
	}
}

func TestAKeyThatIsDisabledOrGoneIsNamed(t *testing.T) {
	w := newWorld(t)
	ops := operations(t, w)
	if err := w.kms.SetEnabled(w.keyARN, false); err != nil {
		t.Fatal(err)
	}
	for _, op := range ops {
		wantCode(t, w, op(t.Context(), w.client(t)), kms.CodeKey, kms.ClassRefuse)
	}
	w.opt.KeyARN = "arn:aws:kms:eu-central-1:111122223333:key/00000000-0000-4000-8000-000000000000"
	for _, op := range ops {
		wantCode(t, w, op(t.Context(), w.client(t)), kms.CodeKey, kms.ClassRefuse)
	}
}

func TestOneFaultIsSurvivedAndALastingOneReported(t *testing.T) {
	tests := map[string]struct {
		kind localkms.FaultKind
		code kms.Code
	}{
		"throttled":          {localkms.Throttle, kms.CodeThrottled},
		"internal error":     {localkms.InternalError, kms.CodeUnreachable},
		"failed":             {localkms.DropBefore, kms.CodeUnreachable},
		"failed but applied": {localkms.DropAnswer, kms.CodeUnreachable},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			for opName, op := range operations(t, w) {
				w.calls.Store(0)
				w.faults = func(call int64) localkms.Fault {
					if call == 1 {
						return localkms.Fault{Kind: tt.kind}
					}
					return localkms.Fault{}
				}
				if err := op(t.Context(), w.client(t)); err != nil || w.calls.Load() != 2 {
					t.Errorf("%s: one fault: %d calls, %v", opName, w.calls.Load(), err)
				}
				w.calls.Store(0)
				w.faults = func(int64) localkms.Fault { return localkms.Fault{Kind: tt.kind} }
				wantCode(t, w, op(t.Context(), w.client(t)), tt.code, kms.ClassRetry)
				if n := w.calls.Load(); n != kms.TestingOnlyMaxAttempts {
					t.Errorf("%s: lasting fault: %d calls", opName, n)
				}
			}
		})
	}
}

func TestNoConnectionIsUnreachable(t *testing.T) {
	w := newWorld(t)
	ops := operations(t, w)
	w.opt.Dial = func(context.Context) (net.Conn, error) {
		w.dials.Add(1)
		return nil, errors.New("no parent: " + untrusted)
	}
	for _, op := range ops {
		w.dials.Store(0)
		wantCode(t, w, op(t.Context(), w.client(t)), kms.CodeUnreachable, kms.ClassRetry)
		if n := w.dials.Load(); n != kms.TestingOnlyMaxAttempts {
			t.Errorf("%d dials", n)
		}
	}
}

func TestTheCallersContextEndsACall(t *testing.T) {
	w := newWorld(t)
	ops := operations(t, w)
	w.faults = func(int64) localkms.Fault { return localkms.Fault{Delay: time.Hour} }
	var wg sync.WaitGroup
	failed := map[string]chan error{}
	for name, op := range ops {
		c, done := w.client(t), make(chan error, 1)
		failed[name] = done
		wg.Go(func() {
			// Longer than making an RSA key takes, so that the call hangs at KMS.
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			done <- op(ctx, c)
		})
	}
	wg.Wait()
	for name, done := range failed {
		err := <-done
		wantCode(t, w, err, kms.CodeUnreachable, kms.ClassRetry)
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v does not tell of the deadline", name, err)
		}
	}
	if n := w.calls.Load(); n == 0 {
		t.Error("no call reached KMS")
	}
}

func TestCredentialsThatDoNotWorkAreNamed(t *testing.T) {
	local := func(change func(*localkms.Credential)) func(*world) {
		return func(w *world) {
			c := w.credentials[accessKey]
			change(&c)
			w.credentials[accessKey] = c
		}
	}
	given := func(c kms.Credentials, err error) func(*world) {
		return func(w *world) {
			w.opt.Credentials = func(context.Context) (kms.Credentials, error) { return c, err }
		}
	}
	tests := map[string]func(*world){
		"expired":          local(func(c *localkms.Credential) { c.Expires = start }),
		"wrong secret":     local(func(c *localkms.Credential) { c.SecretAccessKey = "another" }),
		"wrong token":      local(func(c *localkms.Credential) { c.SessionToken = "another" }),
		"unknown":          func(w *world) { delete(w.credentials, accessKey) },
		"none to be had":   given(kms.Credentials{}, errors.New(untrusted)),
		"empty":            given(kms.Credentials{}, nil),
		"header injection": given(kms.Credentials{AccessKeyID: "A\r\nX: " + untrusted, SecretAccessKey: "s"}, nil),
		"token too long":   given(kms.Credentials{AccessKeyID: "A", SecretAccessKey: "s", SessionToken: strings.Repeat("t", 10_000)}, nil),
		"clock ahead":      func(w *world) { w.opt.Now = func() time.Time { return start.Add(6 * time.Minute) } },
		"clock behind":     func(w *world) { w.opt.Now = func() time.Time { return start.Add(-6 * time.Minute) } },
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			ops := operations(t, w)
			change(w)
			for _, op := range ops {
				wantCode(t, w, op(t.Context(), w.client(t)), kms.CodeCredentials, kms.ClassRetry)
			}
		})
	}
}

func TestNewRefusesWhatIsMissing(t *testing.T) {
	_, err := kms.New(kms.Options{KeyARN: "alias/x"})
	if !errors.Is(err, kms.ErrARN) {
		t.Errorf("got %v", err)
	}
	for _, name := range []string{"Credentials", "Dial", "Roots", "Now", "NSM", "Logger"} {
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s is not named in %v", name, err)
		}
	}
	w := newWorld(t)
	if _, err := kms.New(w.opt); err != nil {
		t.Error(err)
	}
}

func TestCredentialsDoNotPrint(t *testing.T) {
	c := kms.Credentials{AccessKeyID: untrusted, SecretAccessKey: accessSecret, SessionToken: sessionToken}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		for _, v := range []any{c, &c, []kms.Credentials{c}, struct{ C kms.Credentials }{c}} {
			if got := fmt.Sprintf(verb, v); strings.Contains(got, "marker") || strings.Contains(got, fmt.Sprintf("%x", "marker")) {
				t.Errorf("%s prints %s", verb, got)
			}
		}
	}
	if out, err := json.Marshal(c); err == nil {
		t.Errorf("JSON: %s", out)
	}
	var log buffer
	slog.New(slog.NewJSONHandler(&log, nil)).InfoContext(t.Context(), "m", slog.Any("c", c))
	if strings.Contains(log.String(), "marker") {
		t.Error("slog prints credentials")
	}
}
