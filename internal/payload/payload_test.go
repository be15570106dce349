package payload_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	ethcrypto "github.com/ethereum/go-ethereum/crypto"
	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/payload"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
)

func unhex(tb testing.TB, s string) []byte {
	tb.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		tb.Fatalf("hex: %v", err)
	}
	return b
}

func TestDigestsAreThoseOfOtherImplementations(t *testing.T) {
	t.Parallel()
	const d32 = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
	tests := []struct {
		source    string
		algorithm record.Algorithm
		kind      record.Kind
		payload   string
		want      string // hex
	}{
		{"go-ethereum, accounts.TextHash", record.Secp256k1, record.Message, "Hello Joe", "a080337ae51c4e064c189e113edd0ba391df9206e2f49db658bb32cf2911730b"},
		{"web3.js, hashMessage", record.Secp256k1, record.Message, "Hello World", "a1de988600a42c4b4ab089b619297c17d53cffae5d5120d82d8a92d0bb3b78f2"},
		{"web3.js, accounts.sign", record.Secp256k1, record.Message, "Some data", "1da44b586eb0729ff70a73c326926f6ed5a25f5b056e7f47fbc6e58d86871655"},
		{"Keccak-256 of nothing", record.Secp256k1, record.Raw, "", "c5d2460186f7233c927e7db2dcc703c0e500b653ca82273b7bfad8045d85a470"},
		{"Keccak-256, Solidity's transfer(address,uint256)", record.Secp256k1, record.Raw, "transfer(address,uint256)", "a9059cbb2ab09eb219583f4a59a5d0623ade346d962bcd4e46b11da047c9049b"},
		{"sha256sum", record.P256, record.Message, "hello", "b6ee20aaeb0b897b31c589aae1c0af40741023da5052df6cda3a1c8804881dc7"},
		{"sha256sum", record.RSA2048, record.Message, "", "9c1b477b12b34a05835879717d09a4ebbe540de91694fbe5b55c8d60261a8f66"},
		{"FIPS 180-2, B.1", record.P256, record.Raw, "abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
		{"FIPS 180-2, B.1", record.RSA2048, record.Raw, "abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
		{"as it is", record.Secp256k1, record.Digest, string(unhex(t, d32)), d32},
		{"as it is", record.P256, record.Digest, string(unhex(t, d32)), d32},
		{"as it is", record.RSA2048, record.Digest, string(unhex(t, d32)), d32},
		{"hashes itself", record.Ed25519, record.Message, "hello", ""},
		{"hashes itself", record.Ed25519, record.Raw, "hello", ""},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%s %s %s", tt.algorithm, tt.kind, tt.source), func(t *testing.T) {
			t.Parallel()
			got, err := payload.Digest(tt.algorithm, tt.kind, []byte(tt.payload))
			if err != nil {
				t.Fatalf("Digest: %v", err)
			}
			if diff := cmp.Diff(tt.want, hex.EncodeToString(got)); diff != "" {
				t.Errorf("digest: %s", diff)
			}
		})
	}
}

func TestEd25519SignsThePrefixedMessageAndTheRawPayload(t *testing.T) {
	t.Parallel()
	for kind, want := range map[record.Kind]string{
		record.Message: "\x19Keyhold Signed Message:\n5hello", record.Raw: "hello",
	} {
		h, err := payload.NewHasher(record.Ed25519, kind)
		if err != nil {
			t.Fatalf("NewHasher: %v", err)
		}
		got, err := h.Sum([]byte("hello"))
		if err != nil {
			t.Fatalf("Sum: %v", err)
		}
		if diff := cmp.Diff(want, string(got)); diff != "" {
			t.Errorf("%s: %s", kind, diff)
		}
	}
}

func TestAHasherUsedAgainGivesWhatANewOneGives(t *testing.T) {
	t.Parallel()
	payloads := [][]byte{nil, {}, []byte("a"), bytes.Repeat([]byte("b"), 135), bytes.Repeat([]byte("c"), 136), bytes.Repeat([]byte("d"), record.MaxPayloadLen), []byte("e")}
	for _, a := range record.Algorithms() {
		for _, k := range []record.Kind{record.Message, record.Raw} {
			used, err := payload.NewHasher(a, k)
			if err != nil {
				t.Fatalf("NewHasher: %v", err)
			}
			for _, p := range payloads {
				fresh, err := payload.NewHasher(a, k)
				if err != nil {
					t.Fatalf("NewHasher: %v", err)
				}
				got, err := used.Sum(p)
				if err != nil {
					t.Fatalf("Sum: %v", err)
				}
				want, err := fresh.Sum(p)
				if err != nil {
					t.Fatalf("Sum: %v", err)
				}
				if !slices.Equal(want, got) {
					t.Errorf("%s %s of %d bytes differs", a, k, len(p))
				}
			}
		}
	}
}

