package vmtest_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/audit"
	"github.com/keyhold/keyhold/parent/intake"
	"github.com/keyhold/keyhold/parent/provision"
	"github.com/keyhold/keyhold/parent/signclient"
	"github.com/keyhold/keyhold/parent/store"
)

const (
	keys        = 20
	batchSize   = 250
	payloadSize = 100 // bytes of a record
)

// notYet: the enclave does not listen, or the parent has not configured it so far.
func notYet(err error) bool {
	return errors.Is(err, signclient.ErrLost) || errors.Is(err, refusal.NotConfigured)
}

// provision makes the keyring and its keys.
func (s *site) provision(w ways, raw []byte) {
	s.t.Helper()
	cfg, err := config.Parse(raw)
	if err != nil {
		s.t.Fatal(err)
	}
	s.eventually("make the keys", notYet, func(ctx context.Context) error {
		c, err := signclient.Connect(ctx, w.dial, signclient.Options{Logger: s.log})
		if err != nil {
			return errors.Join(signclient.ErrLost, err) // it does not listen yet
		}
		defer c.Close()
		_, err = provision.Run(ctx, c, s.store, cfg, provision.Options{
			Algorithm: record.Secp256k1, Policy: policyName, Pool: poolName, Count: keys,
		})
		return err
	})
}

// submit makes n random records and puts them into the queue.
func (s *site) submit(id record.ImportID, n int, seed uint64) {
	s.t.Helper()
	r, w := io.Pipe()
	go func() { _ = w.CloseWithError(intake.Generate(w, n, payloadSize, seed, false)) }() // intake.Run has the error
	_, err := intake.Run(s.t.Context(), s.store, r, intake.Options{
		ImportID: id, Pool: poolName, Kind: record.Message, BatchSize: batchSize,
		SigLen: record.Secp256k1.SignatureLen(), SpoolDir: s.t.TempDir(), Now: time.Now,
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// left is how many batches are not signed.
func (s *site) left(ctx context.Context) (n int) {
	s.t.Helper()
	for shard := range store.ReadyShards {
		k, err := s.store.CountReady(ctx, shard)
		if err != nil {
			s.t.Fatal(err)
		}
		n += k
	}
	return n
}

// awaitLeft waits until at most n batches are not signed.
func (s *site) awaitLeft(n int) {
	s.t.Helper()
	s.eventually("sign", always, func(ctx context.Context) error {
		if left := s.left(ctx); left > n {
			return fmt.Errorf("%d batches are left", left)
		}
		return nil
	})
}

// signed submits n records and returns how many were signed in a second.
func (s *site) signed(id record.ImportID, n int, seed uint64) float64 {
	s.t.Helper()
	s.submit(id, n, seed)
	began := time.Now()
	s.awaitLeft(0)
	return float64(n) / time.Since(began).Seconds()
}

// audit verifies all signatures and receipts, and the boots up to the authority of
// the stand-in for the NSM.
func (s *site) audit(image attestation.Image, raw []byte) audit.Report {
	s.t.Helper()
	cfg, err := config.Parse(raw)
	if err != nil {
		s.t.Fatal(err)
	}
	r, err := audit.Run(s.t.Context(), s.store, audit.Options{
		Receipts: true, Root: attestation.TestRoot(s.ca.Root()), Images: []attestation.Image{image}, Configs: []*config.Config{cfg},
	})
	if err != nil {
		s.t.Fatalf("audit: %v, %q", err, r.Findings)
	}
	return r
}
