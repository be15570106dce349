package boot

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/keypolicy"
)

// retryProof is how soon a proof is tried again that failed without an answer.
const retryProof = time.Minute

// proveLock reads policy, metadata and grants of the key from KMS itself, and
// refuses a key that could come out to anybody but attested enclaves of at most
// two pairs of image and config, this one's among them.
func (b *Boot) proveLock(ctx context.Context, client KMS, cfg *config.Config) (*keypolicy.Result, error) {
	mine, err := ownPair(b.opt.NSM)
	if err != nil {
		return nil, err
	}
	lock, err := client.ReadLock(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the key policy: %w", kmsRefusal(err))
	}
	if err := keypolicy.CheckKey(lock.Key, cfg.KMSKeyARN); err != nil {
		return nil, fmt.Errorf("check the key: %w: %w", refusal.KMSKeyUnfit, err)
	}
	proof, err := b.opt.Prove(lock.Policy, keypolicy.Expectation{
		Account: accountOf(cfg.KMSKeyARN), Mine: mine, Mode: cfg.KeyPolicy.Mode,
	})
	switch {
	case errors.Is(err, keypolicy.ErrNotAdmitted):
		return nil, fmt.Errorf("prove the key policy: %w: %w", refusal.PolicyForeign, err)
	case errors.Is(err, keypolicy.ErrLoose):
		return nil, fmt.Errorf("prove the key policy: %w: %w", refusal.PolicyLoose, err)
	case err != nil:
		return nil, fmt.Errorf("prove the key policy: %w: %w", refusal.PolicyUnread, err)
	}
	b.proved()
	b.opt.Logger.InfoContext(ctx, "key policy proved", slog.String("mode", string(proof.Mode)), slog.Int("pairs", len(proof.Pairs)))
	return &proof, nil
}

// ownPair is what KMS will find in the documents of this enclave.
func ownPair(session nsm.Session) (*keypolicy.Pair, error) {
	var pair keypolicy.Pair
	for register, into := range map[uint16]*keypolicy.PCR{0: &pair.PCR0, configPCR: &pair.PCR16} {
		value, locked, err := session.DescribePCR(register)
		if err != nil || !locked || len(value) != nsm.PCRSize {
			return nil, fmt.Errorf("describe PCR%d: %w", register, errors.Join(refusal.NSMFailed, err))
		}
		*into = keypolicy.PCR(value)
	}
	return &pair, nil
}

// accountOf is the fifth field of an ARN that config.Parse has checked.
func accountOf(arn string) string { return strings.Split(arn, ":")[4] }

// pairsOf are the pairs of a proof as a boot statement has them.
func pairsOf(proof *keypolicy.Result) []receipt.Pair {
	out := make([]receipt.Pair, 0, len(proof.Pairs))
	for _, p := range proof.Pairs {
		out = append(out, receipt.Pair{PCR0: p.PCR0, PCR16: p.PCR16})
	}
	return out
}

// revalidate repeats the proof and an attested Decrypt for as long as the
// keyring is open. It returns an error once KMS or the proof refused, or neither
// could be asked for longer than the measured grace: then the keyring must go. An
// attempt is not cut short by the grace, so it may outlive it by kmsTimeout.
func (b *Boot) revalidate(ctx context.Context, client KMS, cfg *config.Config, header *sealed.Header) error {
	proved := b.opt.Mono()
	wait := cfg.KeyPolicy.RevalidateEvery()
	for {
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
		err := b.proveAgain(ctx, client, cfg, header)
		if err == nil {
			proved, wait = b.opt.Mono(), cfg.KeyPolicy.RevalidateEvery()
			continue
		}
		switch entry, _ := refusal.Lookup(refusal.Of(err)); {
		case ctx.Err() != nil:
			return nil //nolint:nilerr // it was told to end
		case entry.Class == refusal.Refuse:
			return fmt.Errorf("prove the key policy again: %w", err)
		case b.opt.Mono()-proved >= cfg.KeyPolicy.RevalidateGrace():
			return fmt.Errorf("prove the key policy again: not for %d s: %w", cfg.KeyPolicy.RevalidateGraceS, err)
		default:
			wait = min(retryProof, cfg.KeyPolicy.RevalidateEvery())
			b.opt.Logger.WarnContext(ctx, "key policy not proved again, which will be tried", slog.String("code", string(refusal.Of(err))))
		}
	}
}

// proveAgain succeeds only where this enclave would be let in anew.
func (b *Boot) proveAgain(ctx context.Context, client KMS, cfg *config.Config, header *sealed.Header) error {
	ctx, cancel := context.WithTimeout(ctx, kmsTimeout)
	defer cancel()
	if _, err := b.proveLock(ctx, client, cfg); err != nil {
		return err
	}
	dek, err := client.Decrypt(ctx, header.WrappedDEK, sealed.EncryptionContext(header.Keyring, header.Epoch))
	if err != nil {
		return fmt.Errorf("decrypt data key: %w", kmsRefusal(err))
	}
	dek.Destroy()
	return nil
}
