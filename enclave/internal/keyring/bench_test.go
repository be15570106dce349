package keyring_test

import (
	"bytes"
	"runtime"
	"strconv"
	"testing"

	ethcrypto "github.com/ethereum/go-ethereum/crypto"

	"github.com/keyhold/keyhold/internal/record"
)

// payloadLen is what docs/performance.md measures with, in bytes.
const payloadLen = 100

func BenchmarkOpen(b *testing.B) {
	maker := newRing(b, testConfig(), testHeader())
	const n = 2000
	entries, err := maker.Create(record.Secp256k1, "messages", n)
	if err != nil {
		b.Fatalf("Create: %v", err)
	}
	r, i := newRing(b, testConfig(), testHeader()), 0
	var watch stopwatch
	b.ReportAllocs()
	for b.Loop() {
		if i%n == 0 { // a key that is open already would not be added
			r = newRing(b, testConfig(), testHeader())
		}
		watch.run(func() {
			if err := r.Open(entries[i%n]); err != nil {
				b.Fatalf("Open: %v", err)
			}
		})
		i++
	}
	b.ReportMetric(1e9/watch.median(), "keys/s")
}

// bareLoop is what the budget of the enclave is measured against: the
// EIP-191 hash as go-ethereum's accounts package writes it, Sign, and
// VerifySignature.
type bareLoop struct {
	payload []byte
	sign    func(digest []byte) ([]byte, error)
	verify  func(digest, sig []byte) bool
}

func newBareLoop(b *testing.B) bareLoop {
	b.Helper()
	key, err := ethcrypto.GenerateKey()
	if err != nil {
		b.Fatalf("GenerateKey: %v", err)
	}
	public := ethcrypto.FromECDSAPub(&key.PublicKey)
	return bareLoop{
		bytes.Repeat([]byte{0x5a}, payloadLen),
		func(digest []byte) ([]byte, error) { return ethcrypto.Sign(digest, key) },
		func(digest, sig []byte) bool { return ethcrypto.VerifySignature(public, digest, sig[:64]) },
	}
}

func (l bareLoop) once(b *testing.B, verify bool) {
	b.Helper()
	prefix := "\x19Ethereum Signed Message:\n" + strconv.Itoa(len(l.payload))
	digest := ethcrypto.Keccak256([]byte(prefix), l.payload)
	sig, err := l.sign(digest)
	if err != nil || verify && !l.verify(digest, sig) {
		b.Fatalf("bare loop: %v", err)
	}
}

// BenchmarkMessages measures the ring and the bare loop in turns, so that both
// meet the same machine, and reports the ratio.
func BenchmarkMessages(b *testing.B) {
	for name, verify := range map[string]bool{"sign": false, "sign and verify": true} {
		b.Run(name, func(b *testing.B) {
			_, k := create(b, newRing(b, testConfig(), testHeader()), record.Secp256k1, "messages")
			s, err := k.NewSigner(record.Message)
			if err != nil {
				b.Fatalf("NewSigner: %v", err)
			}
			bare := newBareLoop(b)
			ring := func() {
				sig, err := s.Sign(bare.payload)
				if err != nil || verify && !s.Verify(sig) {
					b.Fatalf("Sign: %v", err)
				}
			}
			var ringTime, bareTime stopwatch
			for b.Loop() {
				ringTime.run(ring)
				bareTime.run(func() { bare.once(b, verify) })
			}
			b.ReportMetric(ringTime.median(), "ring-ns/record")
			b.ReportMetric(bareTime.median(), "bare-ns/record")
			b.ReportMetric(ringTime.median()/bareTime.median(), "ratio")
		})
	}
}

func BenchmarkSigners(b *testing.B) {
	for _, a := range record.Algorithms() {
		b.Run(string(a), func(b *testing.B) {
			_, k := create(b, newRing(b, testConfig(), testHeader()), a, "all")
			s, err := k.NewSigner(record.Message)
			if err != nil {
				b.Fatalf("NewSigner: %v", err)
			}
			p := make([]byte, payloadLen)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := s.Sign(p); err != nil {
					b.Fatalf("Sign: %v", err)
				}
			}
		})
	}
}

func BenchmarkNewSigner(b *testing.B) {
	for _, a := range record.Algorithms() {
		b.Run(string(a), func(b *testing.B) {
			_, k := create(b, newRing(b, testConfig(), testHeader()), a, "all")
			for b.Loop() {
				if _, err := k.NewSigner(record.Message); err != nil {
					b.Fatalf("NewSigner: %v", err)
				}
			}
		})
	}
}

// heapPerKey bounds what an open secp256k1 key takes, in bytes: a million keys
// stay under 400 MB.
const heapPerKey = 400

func TestAKeyTakesLittleMemory(t *testing.T) {
	const n = 5_000
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	maker := newRing(t, testConfig(), testHeader())
	before := heap()
	if entries, err := maker.Create(record.Secp256k1, "messages", n); err != nil || len(entries) != n {
		t.Fatalf("Create: %v", err)
	}
	after := heap()
	runtime.KeepAlive(maker)
	if per := float64(after-before) / n; per > heapPerKey {
		t.Errorf("a key takes %.0f bytes, want at most %d", per, heapPerKey)
	} else {
		t.Logf("a key takes %.0f bytes", per)
	}
}
