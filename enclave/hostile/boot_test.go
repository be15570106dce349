package hostile_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"testing"
	"time"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/attestation/nsm"
	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/receipt"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/wire"
)

func bootAttacks() []attack {
	return []attack{
		{"sends the config twice, and then another", "H2", []outcome{answered, code(refusal.ConfigConflict)}, configTwice},
		{"sends a config that is none first, and then the right one", "H2", []outcome{code(refusal.ConfigInvalid), code(refusal.TooLarge)}, badConfigFirst},
		{"extends or locks PCR16 before the enclave does", "H4", []outcome{code(refusal.ConfigMeasure)}, extendBefore},
		{"asks for everything before there is a config or a keyring", "H2", []outcome{code(refusal.NotConfigured), code(refusal.NoKeyring)}, tooEarly},
		{"puts public keys and CBOR into the nonce of a challenge", "H4", []outcome{answered, code(refusal.BadMessage)}, smuggle},
		{"passes documents of one kind off as another", "H4", []outcome{found}, wrongKind},
	}
}

func configTwice(t *testing.T, got *tally) {
	v := start(t, nil)
	wide := testConfig()
	wide.Policies[0].Kinds = record.Kinds()
	other, err := config.Encode(wide)
	must(t, err)
	own := v.s.Config()
	for _, raw := range [][]byte{own, other, append(bytes.Clone(own), '\n'), own[:len(own)-1], {}, own} {
		r, err := try[wire.ConfigureReply](t, v, wire.TypeConfigure, &wire.Configure{Config: raw})
		got.gotErr(err)
		if err == nil && (!r.Already || [48]byte(r.PCR16) != config.PCR16(own)) {
			t.Error("a config was taken twice")
		}
	}
	v.honest(t)
}

func badConfigFirst(t *testing.T, got *tally) {
	good, err := config.Encode(testConfig())
	must(t, err)
	for _, bad := range [][]byte{
		{},
		[]byte("{}"), append(bytes.Clone(good), ' '), good[:len(good)-2],
		bytes.Replace(good, []byte(`"version"`), []byte(`"Version"`), 1), bytes.Replace(good, []byte(`{`), []byte(`{"root":"mine",`), 1),
		bytes.Replace(good, []byte("arn:aws:kms"), []byte("arn:aws:ec2"), 1),
	} {
		v := bare(t, nil)
		_, err := try[wire.ConfigureReply](t, v, wire.TypeConfigure, &wire.Configure{Config: bad})
		got.gotErr(err)
		// It was measured, so no other may follow in this boot.
		_, err = try[wire.ConfigureReply](t, v, wire.TypeConfigure, &wire.Configure{Config: good})
		got.gotErr(err)
		_, err = try[wire.CreateKeyringReply](t, v, wire.TypeCreateKeyring, &wire.CreateKeyring{})
		got.gotErr(err)
	}
	_, err = try[wire.ConfigureReply](t, bare(t, nil), wire.TypeConfigure, &wire.Configure{Config: make([]byte, config.MaxLen+1)})
	got.gotErr(err)
}

func extendBefore(t *testing.T, got *tally) {
	raw, err := config.Encode(testConfig())
	must(t, err)
	m := config.Measurement(raw)
	for name, spoil := range map[string]func(*nsmtest.NSM) error{
		"with the same config": func(n *nsmtest.NSM) error { _, err := n.ExtendPCR(16, m[:]); return err },
		"with nothing":         func(n *nsmtest.NSM) error { _, err := n.ExtendPCR(16, make([]byte, 48)); return err },
		"locked at zero":       func(n *nsmtest.NSM) error { return n.LockPCRs(17) },
		"extended and locked": func(n *nsmtest.NSM) error {
			if _, err := n.ExtendPCR(16, m[:]); err != nil {
				return err
			}
			return n.LockPCRs(17)
		},
	} {
		v := bare(t, func(o *enclavetest.Options) {
			o.Device = func() (nsm.Session, error) {
				ca, err := nsmtest.NewCA(time.Now)
				if err != nil {
					return nil, err
				}
				n, err := nsmtest.New(ca, nsmtest.Options{PCRs: nsmtest.Measurements("enclavetest")})
				if err != nil {
					return nil, err
				}
				return n, spoil(n)
			}
		})
		for range 2 {
			_, err := try[wire.ConfigureReply](t, v, wire.TypeConfigure, &wire.Configure{Config: raw})
			got.gotErr(err)
		}
		if _, err := try[wire.CreateKeyringReply](t, v, wire.TypeCreateKeyring, &wire.CreateKeyring{}); err == nil {
			t.Errorf("%s: there is a keyring", name)
		} else {
			got.gotErr(err)
		}
	}
}

func tooEarly(t *testing.T, got *tally) {
	ready := start(t, nil)
	for _, configured := range []bool{false, true} {
		v := bare(t, nil)
		if configured {
			v.configure(t)
		}
		for _, m := range every(t, ready) {
			switch m.typ { //nolint:exhaustive // all others answer at any time, or open what is asked for
			case wire.TypeSign, wire.TypeCancel, wire.TypeFence, wire.TypeAddKeys:
				v.tell(t, got, frame(t, m.typ, m.body))
			case wire.TypeLoad, wire.TypeCreateKeyring, wire.TypeAttest:
				if !configured {
					v.tell(t, got, frame(t, m.typ, m.body))
				}
			}
		}
	}
	ready.honest(t)
}

