package attestation_test

import (
	"bytes"
	"crypto/x509"
	"errors"
	"testing"
	"time"

	"github.com/keyhold/keyhold/attestation"
)

func value(fill byte) []byte { return bytes.Repeat([]byte{fill}, 48) }

func TestUnusablePoliciesAreRefusedBeforeTheDocumentIsRead(t *testing.T) {
	f := newForger(t)
	images := func(images ...attestation.Image) func(*attestation.LivePolicy) {
		return func(p *attestation.LivePolicy) { p.Images = images }
	}
	pcrs := func(pcrs map[int][]byte) func(*attestation.LivePolicy) {
		return images(f.images()[0], attestation.Image{PCRs: pcrs})
	}
	for _, tc := range []struct {
		name string
		edit func(*attestation.LivePolicy)
		want *attestation.Error
	}{
		{"the zero policy", func(p *attestation.LivePolicy) { *p = attestation.LivePolicy{} }, attestation.ErrPolicyRoot},
		{"the zero root", func(p *attestation.LivePolicy) { p.Root = attestation.Root{} }, attestation.ErrPolicyRoot},
		{"a test root of no certificate", func(p *attestation.LivePolicy) { p.Root = attestation.TestRoot(nil) }, attestation.ErrPolicyRoot},
		{"a test root without bytes", func(p *attestation.LivePolicy) { p.Root = attestation.TestRoot(&x509.Certificate{}) }, attestation.ErrPolicyRoot},
		{"no image", images(), attestation.ErrPolicyImage},
		{"an image that names nothing", images(attestation.Image{}), attestation.ErrPolicyImage},
		{"a second image without PCR0", pcrs(map[int][]byte{16: value(7)}), attestation.ErrPolicyImage},
		{"a zero PCR0", pcrs(map[int][]byte{0: value(0)}), attestation.ErrPolicyImage},
		{"a zero PCR2", pcrs(map[int][]byte{0: value(7), 2: value(0)}), attestation.ErrPolicyImage},
		{"a PCR0 of 32 bytes", pcrs(map[int][]byte{0: value(7)[:32]}), attestation.ErrPolicyImage},
		{"an empty PCR16", pcrs(map[int][]byte{0: value(7), 16: nil}), attestation.ErrPolicyImage},
		{"PCR32", pcrs(map[int][]byte{0: value(7), 32: value(7)}), attestation.ErrPolicyImage},
		{"a negative register", pcrs(map[int][]byte{0: value(7), -1: value(7)}), attestation.ErrPolicyImage},
		{"no nonce", func(p *attestation.LivePolicy) { p.Nonce = nil }, attestation.ErrPolicyNonce},
		{"a nonce of 15 bytes", func(p *attestation.LivePolicy) { p.Nonce = p.Nonce[:15] }, attestation.ErrPolicyNonce},
		{"a nonce of 1025 bytes", func(p *attestation.LivePolicy) { p.Nonce = make([]byte, 1025) }, attestation.ErrPolicyNonce},
		{"no time", func(p *attestation.LivePolicy) { p.Now = time.Time{} }, attestation.ErrPolicyTime},
		{"a negative age", func(p *attestation.LivePolicy) { p.MaxAge = -1 }, attestation.ErrPolicyTime},
		{"a negative skew", func(p *attestation.LivePolicy) { p.Skew = -1 }, attestation.ErrPolicyTime},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := f.live()
			tc.edit(&p)
			_, err := attestation.VerifyLive([]byte("never read"), p)
			check(t, "VerifyLive", err, tc.want)
			if errors.Is(tc.want, attestation.ErrPolicyNonce) || errors.Is(tc.want, attestation.ErrPolicyTime) {
				return // a recorded policy has neither
			}
			_, err = attestation.VerifyRecorded([]byte("never read"), attestation.RecordedPolicy{Root: p.Root, Images: p.Images})
			check(t, "VerifyRecorded", err, tc.want)
		})
	}
}

func TestAnyOneImageMustMatchWithAllItsRegisters(t *testing.T) {
	f := newForger(t)
	regs := edited(edited(registers(17, 48, 7), 16, value(16)), 8, value(8))
	withConfig := f.document(f.with("pcrs", regs))
	withoutConfig := f.document(f.fields())
	pair := func(pcr0, pcr16 byte) attestation.Image {
		return attestation.Image{PCRs: map[int][]byte{0: value(pcr0), 16: value(pcr16)}}
	}
	for _, tc := range []struct {
		name   string
		raw    []byte
		images []attestation.Image
		want   *attestation.Error
	}{
		{"the pair", withConfig, []attestation.Image{pair(7, 16)}, nil},
		{"the second pair", withConfig, []attestation.Image{pair(1, 2), pair(7, 16)}, nil},
		{"the first pair", withConfig, []attestation.Image{pair(7, 16), pair(1, 2)}, nil},
		{"five registers", withConfig, []attestation.Image{{PCRs: map[int][]byte{0: value(7), 1: value(7), 2: value(7), 8: value(8), 16: value(16)}}}, nil},
		{"a zero register above PCR2", f.document(f.with("pcrs", edited(regs, 4, value(0)))), []attestation.Image{{PCRs: map[int][]byte{0: value(7), 4: value(0)}}}, nil},
		{"another image", withConfig, []attestation.Image{pair(1, 16)}, attestation.ErrPCRMismatch},
		{"another config", withConfig, []attestation.Image{pair(7, 1)}, attestation.ErrPCRMismatch},
		{"halves of two pairs", withConfig, []attestation.Image{pair(7, 1), pair(1, 16)}, attestation.ErrPCRMismatch},
		{"a register that is not locked", withoutConfig, []attestation.Image{pair(7, 16)}, attestation.ErrPCRMismatch},
		{"a wanted zero for a register that is not locked", withoutConfig, []attestation.Image{pair(7, 0)}, attestation.ErrPCRMismatch},
	} {
		t.Run(tc.name, func(t *testing.T) {
			live := f.live()
			live.Images = tc.images
			_, errLive := attestation.VerifyLive(tc.raw, live)
			_, errRecorded := attestation.VerifyRecorded(tc.raw, attestation.RecordedPolicy{Root: f.trusted(), Images: tc.images})
			if tc.want == nil {
				if errLive != nil || errRecorded != nil {
					t.Errorf("live: %v, recorded: %v", errLive, errRecorded)
				}
				return
			}
			check(t, "VerifyLive", errLive, tc.want)
			check(t, "VerifyRecorded", errRecorded, tc.want)
		})
	}
}

