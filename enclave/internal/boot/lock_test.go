package boot_test

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/enclave/internal/boot"
	"github.com/keyhold/keyhold/enclave/internal/kms"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/keypolicy"
)

// loosen makes the Allow of the pairs hold for everybody, attested or not.
func loosen(l *kms.Lock) {
	l.Policy = []byte(strings.Replace(string(l.Policy), `"Statement": [`,
		`"Statement": [{"Effect": "Allow", "Principal": "*", "Action": "kms:*", "Resource": "*"},`, 1))
	l.Policy = []byte(strings.ReplaceAll(string(l.Policy), `"Effect": "Deny"`, `"Effect": "Allow"`))
}

// locks are what KMS may say of its key, and what the enclave must say to that.
var locks = []struct {
	name  string
	alter func(*kms.Lock)
	want  refusal.Code
}{
	{"is as it should be", func(*kms.Lock) {}, ""},
	{"has a loose policy", loosen, refusal.PolicyLoose},
	{"has the policy of a new key", func(l *kms.Lock) {
		l.Policy = []byte(`{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":{"AWS":"arn:aws:iam::111122223333:root"},"Action":"kms:*","Resource":"*"}]}`)
	}, refusal.PolicyLoose},
	{"has no policy", func(l *kms.Lock) { l.Policy = nil }, refusal.PolicyUnread},
	{"has a policy that is no JSON", func(l *kms.Lock) { l.Policy = l.Policy[1:] }, refusal.PolicyUnread},
	{"has a policy that nobody can judge", func(l *kms.Lock) {
		l.Policy = []byte(strings.Replace(string(l.Policy), `"StringNotEqualsIgnoreCase"`, `"StringNotEqualsIfExists"`, 1))
	}, refusal.PolicyUnread},
	{"admits another config", func(l *kms.Lock) {
		own := pcr16Of(l.Policy)
		l.Policy = []byte(strings.ReplaceAll(string(l.Policy), own, strings.Repeat("ab", 48)))
	}, refusal.PolicyForeign},
	{"has a grant", func(l *kms.Lock) { l.Key.Grants = 1 }, refusal.KMSKeyUnfit},
	{"is multi-region", func(l *kms.Lock) { *l.Key.MultiRegion = true }, refusal.KMSKeyUnfit},
	{"does not say whether it is multi-region", func(l *kms.Lock) { l.Key.MultiRegion = nil }, refusal.KMSKeyUnfit},
	{"is disabled", func(l *kms.Lock) { l.Key.Enabled, l.Key.KeyState = false, "Disabled" }, refusal.KMSKeyUnfit},
	{"is to be deleted", func(l *kms.Lock) { l.Key.KeyState = "PendingDeletion" }, refusal.KMSKeyUnfit},
	{"was imported", func(l *kms.Lock) { l.Key.Origin = "EXTERNAL" }, refusal.KMSKeyUnfit},
	{"lies in a store of its own", func(l *kms.Lock) { l.Key.Origin = "AWS_CLOUDHSM" }, refusal.KMSKeyUnfit},
	{"is asymmetric", func(l *kms.Lock) { l.Key.KeySpec = "RSA_2048" }, refusal.KMSKeyUnfit},
	{"signs", func(l *kms.Lock) { l.Key.KeyUsage = "SIGN_VERIFY" }, refusal.KMSKeyUnfit},
	{"is managed by AWS", func(l *kms.Lock) { l.Key.KeyManager = "AWS" }, refusal.KMSKeyUnfit},
	{"is another key", func(l *kms.Lock) { l.Key.ARN += "0" }, refusal.KMSKeyUnfit},
}

// pcr16Of finds the value of the register in a policy of one pair.
func pcr16Of(policy []byte) string {
	_, after, _ := strings.Cut(string(policy), `RecipientAttestation:PCR16": "`)
	return after[:96]
}

