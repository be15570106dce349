package hostile_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"net"
	"sync"
	"testing"

	"github.com/ethereum/go-ethereum/crypto"

	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/payload"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/internal/wire"
)

// judge sees everything that went into an enclave and came out of it, and knows
// its secrets.
type judge struct {
	cfg *config.Config

	mu      sync.Mutex
	out     [][]byte // one connection each, and the log
	asked   map[[32]byte]*wire.Sign
	replies []*wire.SignReply
	entries [][]byte
	needles map[string][]byte // by what they are
}

func newJudge(cfg *config.Config) *judge {
	return &judge{cfg: cfg, asked: map[[32]byte]*wire.Sign{}, needles: map[string][]byte{}}
}

// tapped is a connection whose bytes the judge gets when it is closed.
type tapped struct {
	net.Conn
	judge *judge
	once  sync.Once

	mu      sync.Mutex
	in, out bytes.Buffer
}

func (c *tapped) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.out.Write(p[:n])
	return n, err
}

func (c *tapped) Write(p []byte) (int, error) {
	c.mu.Lock()
	c.in.Write(p)
	c.mu.Unlock()
	return c.Conn.Write(p)
}

func (c *tapped) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.judge.hear(c.in.Bytes(), c.out.Bytes())
	})
	return err
}

// messages are those that can be read from the start of a stream.
func messages(stream []byte) (all []*wire.Message) {
	for r := bytes.NewReader(stream); ; {
		frame, err := wire.ReadFrame(r)
		if err != nil {
			return all
		}
		m, err := wire.Decode(frame)
		if err != nil {
			return all
		}
		all = append(all, m)
	}
}

func (j *judge) hear(in, out []byte) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.out = append(j.out, out)
	for _, m := range messages(in) {
		var req wire.Sign
		if m.Type != wire.TypeSign || wire.DecodeBody(m, &req) != nil {
			continue
		}
		if rs, err := record.DecodePayload(req.Payload); err == nil {
			j.asked[receipt.PayloadRoot(req.Kind, rs)] = &req
		}
	}
	for _, m := range messages(out) {
		var signed wire.SignReply
		if m.Type == wire.TypeSign && wire.DecodeBody(m, &signed) == nil {
			j.replies = append(j.replies, &signed)
		}
		var made wire.AddKeysReply
		if m.Type == wire.TypeAddKeys && wire.DecodeBody(m, &made) == nil {
			j.entries = append(j.entries, made.Keys...)
		}
	}
}

// sealingKey is the AES key of one entry, as docs/sealed-keyring.md has it.
func sealingKey(t *testing.T, dek []byte, p *sealed.Public) []byte {
	t.Helper()
	key, err := hkdf.Key(sha256.New, dek, nil, "keyhold-seal-v1\x00"+string(p.KeyID[:])+string(p.Fingerprint[:]), 32)
	must(t, err)
	return key
}

// unseal opens an entry of the judge's enclave, in its own way, and checks that
// what is inside is the private key.
func unseal(t *testing.T, dek, entry []byte) (key, scalar []byte) {
	t.Helper()
	e, err := sealed.DecodeEntry(entry)
	must(t, err)
	key = sealingKey(t, dek, &e.Public)
	block, err := aes.NewCipher(key)
	must(t, err)
	aead, err := cipher.NewGCM(block)
	must(t, err)
	scalar, err = aead.Open(nil, e.Nonce, e.Ciphertext, e.Public.AAD())
	must(t, err)
	switch e.Public.Algorithm {
	case record.Secp256k1:
		private, err := crypto.ToECDSA(scalar)
		must(t, err)
		if !bytes.Equal(crypto.FromECDSAPub(&private.PublicKey), e.Public.PublicKey) { //nolint:forbidigo // public keys
			t.Fatal("the judge has another private key")
		}
	case record.Ed25519:
		if !bytes.Equal(ed25519.NewKeyFromSeed(scalar)[32:], e.Public.PublicKey) { //nolint:forbidigo // public keys
			t.Fatal("the judge has another private key")
		}
	case record.P256, record.RSA2048:
	}
	return key, scalar
}

