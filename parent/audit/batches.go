package audit

import (
	"errors"
	"fmt"

	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/payload"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/parent/export"
)

// batch verifies one batch and reports whether it is sound.
func (a *auditor) batch(it *export.Item) bool {
	signed, refused, verified, err := signatures(it)
	if err == nil && a.o.Receipts && it.Batch.State == record.Signed {
		err = a.proof(it)
	}
	if err != nil {
		a.problem("batch %s: %v", it.Batch.ID, err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.seen[it.Batch.ID]; c != nil {
		c.shown = true
	}
	a.r.Batches++
	a.r.Records += it.Batch.Count
	a.r.Signed += signed
	a.r.Refused += refused
	a.r.Open += it.Batch.Count - signed - refused
	a.r.Verified += verified
	if err == nil && a.o.Receipts {
		a.r.Proved += verified
	}
	if a.o.Progress != nil {
		a.o.Progress(a.r.Records)
	}
	return err == nil
}

// signatures verifies every signature of a SIGNED batch.
func signatures(it *export.Item) (signed, refused, verified int, err error) {
	if it.Problem != nil {
		return 0, 0, 0, it.Problem
	}
	b := &it.Batch
	if err := standing(it); err != nil {
		return 0, 0, 0, err
	}
	if root := receipt.PayloadRoot(b.Kind, it.Records); root != b.PayloadRoot {
		return 0, 0, 0, errors.New("the payload is not the one that was imported")
	}
	if b.State != record.Signed {
		return 0, 0, 0, nil
	}
	for i, o := range it.Outcomes {
		if o.Refusal != "" {
			if _, known := refusal.Lookup(refusal.Code(o.Refusal)); !known {
				err = fmt.Errorf("record %d: refused for no known reason", i)
			}
			refused++
			continue
		}
		signed++
		if e := payload.Verify(it.Key.Algorithm, it.Key.PublicKey, b.Kind, it.Records[i].Payload, o.Signature); e != nil {
			err = fmt.Errorf("record %d: %w", i, e)
			continue
		}
		verified++
	}
	if err == nil && refused != b.Refused {
		err = fmt.Errorf("says that %d records were refused, but %d are", b.Refused, refused)
	}
	return signed, refused, verified, err
}

// standing checks what a batch must be in every state: it has a known one, and
// no two records of one id, of which only one could be meant.
func standing(it *export.Item) error {
	switch it.Batch.State {
	case record.Ready, record.Claimed, record.Signed, record.Quarantined:
	case record.Refused:
		return errors.New("its state is one of records only")
	default:
		return errors.New("its state is unknown")
	}
	ids := make(map[string]struct{}, len(it.Records))
	for i, r := range it.Records {
		if _, twice := ids[r.ID]; twice && r.ID != "" {
			return fmt.Errorf("record %d: its id stands twice in the batch", i)
		}
		ids[r.ID] = struct{}{}
	}
	return nil
}

// proof checks a signed batch against its receipt.
func (a *auditor) proof(it *export.Item) error {
	b := &it.Batch
	if b.Receipt.Seq == 0 {
		if b.Refused != b.Count {
			return errors.New("signed without a receipt")
		}
		return nil
	}
	boot, ok := a.boots[b.Receipt.BootID]
	if !ok || boot.public == nil {
		return fmt.Errorf("its boot %s is not there or does not verify", b.Receipt.BootID)
	}
	r, err := receipt.OpenReceipt(boot.public, it.Receipt)
	if err != nil {
		return fmt.Errorf("its receipt: %w", err)
	}
	if err := aboutBatch(r, it, boot.statement); err != nil {
		return err
	}
	if boot.config != nil {
		if err := permitted(r, it, boot.config); err != nil {
			return err
		}
	}
	switch {
	case int(r.Count) != b.Count || r.PayloadRoot != b.PayloadRoot:
		return errors.New("its receipt is for another payload")
	case r.ResultRoot != receipt.ResultRoot(it.Outcomes):
		return errors.New("its result is not the one that the enclave gave")
	}
	return nil
}

// permitted checks the policy that signed against the measured config.
func permitted(r *receipt.Receipt, it *export.Item, c *config.Config) error {
	p, ok := c.Policy(it.Key.Policy)
	switch {
	case !ok:
		return errors.New("its key's policy is not in the config")
	case r.PolicyHash != p.Hash():
		return errors.New("its receipt names another policy than its key")
	case !p.Permits(it.Batch.Kind):
		return errors.New("its key's policy does not permit its kind")
	}
	return nil
}

// aboutBatch checks that a verified receipt stands where the batch says, and
// names its batch, claim and key.
func aboutBatch(r *receipt.Receipt, it *export.Item, s *receipt.Statement) error {
	b := &it.Batch
	switch {
	case r.Lane != b.Receipt.Lane || r.Seq != b.Receipt.Seq:
		return errors.New("its receipt stands at another place of the lane")
	case r.Subject != receipt.SubjectBatch || r.BatchID != b.ID || r.ImportID != b.ImportID:
		return errors.New("its receipt is about something else")
	case r.KeyID != b.KeyID || r.BatchFence != b.Fence || r.KeyFence != b.KeyFence:
		return errors.New("its receipt names another key or fence")
	case r.BootID != b.BootID:
		return errors.New("its receipt is of another boot than its claim")
	}
	return aboutKey(r, it.Key, s)
}

// aboutKey checks that the stored key, nil where it is lost, is the one that the
// receipt names, and of the boot's keyring.
func aboutKey(r *receipt.Receipt, k *sealed.Public, s *receipt.Statement) error {
	switch {
	case k == nil || r.Algorithm != k.Algorithm || string(r.PublicKey) != string(k.PublicKey):
		return errors.New("its receipt names another public key")
	case k.Fingerprint != s.Fingerprint || k.Keyring != s.Keyring || k.Epoch != s.Epoch:
		return errors.New("its key is of another keyring than the boot")
	}
	return nil
}
