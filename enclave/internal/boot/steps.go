package boot

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/enclave/internal/keyring"
	"github.com/keyhold/keyhold/enclave/internal/kms"
	"github.com/keyhold/keyhold/enclave/internal/secret"
	"github.com/keyhold/keyhold/enclave/internal/sign"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/keypolicy"
)

const configPCR = 16

// startClock takes the NSM's time out of a document that never leaves this
// process, and carries it on.
func startClock(session nsm.Session, mono func() time.Duration) (sign.Clock, error) {
	doc, err := session.Attest(nsm.AttestRequest{UserData: receipt.UserData(receipt.KindChallenge, nil)})
	if err != nil {
		return sign.Clock{}, fmt.Errorf("ask the NSM for the time: %w", err)
	}
	at, err := nsm.Timestamp(doc)
	if err != nil {
		return sign.Clock{}, fmt.Errorf("ask the NSM for the time: %w", err)
	}
	start := mono()
	since := func() time.Duration { return mono() - start }
	return sign.Clock{Mono: since, Wall: func() time.Time { return at.Add(since()) }}, nil
}

// measure extends PCR16 with raw and locks it. Only zeros that nobody extended
// or locked before give a value that means this config and nothing else.
func measure(session nsm.Session, raw []byte) error {
	value, locked, err := session.DescribePCR(configPCR)
	if err != nil {
		return fmt.Errorf("describe PCR16: %w", err)
	}
	if locked || len(value) != nsm.PCRSize || [nsm.PCRSize]byte(value) != [nsm.PCRSize]byte{} {
		return errors.New("PCR16 is locked or not zero")
	}
	m := config.Measurement(raw)
	value, err = session.ExtendPCR(configPCR, m[:])
	if err != nil {
		return fmt.Errorf("extend PCR16: %w", err)
	}
	if len(value) != nsm.PCRSize || [nsm.PCRSize]byte(value) != config.PCR16(raw) {
		return errors.New("PCR16 did not take the measurement")
	}
	if err := session.LockPCRs(configPCR + 1); err != nil {
		return fmt.Errorf("lock PCRs: %w", err)
	}
	value, locked, err = session.DescribePCR(configPCR)
	if err != nil {
		return fmt.Errorf("describe PCR16: %w", err)
	}
	if !locked || len(value) != nsm.PCRSize || [nsm.PCRSize]byte(value) != config.PCR16(raw) {
		return errors.New("PCR16 is not locked with the measurement")
	}
	return nil
}

// refuseDebug keeps every KMS call from an enclave whose memory can be read.
func refuseDebug(session nsm.Session) error {
	value, locked, err := session.DescribePCR(0)
	if err != nil {
		return fmt.Errorf("describe PCR0: %w", errors.Join(refusal.NSMFailed, err))
	}
	if !locked || len(value) != nsm.PCRSize {
		return fmt.Errorf("describe PCR0: %w", refusal.NSMFailed)
	}
	if [nsm.PCRSize]byte(value) == [nsm.PCRSize]byte{} {
		return refusal.DebugEnclave
	}
	return nil
}

// createKeyring makes a data key and an empty keyring under it. The wrapped key
// is opened again and compared before anything can be sealed: a key that KMS
// cannot give back must never hold anything.
func createKeyring(ctx context.Context, session nsm.Session, client KMS, cfg *config.Config, prove prover) (*opened, error) {
	if len(cfg.Create) == 0 {
		return nil, refusal.CreateDenied
	}
	if err := refuseDebug(session); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, kmsTimeout)
	defer cancel()
	lock, err := prove(ctx)
	if err != nil {
		return nil, err
	}
	encCtx := sealed.EncryptionContext(cfg.Keyring, cfg.SealEpoch)
	wrapped, dek, err := client.GenerateDataKey(ctx, encCtx)
	if err != nil {
		return nil, fmt.Errorf("generate data key: %w", kmsRefusal(err))
	}
	again, err := client.Decrypt(ctx, wrapped, encCtx)
	if err != nil {
		dek.Destroy()
		return nil, fmt.Errorf("decrypt new data key: %w", kmsRefusal(err))
	}
	defer again.Destroy()
	if !dek.Equal(again) {
		dek.Destroy()
		return nil, fmt.Errorf("decrypt new data key: %w", refusal.KMSReply)
	}
	h := &sealed.Header{
		Version: 1, Keyring: cfg.Keyring, Epoch: cfg.SealEpoch, KMSKeyARN: cfg.KMSKeyARN, WrappedDEK: wrapped,
	}
	return newRing(cfg, h, dek, lock)
}

// openKeyring checks a header against the measured config before it asks KMS.
func openKeyring(ctx context.Context, session nsm.Session, client KMS, cfg *config.Config, raw []byte, prove prover) (*opened, error) {
	h, err := sealed.DecodeHeader(raw)
	if err != nil || h.Keyring != cfg.Keyring || h.KMSKeyARN != cfg.KMSKeyARN {
		return nil, refusal.KeyringInvalid
	}
	if !slices.Contains(cfg.Epochs, h.Epoch) {
		return nil, refusal.EpochClosed
	}
	if err := refuseDebug(session); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, kmsTimeout)
	defer cancel()
	lock, err := prove(ctx)
	if err != nil {
		return nil, err
	}
	dek, err := client.Decrypt(ctx, h.WrappedDEK, sealed.EncryptionContext(h.Keyring, h.Epoch))
	if err != nil {
		return nil, fmt.Errorf("decrypt data key: %w", kmsRefusal(err))
	}
	return newRing(cfg, h, dek, lock)
}

// prover is Boot.proveLock of one boot.
type prover func(context.Context) (*keypolicy.Result, error)

// opened is a keyring, and the lock that its data key was behind.
type opened struct {
	header *sealed.Header
	ring   *keyring.Ring
	lock   *keypolicy.Result
}

// newRing hands dek over to the keyring, which destroys it.
func newRing(cfg *config.Config, h *sealed.Header, dek *secret.Bytes, lock *keypolicy.Result) (*opened, error) {
	ring, err := keyring.New(cfg, h, dek)
	if err != nil {
		return nil, err
	}
	return &opened{header: h, ring: ring, lock: lock}, nil
}

// kmsCodes are the refusals that stand for the KMS client's codes.
//
//nolint:gochecknoglobals // a table that is never written
var kmsCodes = map[kms.Code]refusal.Code{
	kms.CodeDebugEnclave: refusal.DebugEnclave,
	kms.CodeNSM:          refusal.NSMFailed,
	kms.CodeCredentials:  refusal.KMSCredentials,
	kms.CodeDenied:       refusal.KMSDenied,
	kms.CodeKey:          refusal.KMSDenied,
	kms.CodeWrappedKey:   refusal.KMSWrongKey,
	kms.CodeThrottled:    refusal.KMSThrottled,
	kms.CodeUnreachable:  refusal.KMSUnreachable,
	kms.CodeTLS:          refusal.KMSUnreachable,
	kms.CodeReply:        refusal.KMSReply,
	kms.CodeUnknown:      refusal.KMSReply,
}

// kmsRefusal gives an error of the KMS client its code.
func kmsRefusal(err error) error {
	var e *kms.Error
	if errors.As(err, &e) {
		if code, ok := kmsCodes[e.Code]; ok {
			return fmt.Errorf("%w: %w", code, err)
		}
	}
	return err
}