func TestNoDataKeyIsAskedForBehindALooseLock(t *testing.T) {
	for _, tc := range locks {
		t.Run(tc.name, func(t *testing.T) {
			maker := newWorld(t, false, &enclavetest.KMS{})
			made, err := maker.configured(t).CreateKeyring(t.Context())
			want(t, err, "")
			w := newWorld(t, false, &enclavetest.KMS{Alter: tc.alter})
			b := w.configured(t)
			_, err = b.Load(t.Context(), &wire.Load{Header: made.Header})
			if tc.want == "" {
				want(t, err, refusal.KMSWrongKey) // it is the key of another KMS
			} else {
				want(t, err, tc.want)
			}
			_, err = b.CreateKeyring(t.Context())
			want(t, err, tc.want)
			asked := strings.Join(*w.calls, " ")
			if tc.want != "" && asked != "ReadLock ReadLock" || tc.want == "" && asked != "ReadLock Decrypt ReadLock GenerateDataKey Decrypt" {
				t.Errorf("KMS was asked: %s", asked)
			}
			if state := b.Progress().State; (state == wire.StateReady) != (tc.want == "") {
				t.Errorf("state %s", state)
			}
		})
	}
}

// An operator who mends the policy need not restart the enclave.
func TestALockThatIsMendedIsProvedAnew(t *testing.T) {
	alter := loosen
	client := &enclavetest.KMS{Alter: func(l *kms.Lock) { alter(l) }}
	b := newWorld(t, false, client).configured(t)
	_, err := b.CreateKeyring(t.Context())
	want(t, err, refusal.PolicyLoose)
	alter = func(*kms.Lock) {}
	_, err = b.CreateKeyring(t.Context())
	want(t, err, "")
}

func TestTheStatementTellsWhatWasProved(t *testing.T) {
	w := newWorld(t, false, &enclavetest.KMS{})
	made, err := w.configured(t).CreateKeyring(t.Context())
	want(t, err, "")
	st, err := receipt.Decode[receipt.Statement](made.Statement)
	want(t, err, "")
	lock, err := w.kms.ReadLock(t.Context())
	want(t, err, "")
	proof, err := keypolicy.Prove(lock.Policy, keypolicy.Expectation{Account: "111122223333"})
	want(t, err, "")
	pair := receipt.Pair{PCR0: [48]byte(nsmtest.Measurements("boot")[0]), PCR16: config.PCR16(encoded(t, nil))}
	if st.Mode != keypolicy.Managed || st.PolicyHash != proof.Hash || len(st.Pairs) != 1 || st.Pairs[0] != pair {
		t.Errorf("the statement says %s, %x, %d pairs", st.Mode, st.PolicyHash, len(st.Pairs))
	}
}

func TestAManagedPolicyIsNotEnoughForASealedConfig(t *testing.T) {
	b := newWorld(t, false, &enclavetest.KMS{}).start(t)
	_, err := configure(t, b, encoded(t, func(c *config.Config) { c.KeyPolicy.Mode = keypolicy.Sealed }))
	want(t, err, "")
	_, err = b.CreateKeyring(t.Context())
	want(t, err, refusal.PolicyLoose)
}

// boots runs a boot with the default config in a bubble, and hands back how Run ends.
func (w *world) boots(ctx context.Context, t *testing.T) (*boot.Boot, <-chan error) {
	t.Helper()
	b, err := boot.New(w.opt)
	want(t, err, "")
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	<-b.Started()
	_, err = b.Configure(ctx, &wire.Configure{Config: encoded(t, nil)})
	want(t, err, "")
	_, err = b.CreateKeyring(ctx)
	want(t, err, "")
	return b, done
}

// pass lets time go by in a bubble.
func pass(d time.Duration) { <-time.After(d) }

func addKey(t *testing.T, b *boot.Boot) error {
	t.Helper()
	lane, err := b.Engine().Connect()
	want(t, err, "")
	_, err = b.Engine().AddKeys(t.Context(), lane, &wire.AddKeys{Algorithm: record.Ed25519, Policy: "default", Count: 1})
	return err
}

func alive(t *testing.T, done <-chan error, is bool) error {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-done:
		if is {
			t.Errorf("the enclave ended: %v", err)
		}
		return err
	default:
		if !is {
			t.Error("the enclave goes on")
		}
		return nil
	}
}