// wanted is what verifiers of v's documents want.
func (v *victim) wanted() (attestation.Root, []attestation.Image) {
	pcr16 := config.PCR16(v.s.Config())
	return attestation.TestRoot(v.s.CA().Root()), []attestation.Image{{PCRs: map[int][]byte{0: image(), 16: pcr16[:]}}}
}

func (v *victim) live(t *testing.T, document, nonce []byte) (attestation.Document, error) {
	t.Helper()
	root, images := v.wanted()
	l, err := attestation.VerifyLive(document, attestation.LivePolicy{Root: root, Images: images, Nonce: nonce, Now: time.Now()})
	if err != nil {
		return attestation.Document{}, err //nolint:wrapcheck // a test
	}
	return l.Document()
}

func (v *victim) recorded(t *testing.T, document []byte) attestation.Document {
	t.Helper()
	root, images := v.wanted()
	r, err := attestation.VerifyRecorded(document, attestation.RecordedPolicy{Root: root, Images: images})
	must(t, err)
	d, err := r.Document()
	must(t, err)
	return d
}

func statement(t *testing.T, v *victim, document, raw []byte) *receipt.Statement {
	t.Helper()
	d := v.recorded(t, document)
	st, err := receipt.CheckStatement(raw, d.PublicKey, d.UserData)
	must(t, err)
	return st
}

func smuggle(t *testing.T, got *tally) {
	v := start(t, nil)
	c := v.dial(t)
	defer func() { must(t, c.Close()) }()
	h := ask[wire.HelloReply](t, c, wire.TypeHello, &wire.Hello{})
	mine, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	der, err := x509.MarshalPKIXPublicKey(&mine.PublicKey)
	must(t, err)
	public, _, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	nonces := [][]byte{
		der, der[:64], der[:65], public, append(bytes.Clone(public), public...),
		{},
		{0},
		bytes.Repeat([]byte{0xff}, 64), make([]byte, 1024),
		[]byte("\x6apublic_key\x58\x20" + string(public)), []byte("\x40\x6apublic_key\x44mine\x69user_data\x43kms"),
		receipt.UserData(receipt.KindKMS, nil)[:64], []byte("keyhold-attestation-v1:kms\x00"), receipt.UserData(receipt.KindBoot, h.Statement),
	}
	for _, nonce := range nonces {
		r, err := enclavetest.Ask[wire.AttestReply](c, wire.TypeAttest, &wire.Attest{Nonce: nonce})
		got.gotErr(err)
		if err != nil {
			if l := len(nonce); l > 0 && l <= wire.MaxNonce {
				t.Errorf("a nonce of %d bytes: %v", l, err)
			}
			continue
		}
		d := v.recorded(t, r.Document)
		if !bytes.Equal(d.Nonce, nonce) { //nolint:forbidigo // public bytes
			t.Error("the document holds another nonce")
		}
		if receipt.BootIDOf(d.PublicKey) != h.BootID {
			t.Error("the document holds another public key")
		}
		if string(d.UserData) != string(receipt.UserData(receipt.KindChallenge, nil)) {
			t.Error("the document is of another kind")
		}
		// KMS seals to the RSA key of a document: there is none to be found in it.
		if _, err := x509.ParsePKIXPublicKey(d.PublicKey); err == nil {
			t.Error("KMS would find a key in the document")
		}
	}
	v.honest(t)
}

// wrongKind shows the documents that an attacker can get for what they are not.
// Those for KMS never leave the enclave but through TLS.
func wrongKind(t *testing.T, got *tally) {
	v := start(t, nil)
	c := v.dial(t)
	defer func() { must(t, c.Close()) }()
	h := ask[wire.HelloReply](t, c, wire.TypeHello, &wire.Hello{})
	nonce := receipt.UserData(receipt.KindBoot, h.Statement)[:64]
	r := ask[wire.AttestReply](t, c, wire.TypeAttest, &wire.Attest{Nonce: nonce})
	refused := func(what string, err error) {
		t.Helper()
		if err == nil {
			t.Errorf("%s is taken", what)
			got.got(notSeen)
			return
		}
		got.got(found)
	}
	challenge, err := v.live(t, r.Document, nonce)
	must(t, err)
	_, err = receipt.CheckStatement(h.Statement, challenge.PublicKey, challenge.UserData)
	refused("a challenge as the boot document", err)
	_, err = v.live(t, h.Document, nonce)
	refused("a boot document as the answer to a challenge", err)
	_, err = v.live(t, h.Document, nil)
	refused("a boot document as the answer to no challenge", err)
	_, err = v.live(t, r.Document, append(bytes.Clone(nonce), 0))
	refused("the answer to another challenge", err)
	_, err = receipt.OpenReceipt(challenge.PublicKey, r.Heads)
	refused("heads as a receipt", err)
	reply, err := v.sign(t, v.signing(v.ticket(t), 1, 1))
	must(t, err)
	_, err = receipt.OpenHeads(challenge.PublicKey, nonce, reply.Receipt)
	refused("a receipt as heads", err)
	_, err = receipt.OpenHeads(challenge.PublicKey, []byte("another"), r.Heads)
	refused("heads of another challenge", err)
	for _, kind := range []string{receipt.KindKMS, receipt.KindBoot} {
		if bytes.HasPrefix(challenge.UserData, []byte("keyhold-attestation-v1:"+kind)) {
			t.Errorf("a challenge looks like %s", kind)
		}
	}
	v.honest(t)
}
