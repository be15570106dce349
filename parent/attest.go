package parent

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/signclient"
)

const nonceLen = 32 // bytes; wire.MaxNonce is 64

// errMismatch says that a verified boot is not one of this deployment.
var errMismatch = errors.New("verified, but of another config or keyring")

// attestor knows what an enclave must prove.
type attestor struct {
	root       attestation.Root
	images     []attestation.Image
	configHash [32]byte
	config     *config.Config
}

func newAttestor(c Config, parsed *config.Config) *attestor {
	a := &attestor{root: c.Root, configHash: config.Hash(c.EnclaveConfig), config: parsed}
	pcr16 := config.PCR16(c.EnclaveConfig)
	for _, img := range c.Images {
		pcrs := maps.Clone(img.PCRs)
		if pcrs == nil {
			pcrs = map[int][]byte{}
		}
		pcrs[configPCR] = pcr16[:]
		a.images = append(a.images, attestation.Image{PCRs: pcrs})
	}
	return a
}

// boot is a verified boot of an enclave.
type boot struct {
	id     record.BootID
	public ed25519.PublicKey // the receipt key
}

// checkBoot verifies a boot document with its statement, and that they are those
// of this connection, this config and this keyring.
func (a *attestor) checkBoot(id record.BootID, document, statement []byte, header *sealed.Header) (boot, error) {
	rec, err := attestation.VerifyRecorded(document, attestation.RecordedPolicy{Root: a.root, Images: a.images})
	if err != nil {
		return boot{}, fmt.Errorf("boot document: %w: %w", refusal.AttestFailed, err)
	}
	doc, err := rec.Document()
	if err != nil {
		return boot{}, fmt.Errorf("boot document: %w: %w", refusal.AttestFailed, err)
	}
	s, err := receipt.CheckStatement(statement, doc.PublicKey, doc.UserData)
	if err != nil {
		return boot{}, fmt.Errorf("boot statement: %w: %w", refusal.AttestFailed, err)
	}
	if s.BootID != id || s.ConfigHash != a.configHash || s.KMSKeyARN != a.config.KMSKeyARN ||
		s.Keyring != header.Keyring || s.Epoch != header.Epoch || s.Fingerprint != header.Fingerprint() {
		return boot{}, fmt.Errorf("boot statement: %w: %w", refusal.AttestFailed, errMismatch)
	}
	return boot{id: id, public: slices.Clone(doc.PublicKey)}, nil
}

// challenge lets an enclave show that it is there now, is a wanted image, and
// holds the receipt key of b.
func (p *process) challenge(ctx context.Context, c *signclient.Client, b boot) error {
	nonce := make([]byte, nonceLen)
	if err := p.read(nonce); err != nil {
		return err
	}
	reply, err := c.Attest(ctx, &wire.Attest{Nonce: nonce})
	if err != nil {
		return err
	}
	live, err := attestation.VerifyLive(reply.Document, attestation.LivePolicy{
		Root: p.want.root, Images: p.want.images, Nonce: nonce, Now: p.cfg.Now(),
	})
	if err != nil {
		return fmt.Errorf("challenge: %w: %w", refusal.AttestFailed, err)
	}
	doc, err := live.Document()
	if err != nil {
		return fmt.Errorf("challenge: %w: %w", refusal.AttestFailed, err)
	}
	//nolint:forbidigo // signed and public
	if !bytes.Equal(doc.PublicKey, b.public) || !bytes.Equal(doc.UserData, receipt.UserData(receipt.KindChallenge, nil)) {
		return fmt.Errorf("challenge: %w: %w", refusal.AttestFailed, errMismatch)
	}
	if _, err := receipt.OpenHeads(b.public, nonce, reply.Heads); err != nil {
		return fmt.Errorf("challenge: %w: %w", refusal.AttestFailed, err)
	}
	return nil
}