// A message can be taken neither for another message nor for a raw payload of
// the other algorithms: its digest is over another text.
func TestMessagesDoNotMeetEachOther(t *testing.T) {
	t.Parallel()
	seen := make(map[string]string)
	for _, a := range []record.Algorithm{record.Secp256k1, record.P256} {
		for _, k := range []record.Kind{record.Message, record.Raw} {
			for _, p := range []string{"", "1", "11", "a", strings.Repeat("a", 10), "0" + strings.Repeat("a", 10)} {
				d, err := payload.Digest(a, k, []byte(p))
				if err != nil {
					t.Fatalf("Digest: %v", err)
				}
				name := fmt.Sprintf("%s %s %q", a, k, p)
				if other, ok := seen[string(d)]; ok {
					t.Errorf("%s and %s have one digest", name, other)
				}
				seen[string(d)] = name
			}
		}
	}
}

func TestDigestsOfAnotherLengthAreRefused(t *testing.T) {
	t.Parallel()
	for _, a := range []record.Algorithm{record.Secp256k1, record.P256, record.RSA2048} {
		for _, n := range []int{0, 1, 31, 33, 64} {
			if _, err := payload.Digest(a, record.Digest, make([]byte, n)); !errors.Is(err, refusal.DigestLength) {
				t.Errorf("%s, %d bytes: got %v, want digest_length", a, n, err)
			}
		}
	}
}

func TestCombinationsThatNobodySignsAreRefused(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		algorithm record.Algorithm
		kind      record.Kind
	}{
		{record.Ed25519, record.Digest},
		{"", record.Message},
		{"dsa", record.Raw},
		{record.Secp256k1, ""},
		{record.Secp256k1, "transaction"},
		{record.Secp256k1, "typed_data"},
		{record.Secp256k1, "MESSAGE"},
	} {
		if _, err := payload.NewHasher(tt.algorithm, tt.kind); !errors.Is(err, payload.ErrCombination) {
			t.Errorf("NewHasher(%q, %q): got %v, want ErrCombination", tt.algorithm, tt.kind, err)
		}
		if _, err := payload.Digest(tt.algorithm, tt.kind, make([]byte, 32)); !errors.Is(err, payload.ErrCombination) {
			t.Errorf("Digest(%q, %q): got %v, want ErrCombination", tt.algorithm, tt.kind, err)
		}
		if err := payload.Verify(tt.algorithm, nil, tt.kind, nil, nil); !errors.Is(err, payload.ErrCombination) {
			t.Errorf("Verify(%q, %q): got %v, want ErrCombination", tt.algorithm, tt.kind, err)
		}
	}
}

func TestHashingAllocatesNothing(t *testing.T) {
	p := make([]byte, 100)
	for _, a := range record.Algorithms() {
		h, err := payload.NewHasher(a, record.Message)
		if err != nil {
			t.Fatalf("NewHasher: %v", err)
		}
		if n := testing.AllocsPerRun(100, func() {
			if _, err := h.Sum(p); err != nil {
				t.Fatalf("Sum: %v", err)
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations for a payload", a, n)
		}
	}
}

// The test cases of EIP-55.
func TestAddressesAreSpelledAsEIP55Says(t *testing.T) {
	t.Parallel()
	for _, want := range []string{
		"0x52908400098527886E0F7030069857D2E4169EE7", "0x8617E340B3D01FA5F11F306F4090FD50E238070D",
		"0xde709f2102306220921060314715629080e2fb77", "0x27b1fdb04752bbc536007a920d24acb045561c26",
		"0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed", "0xfB6916095ca1df60bB79Ce92cE3Ea74c37c5d359",
		"0xdbF03B407c01E7cD3CBea99509d93f8DDDC8C6FB", "0xD1220A0cf47c7B9Be7A2E6BA89F429762e7b9aDb",
	} {
		got := payload.TestingOnlyChecksum([20]byte(unhex(t, strings.ToLower(want[2:]))))
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
}

func TestAddressIsGoEthereums(t *testing.T) {
	t.Parallel()
	for i := range 200 {
		scalar := sha256.Sum256([]byte{byte(i)})
		key, err := ethcrypto.ToECDSA(scalar[:])
		if err != nil {
			t.Fatalf("ToECDSA: %v", err)
		}
		want := ethcrypto.PubkeyToAddress(key.PublicKey).Hex()
		if diff := cmp.Diff(want, payload.Address(ethcrypto.FromECDSAPub(&key.PublicKey))); diff != "" {
			t.Error(diff)
		}
	}
}

func TestWhatIsNoUncompressedKeyHasNoAddress(t *testing.T) {
	t.Parallel()
	hybrid := append([]byte{6}, make([]byte, 64)...)
	for name, b := range map[string][]byte{"nothing": nil, "compressed": make([]byte, 33), "without prefix": make([]byte, 64), "hybrid": hybrid} {
		if got := payload.Address(b); got != "" {
			t.Errorf("%s: got %s", name, got)
		}
	}
}

func BenchmarkSum(b *testing.B) {
	p := make([]byte, 100)
	for _, a := range record.Algorithms() {
		b.Run(string(a), func(b *testing.B) {
			h, err := payload.NewHasher(a, record.Message)
			if err != nil {
				b.Fatalf("NewHasher: %v", err)
			}
			for b.Loop() {
				if _, err := h.Sum(p); err != nil {
					b.Fatalf("Sum: %v", err)
				}
			}
		})
	}
}