// A lock that is loosened under a running enclave costs it its keys within
// revalidate_every.
func TestALockThatIsLoosenedEndsTheEnclave(t *testing.T) {
	for _, tc := range locks {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				alter := func(*kms.Lock) {}
				w := newWorld(t, false, &enclavetest.KMS{Alter: func(l *kms.Lock) { alter(l) }})
				ctx, cancel := context.WithCancel(t.Context())
				b, done := w.boots(ctx, t)
				every := config.DefaultKeyPolicy().RevalidateEvery()
				pass(3 * every)
				_ = alive(t, done, true)
				if n := strings.Count(strings.Join(*w.calls, " "), "ReadLock Decrypt"); n != 3 {
					t.Errorf("proved again %d times, want 3: %v", n, *w.calls)
				}
				want(t, addKey(t, b), "")
				if p := b.Progress(); p.Proofs != 4 || p.Proved != 3*every {
					t.Errorf("%d proofs, the last after %v", p.Proofs, p.Proved)
				}
				alter = tc.alter
				pass(every)
				err := alive(t, done, tc.want == "")
				want(t, err, tc.want)
				if tc.want != "" {
					if err := addKey(t, b); err == nil {
						t.Error("the keyring is still there")
					}
				}
				cancel()
				if tc.want == "" {
					want(t, <-done, "")
				}
			})
		})
	}
}

// A pair that is retired ends its enclaves at KMS too, whatever the policy reads like.
func TestADecryptThatIsDeniedEndsTheEnclave(t *testing.T) {
	for _, tc := range []struct {
		op   string
		err  error
		want refusal.Code
	}{
		{"Decrypt", kms.ErrDenied, refusal.KMSDenied},
		{"Decrypt", kms.ErrKey, refusal.KMSDenied},
		{"Decrypt", kms.ErrWrappedKey, refusal.KMSWrongKey},
		{"Decrypt", kms.ErrReply, refusal.KMSReply},
		{"ReadLock", kms.ErrDenied, refusal.KMSDenied},
		{"ReadLock", kms.ErrReply, refusal.KMSReply},
	} {
		t.Run(tc.op+" "+string(tc.want), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fail := func(string) error { return nil }
				w := newWorld(t, false, &enclavetest.KMS{Fail: func(op string) error { return fail(op) }})
				_, done := w.boots(t.Context(), t)
				fail = failAt(tc.op, tc.err)
				pass(config.DefaultKeyPolicy().RevalidateEvery())
				want(t, alive(t, done, false), tc.want)
			})
		})
	}
}

func TestAnEnclaveGoesOnWithoutKMSForTheGraceAndNoLonger(t *testing.T) {
	for _, tc := range []struct {
		op   string
		err  error
		want refusal.Code
	}{
		{"ReadLock", kms.ErrUnreachable, refusal.KMSUnreachable},
		{"ReadLock", kms.ErrThrottled, refusal.KMSThrottled},
		{"ReadLock", kms.ErrCredentials, refusal.KMSCredentials},
		{"ReadLock", kms.ErrTLS, refusal.KMSUnreachable},
		{"Decrypt", kms.ErrUnreachable, refusal.KMSUnreachable},
		{"Decrypt", kms.ErrNSM, refusal.NSMFailed},
	} {
		t.Run(tc.op+" "+string(tc.want), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				grace := config.DefaultKeyPolicy().RevalidateGrace()
				fail := failAt(tc.op, tc.err)
				w := newWorld(t, false, &enclavetest.KMS{Fail: func(op string) error { return fail(op) }})
				away := fail
				fail = func(string) error { return nil }
				_, done := w.boots(t.Context(), t)
				fail = away
				pass(grace - time.Minute)
				_ = alive(t, done, true)
				fail = func(string) error { return nil } // back in time
				pass(2 * time.Minute)
				_ = alive(t, done, true)
				fail = away
				pass(grace - 2*time.Minute)
				_ = alive(t, done, true) // counted from the last proof
				pass(2 * time.Minute)
				want(t, alive(t, done, false), tc.want)
			})
		})
	}
}

func TestAnEndThatIsAskedForIsNoFailedProof(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := make(chan struct{})
		first := true
		client := &enclavetest.KMS{}
		w := newWorld(t, false, client)
		ctx, cancel := context.WithCancel(t.Context())
		client.Fail = func(op string) error {
			if op != "ReadLock" || first {
				first = false
				return nil
			}
			close(asked)
			<-ctx.Done() // the call hangs until the enclave is told to end
			return kms.ErrUnreachable
		}
		_, done := w.boots(ctx, t)
		<-asked
		cancel()
		want(t, <-done, "")
	})
}

func TestABootWithoutAProofIsNotMade(t *testing.T) {
	w := newWorld(t, false, &enclavetest.KMS{})
	w.opt.Prove, w.opt.Logger = nil, slog.New(slog.DiscardHandler)
	if _, err := boot.New(w.opt); err == nil || errors.Is(err, refusal.PolicyLoose) {
		t.Errorf("got %v", err)
	}
}