// knows plants dek, the sealing keys of entries and the private keys in them as
// what must not come out.
func (j *judge) knows(t *testing.T, dek []byte, entries [][]byte) {
	t.Helper()
	j.mu.Lock()
	defer j.mu.Unlock()
	j.needles["the data key"] = bytes.Clone(dek)
	for i, entry := range entries {
		e, err := sealed.DecodeEntry(entry)
		must(t, err)
		if e.Public.Fingerprint != j.fingerprint(t) {
			continue // of another keyring, which has a judge of its own
		}
		key, scalar := unseal(t, dek, entry)
		name := string(e.Public.Algorithm) + " key " + string(rune('a'+i%26))
		j.needles["the sealing key of "+name+e.Public.KeyID.String()] = key
		j.needles["the private part of "+name+e.Public.KeyID.String()] = scalar
	}
}

// fingerprint is that of the first entry that came out.
func (j *judge) fingerprint(t *testing.T) sealed.Fingerprint {
	t.Helper()
	e, err := sealed.DecodeEntry(j.entries[0])
	must(t, err)
	return e.Public.Fingerprint
}

// leaks names what of the secrets is in b: either half of one, raw, in hex or in
// base64.
func (j *judge) leaks(b []byte) (names []string) {
	for name, secret := range j.needles {
		for _, half := range [][]byte{secret[:16], secret[len(secret)-16:]} {
			for _, form := range [][]byte{half, hex.AppendEncode(nil, half), bytes.ToUpper(hex.AppendEncode(nil, half)), base64.RawStdEncoding.AppendEncode(nil, half[:15])} {
				if bytes.Contains(b, form) {
					names = append(names, name)
				}
			}
		}
	}
	return names
}

// verdict looks at everything: no secret came out, and every signature is one
// that the policy of its key permits, of a payload that was asked for.
func (j *judge) verdict(t *testing.T) (signatures int) {
	t.Helper()
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.needles) < 3 {
		t.Fatal("the judge knows no secrets, so it could see none")
	}
	for _, b := range j.out {
		for _, name := range j.leaks(b) {
			t.Errorf("%s came out of the enclave", name)
		}
	}
	keys := j.publics(t)
	for _, reply := range j.replies {
		signatures += j.permitted(t, reply, keys)
	}
	return signatures
}

// publics are the public parts of all keys that were made.
func (j *judge) publics(t *testing.T) map[record.KeyID]*sealed.Public {
	t.Helper()
	keys := map[record.KeyID]*sealed.Public{}
	for _, entry := range j.entries {
		p := public(t, entry)
		keys[p.KeyID] = &p
	}
	return keys
}

// permitted checks one answer to sign.
func (j *judge) permitted(t testing.TB, reply *wire.SignReply, keys map[record.KeyID]*sealed.Public) (signatures int) {
	t.Helper()
	if len(reply.Result) == 0 && len(reply.Receipt) == 0 {
		return 0 // a probe
	}
	body, err := receipt.Decode[receipt.Signed](reply.Receipt)
	must(t, err)
	r, err := receipt.Decode[receipt.Receipt](body.Body)
	must(t, err)
	req, ok := j.asked[r.PayloadRoot]
	if !ok {
		t.Errorf("a receipt is over payloads that nobody asked for")
		return 0
	}
	key, ok := keys[r.KeyID]
	if !ok {
		t.Errorf("a key signed that was never made")
		return 0
	}
	policy, ok := j.cfg.Policy(key.Policy)
	if !ok || !policy.Permits(req.Kind) || policy.Hash() != r.PolicyHash {
		t.Errorf("%s was signed under policy %s", req.Kind, key.Policy)
	}
	rs, err := record.DecodePayload(req.Payload)
	must(t, err)
	_, out, err := record.DecodeResult(reply.Result)
	must(t, err)
	if len(out) != len(rs) || receipt.ResultRoot(out) != r.ResultRoot {
		t.Errorf("the receipt is of another result")
		return 0
	}
	for i, o := range out {
		if o.Refusal != "" {
			continue
		}
		signatures++
		if err := payload.Verify(key.Algorithm, key.PublicKey, req.Kind, rs[i].Payload, o.Signature); err != nil {
			t.Errorf("a signature came out that is none of its payload: %v", err)
		}
	}
	return signatures
}
