package hostile_test

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"testing"

	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/wire"
)

// A judge that sees nothing would let every attack pass.
func TestTheJudgeSeesALeakInEveryForm(t *testing.T) {
	j := newJudge(testConfig())
	secret := []byte("0123456789abcdef\x00\xff\x10THIRTEEN BYTE")
	j.needles["a key"] = secret
	for name, leak := range map[string][]byte{
		"raw": secret, "the first half": secret[:16], "the second half": secret[16:], "hex": []byte(hex.EncodeToString(secret)),
		"upper hex": bytes.ToUpper([]byte(hex.EncodeToString(secret))), "base64": []byte(base64.StdEncoding.EncodeToString(secret)),
	} {
		if len(j.leaks(append([]byte("before"), append(leak, "behind"...)...))) == 0 {
			t.Errorf("%s is not seen", name)
		}
	}
	if found := j.leaks([]byte("0123456789abcde, and nothing else")); len(found) != 0 {
		t.Errorf("sees %v where there is none", found)
	}
}

// fails reports whether f complains.
func fails(t *testing.T, f func(t *verdicts)) bool {
	t.Helper()
	v := &verdicts{TB: t}
	f(v)
	return v.failed
}

// verdicts collects errors instead of failing.
type verdicts struct {
	testing.TB
	failed bool
}

func (v *verdicts) Helper()               {}
func (v *verdicts) Errorf(string, ...any) { v.failed = true }

func TestTheJudgeRefusesSignaturesThatNobodyMayHave(t *testing.T) {
	v := start(t, nil)
	req := v.signing(v.ticket(t), 1, 1)
	reply, err := v.sign(t, req)
	must(t, err)
	root := read(t, reply.Receipt).PayloadRoot
	keys := v.publics(t)
	if fails(t, func(q *verdicts) { v.permitted(q, reply, keys) }) {
		t.Fatal("a signature that is in order is refused")
	}
	other := *req
	for name, spoil := range map[string]func(s *wire.SignReply){
		"of another payload": func(*wire.SignReply) { other.Payload = records("one", "three") },
		"of another kind":    func(*wire.SignReply) { other.Kind = record.Raw },
		"of no request":      func(*wire.SignReply) { delete(v.asked, root) },
		"of another result": func(s *wire.SignReply) {
			s.Result = record.EncodeResult(65, []record.Outcome{{Signature: make([]byte, 65)}, {Signature: make([]byte, 65)}})
		},
		"of a key that was never made": func(s *wire.SignReply) {
			body := read(t, s.Receipt)
			body.KeyID[0] ^= 1
			s.Receipt = receipt.Encode(&receipt.Signed{Body: receipt.Encode(body), Signature: make([]byte, 64)})
		},
	} {
		bad := *reply
		other = *req
		v.asked[root] = &other
		spoil(&bad)
		if !fails(t, func(q *verdicts) { v.permitted(q, &bad, keys) }) {
			t.Errorf("a signature %s is not seen", name)
		}
	}
	v.asked[root] = req
}
