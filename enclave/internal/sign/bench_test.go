package sign_test

import (
	"crypto/rand"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ethereum/go-ethereum/crypto"
	"golang.org/x/sys/unix"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/wire"
)

const benchBatch = 500

// benchRecords are as docs/performance.md measures: 500 payloads of 100 bytes.
func benchRecords() []record.Record {
	rs := make([]record.Record, benchBatch)
	for i := range rs {
		rs[i].Payload = make([]byte, 100)
		rand.Read(rs[i].Payload)
	}
	return rs
}

// bareLoop is what the enclave is compared with: EIP-191 hash, crypto.Sign,
// crypto.VerifySignature.
func bareLoop(tb testing.TB, rs []record.Record, verify bool) func() {
	tb.Helper()
	key, err := crypto.GenerateKey()
	if err != nil {
		tb.Fatal(err)
	}
	public := crypto.FromECDSAPub(&key.PublicKey)
	return func() {
		for _, r := range rs {
			prefix := fmt.Sprintf("\x19Ethereum Signed Message:\n%d", len(r.Payload))
			digest := crypto.Keccak256([]byte(prefix), r.Payload)
			sig, err := crypto.Sign(digest, key)
			if err != nil || verify && !crypto.VerifySignature(public, digest, sig[:64]) {
				tb.Fatal("the bare loop failed")
			}
		}
	}
}

// engineLoop is everything from the decoded request to the reply.
func engineLoop(tb testing.TB, rs []record.Record, verify bool) func() {
	tb.Helper()
	f := ready(tb, 1)
	if !verify {
		f.engine.TestingOnlySkipVerify()
	}
	l := f.lane(tb)
	body := record.EncodePayload(rs)
	fence := record.Fence(0)
	return func() {
		fence++
		m := f.request(func(m *wire.Sign) { m.Payload, m.KeyFence, m.Ack = body, fence, uint64(fence-1) })
		if _, err := f.engine.Sign(tb.Context(), l, m); err != nil {
			tb.Fatal(err)
		}
	}
}

// BenchmarkAgainstBareLoop reports the figures of docs/performance.md. The loops
// take turns, so that what else the machine does meets both.
func BenchmarkAgainstBareLoop(b *testing.B) {
	for _, tc := range []struct {
		name   string
		verify bool
	}{{"sign", false}, {"sign_and_verify", true}} {
		b.Run(tc.name, func(b *testing.B) {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			rs := benchRecords()
			loop, engine := bareLoop(b, rs, tc.verify), engineLoop(b, rs, tc.verify)
			var engineTimes, bareTimes, ratios []float64
			for b.Loop() {
				e, l := float64(cpuTime(b, engine)), float64(cpuTime(b, loop))
				engineTimes, bareTimes, ratios = append(engineTimes, e), append(bareTimes, l), append(ratios, e/l)
			}
			b.ReportMetric(median(ratios), "ratio")
			b.ReportMetric(median(engineTimes)/benchBatch, "engine-ns/record")
			b.ReportMetric(median(bareTimes)/benchBatch, "bare-ns/record")
		})
	}
}

func median(s []float64) float64 {
	slices.Sort(s)
	return s[len(s)/2]
}

// What stands beside hash, sign and verify must stay small. Others use this
// machine too, so the two loops take turns on one thread, the median of their
// ratios counts, and only a limit that is passed three times over is passed.
func TestRulesCostLittleBesideSigning(t *testing.T) {
	if testing.Short() {
		t.Skip("measures time")
	}
	const limit, attempts = 1.12, 3
	for _, verify := range []bool{false, true} {
		t.Run(fmt.Sprintf("verify %t", verify), func(t *testing.T) {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			rs := benchRecords()
			loop, engine := bareLoop(t, rs, verify), engineLoop(t, rs, verify)
			for range attempts {
				ratio := medianRatio(t, engine, loop)
				t.Logf("engine against bare loop: %.3f", ratio)
				if ratio <= limit {
					return
				}
			}
			t.Errorf("the engine takes more than %.2f of the bare loop", limit)
		})
	}
}

func medianRatio(t *testing.T, a, b func()) float64 {
	t.Helper()
	ratios := make([]float64, 15)
	for i := range ratios {
		ratios[i] = float64(cpuTime(t, a)) / float64(cpuTime(t, b))
	}
	return median(ratios)
}

// cpuTime is what f takes of this thread's time.
func cpuTime(tb testing.TB, f func()) time.Duration {
	tb.Helper()
	used := func() time.Duration {
		var u unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_THREAD, &u); err != nil {
			tb.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	before := used()
	f()
	return used() - before
}

// Nothing that a program links can switch verification off: the field is
// unexported, and outside of tests it is set in New alone, to Signer.Verify.
func TestVerifyIsSetInNewAlone(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	uses := 0
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		fset := token.NewFileSet()
		parsed, err := parser.ParseFile(fset, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(parsed, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.KeyValueExpr:
				if id, ok := n.Key.(*ast.Ident); ok && id.Name == "verify" {
					uses++
					if sel, ok := n.Value.(*ast.SelectorExpr); !ok || sel.Sel.Name != "Verify" {
						t.Errorf("%s: verify is set to something else", fset.Position(n.Pos()))
					}
				}
			case *ast.AssignStmt:
				for _, lhs := range n.Lhs {
					if sel, ok := lhs.(*ast.SelectorExpr); ok && sel.Sel.Name == "verify" {
						t.Errorf("%s: verify is assigned", fset.Position(n.Pos()))
					}
				}
			}
			return true
		})
	}
	if uses != 1 {
		t.Errorf("verify is set in %d places, want 1", uses)
	}
}
