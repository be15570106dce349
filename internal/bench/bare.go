package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"runtime"
	"time"

	"github.com/ethereum/go-ethereum/crypto"
	"golang.org/x/sync/errgroup"
)

const payloadSize = 100 // bytes

var errBare = errors.New("the bare loop failed")

// bareLoop is what everything is compared with: for each payload the EIP-191
// hash, crypto.Sign and crypto.VerifySignature, on n goroutines. It returns the
// wall time.
func bareLoop(records, n int) (time.Duration, error) {
	payloads := make([]byte, records*payloadSize)
	rand.Read(payloads)
	began := time.Now()
	var g errgroup.Group
	for i := range n {
		g.Go(func() error {
			key, err := crypto.GenerateKey()
			if err != nil {
				return fmt.Errorf("make a key: %w", err)
			}
			public := crypto.FromECDSAPub(&key.PublicKey)
			for k := i; k < records; k += n {
				p := payloads[k*payloadSize : (k+1)*payloadSize]
				prefix := fmt.Sprintf("\x19Ethereum Signed Message:\n%d", len(p))
				digest := crypto.Keccak256([]byte(prefix), p)
				sig, err := crypto.Sign(digest, key)
				if err != nil || !crypto.VerifySignature(public, digest, sig[:64]) {
					return errBare
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return 0, err
	}
	return time.Since(began), nil
}

func cores() int { return runtime.GOMAXPROCS(0) }
