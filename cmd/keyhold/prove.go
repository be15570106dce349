package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/signclient"
)

const nonceLen = 32 // bytes

// wanted is what an enclave must prove to be.
type wanted struct {
	root   attestation.Root
	images []attestation.Image // with PCR16
	raw    []byte              // the config
	config *config.Config      // nil where any is wanted; attest alone may ask for that
}

func readWanted(o *cli.AttestOptions, warn io.Writer) (w wanted, err error) {
	if w.images, _, err = o.Pairs(); err != nil {
		return w, err
	}
	if w.raw, w.config, err = o.ReadConfig(); err != nil {
		return w, err
	}
	w.root, err = o.Root(warn)
	return w, err
}

// proof is what an enclave showed.
type proof struct {
	nonce     []byte
	document  attestation.Document // of the challenge
	at        time.Time            // when it was asked for, by our clock
	heads     *receipt.Heads
	statement *receipt.Statement // nil: no keyring is open yet
}

// errBoot says that two answers are not of one boot.
var errBoot = errors.New("the answers are not those of one boot")

// challenge lets the enclave show with a fresh nonce that it is there now and is
// a wanted image with the wanted config; that the heads of its lanes are signed
// with the receipt key that the document names; and that its boot statement is
// of the same key. Document is that of a refused proof too, for the error's text.
func challenge(ctx context.Context, c *signclient.Client, w *wanted) (p proof, document []byte, err error) {
	nonce := make([]byte, nonceLen)
	if _, err := rand.Read(nonce); err != nil {
		return p, nil, fmt.Errorf("draw a nonce: %w", err)
	}
	reply, err := c.Attest(ctx, &wire.Attest{Nonce: nonce})
	if err != nil {
		return p, nil, err
	}
	p.nonce, p.at = nonce, time.Now()
	live, err := attestation.VerifyLive(reply.Document, attestation.LivePolicy{Root: w.root, Images: w.images, Nonce: nonce, Now: p.at})
	if err == nil {
		p.document, err = live.Document()
	}
	if err != nil {
		return p, reply.Document, failed("challenge", err)
	}
	public := ed25519.PublicKey(p.document.PublicKey)
	//nolint:forbidigo // signed and public
	if !bytes.Equal(p.document.UserData, receipt.UserData(receipt.KindChallenge, nil)) || receipt.BootIDOf(public) != c.BootID() {
		return p, reply.Document, failed("challenge", errBoot)
	}
	if p.heads, err = receipt.OpenHeads(public, nonce, reply.Heads); err != nil {
		return p, reply.Document, failed("heads of the lanes", err)
	}
	if h := c.Hello(); len(h.Document) > 0 {
		if p.statement, err = w.checkBoot(h.Document, h.Statement, public); err != nil {
			return p, reply.Document, failed("boot statement", err)
		}
	}
	return p, reply.Document, nil
}

// checkBoot verifies a boot document and its statement, and that they are of the
// receipt key that the challenge showed.
func (w *wanted) checkBoot(document, statement []byte, public ed25519.PublicKey) (*receipt.Statement, error) {
	rec, err := attestation.VerifyRecorded(document, attestation.RecordedPolicy{Root: w.root, Images: w.images})
	if err != nil {
		return nil, err
	}
	doc, err := rec.Document()
	if err != nil {
		return nil, err
	}
	s, err := receipt.CheckStatement(statement, doc.PublicKey, doc.UserData)
	if err != nil {
		return nil, err
	}
	if !public.Equal(ed25519.PublicKey(doc.PublicKey)) {
		return nil, errBoot
	}
	if w.config == nil {
		return s, nil
	}
	if s.ConfigHash != config.Hash(w.raw) || s.KMSKeyARN != w.config.KMSKeyARN || s.Keyring != w.config.Keyring {
		return nil, errors.New("it is of another config or keyring")
	}
	return s, nil
}

func failed(what string, err error) error {
	return fmt.Errorf("%s: %w (%w)", what, err, refusal.AttestFailed)
}

// connect opens a connection to the enclave. Its errors say which and what to do.
func connect(ctx context.Context, o *cli.EnclaveOptions) (*signclient.Client, error) {
	dial, err := o.Dialer()
	if err != nil {
		return nil, err
	}
	c, err := signclient.Connect(ctx, dial, signclient.Options{})
	if err != nil {
		return nil, fmt.Errorf("enclave at %s: %w; check that it runs and that --enclave is its address", o.Address, err)
	}
	return c, nil
}