func TestDebugEnclavesAreRefused(t *testing.T) {
	f := newForger(t)
	for name, regs := range map[string]map[uint64][]byte{
		"all zero":       registers(16, 48, 0),
		"only PCR0 zero": edited(registers(16, 48, 7), 0, value(0)),
		"only PCR1 zero": edited(registers(16, 48, 7), 1, value(0)),
		"only PCR2 zero": edited(registers(16, 48, 7), 2, value(0)),
	} {
		raw := f.document(f.with("pcrs", regs))
		_, err := attestation.VerifyLive(raw, f.live())
		check(t, name+", live", err, attestation.ErrDebug)
		_, err = attestation.VerifyRecorded(raw, f.recorded())
		check(t, name+", recorded", err, attestation.ErrDebug)
	}
}

func TestLiveDocumentMustBeForTheNonceAndAboutNow(t *testing.T) {
	f := newForger(t)
	at := func(d time.Duration) []byte {
		return f.document(f.with("timestamp", uint64(f.now.Add(d).UnixMilli())))
	}
	nonce := func(v any) []byte { return f.document(f.with("nonce", v)) }
	for _, tc := range []struct {
		name         string
		raw          []byte
		maxAge, skew time.Duration
		want         *attestation.Error
	}{
		{"no nonce", nonce(nil), 0, 0, attestation.ErrNonce},
		{"an empty nonce", nonce([]byte{}), 0, 0, attestation.ErrNonce},
		{"another nonce", nonce([]byte("0123456789abcdef0123456789abcdeF")), 0, 0, attestation.ErrNonce},
		{"the beginning of the nonce", nonce([]byte(forgedNonce)[:31]), 0, 0, attestation.ErrNonce},
		{"the nonce and more", nonce([]byte(forgedNonce + "0")), 0, 0, attestation.ErrNonce},
		{"as old as permitted", at(-5 * time.Minute), 0, 0, nil},
		{"a millisecond too old", at(-5*time.Minute - time.Millisecond), 0, 0, attestation.ErrStale},
		{"as far ahead as permitted", at(time.Minute), 0, 0, nil},
		{"a millisecond too far ahead", at(time.Minute + time.Millisecond), 0, 0, attestation.ErrFuture},
		{"older than a limit of 10 s", at(-11 * time.Second), 10 * time.Second, 0, attestation.ErrStale},
		{"further ahead than a limit of 1 s", at(2 * time.Second), 0, time.Second, attestation.ErrFuture},
		{"within limits of an hour", at(-59 * time.Minute), time.Hour, 0, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := f.live()
			p.MaxAge, p.Skew = tc.maxAge, tc.skew
			_, err := attestation.VerifyLive(tc.raw, p)
			if tc.want == nil {
				if err != nil {
					t.Error(err)
				}
				return
			}
			check(t, "VerifyLive", err, tc.want)
		})
	}
}

func TestRevokedCertificatesAreRefused(t *testing.T) {
	f := newForger(t)
	raw := f.document(f.fields())
	for name, revoked := range map[string]entity{"root": f.root, "intermediate": f.zone, "leaf": f.leaf} {
		is := func(c *x509.Certificate) bool { return c.Equal(revoked.cert) }
		live, recorded := f.live(), f.recorded()
		live.Revoked, recorded.Revoked = is, is
		_, err := attestation.VerifyLive(raw, live)
		check(t, name+", live", err, attestation.ErrRevoked)
		_, err = attestation.VerifyRecorded(raw, recorded)
		check(t, name+", recorded", err, attestation.ErrRevoked)
	}
}

func TestZeroResultsFailInEveryAccessor(t *testing.T) {
	_, err := attestation.Live{}.Document()
	check(t, "Live", err, attestation.ErrUnverified)
	_, err = attestation.Recorded{}.Document()
	check(t, "Recorded", err, attestation.ErrUnverified)
}

func TestOtherErrorsHaveNoCode(t *testing.T) {
	for _, err := range []error{nil, errors.New("other")} {
		if got := attestation.Code(err); got != "" {
			t.Errorf("Code(%v) = %q", err, got)
		}
	}
}
