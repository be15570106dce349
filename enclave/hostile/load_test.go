package hostile_test

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/keyhold/keyhold/enclave/enclavetest"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/internal/wire"
)

func loadAttacks() []attack {
	return []attack{
		{"swaps parts of sealed entries between every pair of keys", "H2", []outcome{refusedAlone}, swapEntries},
		{"edits the policy, address and every other field of a sealed entry", "H2", []outcome{refusedAlone}, editEntries},
		{"flips every byte of a sealed entry", "H2", []outcome{refusedAlone}, flipEntry},
		{"loads keys of another keyring of the same name, and relabels them as ours", "H2", []outcome{refusedAlone}, foreignEntries},
		{"brings another keyring of the same name and then our keys", "H2", []outcome{code(refusal.KeyringConflict), answered, refusedAlone}, foreignHeader},
		{"loads a header of another account's key, and our wrapped key under another's", "H2", []outcome{code(refusal.KeyringInvalid), code(refusal.KMSWrongKey)}, otherAccount},
		{"brings an old epoch back, also relabelled as the open one", "H2", []outcome{code(refusal.EpochClosed), code(refusal.KMSWrongKey), refusedAlone}, oldEpoch},
		{"loads and signs with a key on the measured deny list", "H2", []outcome{refusedAlone, code(refusal.KeyDenied)}, deniedKey},
		{"makes keys of pairs that the config does not permit, and more than it permits", "H2", []outcome{code(refusal.CreateDenied), code(refusal.CreateLimit), code(refusal.TooLarge), answered}, makeKeys},
	}
}

// offer loads one entry into a boot that holds none, so that what is refused
// could not have been there before.
func offer(t *testing.T, v *victim, got *tally, entry []byte, what string) {
	t.Helper()
	r, err := try[wire.LoadReply](t, v, wire.TypeLoad, &wire.Load{Header: v.header, Keys: [][]byte{entry}})
	switch {
	case err != nil:
		t.Errorf("%s: %v", what, err)
	case len(r.Refused) == 1 && r.Loaded == 0 && r.Total == 0:
		got.got(refusedAlone)
	default:
		t.Errorf("%s: loaded", what)
		got.got(answered)
	}
}

// reloaded is a second boot with the keyring open and no key in it.
func reloaded(t *testing.T) *victim {
	t.Helper()
	v := start(t, nil)
	v.reboot(t)
	return v
}

// whole shows that the entries as they were still open and sign.
func (v *victim) whole(t *testing.T) {
	t.Helper()
	r, err := try[wire.LoadReply](t, v, wire.TypeLoad, &wire.Load{Header: v.header, Keys: v.entries})
	if err != nil || len(r.Refused) != 0 {
		t.Errorf("our own keys: %+v, %v", r, err)
	}
	v.honest(t)
}

func (v *victim) entry(t *testing.T, i int) *sealed.Entry {
	t.Helper()
	e, err := sealed.DecodeEntry(v.entries[i])
	must(t, err)
	return e
}

func swapEntries(t *testing.T, got *tally) {
	v := reloaded(t)
	parts := map[string]func(mine, other *sealed.Entry){
		"ciphertext":           func(m, o *sealed.Entry) { m.Ciphertext = o.Ciphertext },
		"nonce":                func(m, o *sealed.Entry) { m.Nonce = o.Nonce },
		"nonce and ciphertext": func(m, o *sealed.Entry) { m.Nonce, m.Ciphertext = o.Nonce, o.Ciphertext },
		"key": func(m, o *sealed.Entry) {
			m.Public.KeyID, m.Public.PublicKey, m.Public.Algorithm = o.Public.KeyID, o.Public.PublicKey, o.Public.Algorithm
		},
		"key and address": func(m, o *sealed.Entry) {
			m.Public.KeyID, m.Public.PublicKey, m.Public.Algorithm = o.Public.KeyID, o.Public.PublicKey, o.Public.Algorithm
			m.Public.Address = o.Public.Address
		},
		"address": func(m, o *sealed.Entry) { m.Public.Address = o.Public.Address },
		"policy":  func(m, o *sealed.Entry) { m.Public.Policy = o.Public.Policy },
	}
	for i := range v.entries {
		for j := range v.entries {
			for name, swap := range parts {
				mine := v.entry(t, i)
				swap(mine, v.entry(t, j))
				if bad := sealed.EncodeEntry(mine); i != j && string(bad) != string(v.entries[i]) {
					offer(t, v, got, bad, fmt.Sprintf("%s of key %d in key %d", name, j, i))
				}
			}
		}
	}
	v.whole(t)
}

func editEntries(t *testing.T, got *tally) {
	v := reloaded(t)
	for i := range v.entries {
		for name, edit := range map[string]func(*sealed.Entry){
			"a wider policy": func(e *sealed.Entry) {
				e.Public.Policy = map[string]string{"narrow": "wide", "wide": "narrow"}[e.Public.Policy]
			},
			"no policy there":   func(e *sealed.Entry) { e.Public.Policy = "none" },
			"address":           func(e *sealed.Entry) { e.Public.Address = "0x000000000000000000000000000000000000dEaD" },
			"other capitals":    func(e *sealed.Entry) { e.Public.Address += " " },
			"keyring":           func(e *sealed.Entry) { e.Public.Keyring = "else" },
			"epoch":             func(e *sealed.Entry) { e.Public.Epoch = 2 },
			"fingerprint":       func(e *sealed.Entry) { e.Public.Fingerprint[0] ^= 1 },
			"version":           func(e *sealed.Entry) { e.Public.Version = 2 },
			"key id":            func(e *sealed.Entry) { e.Public.KeyID[0] ^= 1 },
			"algorithm":         func(e *sealed.Entry) { e.Public.Algorithm = record.P256 },
			"algorithm and id":  func(e *sealed.Entry) { e.Public.Algorithm = record.P256; rename(e) },
			"public key and id": func(e *sealed.Entry) { e.Public.PublicKey[5] ^= 1; rename(e) },
			"ciphertext":        func(e *sealed.Entry) { e.Ciphertext[0] ^= 1 },
			"a cut ciphertext":  func(e *sealed.Entry) { e.Ciphertext = e.Ciphertext[:16] },
		} {
			e := v.entry(t, i)
			edit(e)
			offer(t, v, got, sealed.EncodeEntry(e), name)
		}
	}
	v.whole(t)
}

func rename(e *sealed.Entry) { e.Public.KeyID = sealed.KeyID(e.Public.Algorithm, e.Public.PublicKey) }

func flipEntry(t *testing.T, got *tally) {
	v := reloaded(t)
	for i := range v.entries[2] {
		bad := bytes.Clone(v.entries[2])
		bad[i] ^= 1 << (i % 8)
		offer(t, v, got, bad, fmt.Sprintf("byte %d", i))
	}
	v.whole(t)
}

// twins are two keyrings of one name and epoch under one KMS key, the second of
// which is the attacker's.
func twins(t *testing.T) (v, other *victim) {
	t.Helper()
	v = reloaded(t)
	other = start(t, func(o *enclavetest.Options) { o.KMS = v.s.KMS() })
	return v, other
}

func foreignEntries(t *testing.T, got *tally) {
	v, other := twins(t)
	h, err := sealed.DecodeHeader(v.header)
	must(t, err)
	for i, entry := range other.entries {
		offer(t, v, got, entry, "another keyring's key")
		e := other.entry(t, i)
		e.Public.Fingerprint = h.Fingerprint()
		offer(t, v, got, sealed.EncodeEntry(e), "another keyring's key with our fingerprint")
	}
	v.whole(t)
}

func foreignHeader(t *testing.T, got *tally) {
	v, other := twins(t)
	v.whole(t) // ready with its own
	_, err := try[wire.LoadReply](t, v, wire.TypeLoad, &wire.Load{Header: other.header, Keys: other.entries})
	got.gotErr(err)
	v.reboot(t)
	r, err := try[wire.LoadReply](t, v, wire.TypeLoad, &wire.Load{Header: other.header, Keys: v.entries})
	must(t, err)
	got.got(answered) // it is a keyring of the same KMS key, and says so in the statement
	for range r.Refused {
		got.got(refusedAlone)
	}
	if len(r.Refused) != len(v.entries) {
		t.Errorf("%d of our keys were opened in another keyring", r.Loaded)
	}
	c := v.dial(t)
	h := ask[wire.HelloReply](t, c, wire.TypeHello, &wire.Hello{})
	theirs, err := sealed.DecodeHeader(other.header)
	must(t, err)
	if st := statement(t, v, h.Document, h.Statement); st.Fingerprint != theirs.Fingerprint() {
		t.Error("the statement names a keyring that is not open")
	}
	must(t, c.Close())
}

func otherAccount(t *testing.T, got *tally) {
	v := start(t, nil)
	cfg := testConfig()
	cfg.KMSKeyARN = "arn:aws:kms:eu-central-1:999999999999:key/00000000-0000-4000-8000-000000000002"
	other := start(t, func(o *enclavetest.Options) { o.Config = cfg })
	h, err := sealed.DecodeHeader(other.header)
	must(t, err)
	h.KMSKeyARN = v.cfg.KMSKeyARN
	for _, header := range [][]byte{other.header, sealed.EncodeHeader(h)} {
		v.reboot(t)
		_, err := try[wire.LoadReply](t, v, wire.TypeLoad, &wire.Load{Header: header, Keys: other.entries})
		got.gotErr(err)
	}
	v.whole(t)
}

func oldEpoch(t *testing.T, got *tally) {
	kms := &enclavetest.KMS{}
	old := start(t, func(o *enclavetest.Options) { o.KMS = kms })
	cfg := testConfig()
	cfg.Epochs, cfg.SealEpoch = []uint32{2}, 2
	v := start(t, func(o *enclavetest.Options) { o.KMS, o.Config = kms, cfg })
	h, err := sealed.DecodeHeader(old.header)
	must(t, err)
	h.Epoch = 2
	for _, header := range [][]byte{old.header, sealed.EncodeHeader(h)} {
		v.reboot(t)
		_, err := try[wire.LoadReply](t, v, wire.TypeLoad, &wire.Load{Header: header, Keys: old.entries})
		got.gotErr(err)
	}
	ours, err := sealed.DecodeHeader(v.header)
	must(t, err)
	for i := range old.entries {
		e := old.entry(t, i)
		offer(t, v, got, sealed.EncodeEntry(e), "a key of the old epoch")
		e.Public.Epoch, e.Public.Fingerprint = 2, ours.Fingerprint()
		offer(t, v, got, sealed.EncodeEntry(e), "a key of the old epoch, relabelled")
	}
	v.whole(t)
}

func deniedKey(t *testing.T, got *tally) {
	kms := &enclavetest.KMS{}
	before := start(t, func(o *enclavetest.Options) { o.KMS = kms })
	denied := before.keys[2]
	cfg := testConfig()
	cfg.DenyKeys = []string{denied.KeyID.String()}
	v := bare(t, func(o *enclavetest.Options) { o.KMS, o.Config = kms, cfg })
	v.configure(t)
	v.header, v.entries, v.keys, v.judge.entries = before.header, before.entries, before.keys, before.judge.entries
	offer(t, v, got, before.entries[2], "a denied key")
	c := v.dial(t)
	_, err := enclavetest.Ask[wire.SignReply](c, wire.TypeSign, v.signing(v.ticket(t), 2, 1))
	got.gotErr(err)
	must(t, c.Close())
	_, err = try[wire.LoadReply](t, v, wire.TypeLoad, &wire.Load{Header: v.header, Keys: v.entries[:1]})
	must(t, err)
	v.honest(t)
}

func makeKeys(t *testing.T, got *tally) {
	v := start(t, nil)
	for _, a := range append(record.Algorithms(), "none", "") {
		for _, policy := range []string{"narrow", "wide", "none", ""} {
			if v.cfg.MaxCreate(a, policy) > 0 {
				continue
			}
			_, err := try[wire.AddKeysReply](t, v, wire.TypeAddKeys, &wire.AddKeys{Algorithm: a, Policy: policy, Count: 1})
			got.gotErr(err)
		}
	}
	for _, n := range []uint32{0, wire.MaxAddKeys + 1, 1 << 31, maxKeys - 1} {
		_, err := try[wire.AddKeysReply](t, v, wire.TypeAddKeys, &wire.AddKeys{Algorithm: record.Ed25519, Policy: "narrow", Count: n})
		if err == nil {
			t.Errorf("%d keys were made", n)
		}
		got.gotErr(err)
	}
	made := 2 // by start
	for range maxKeys + 5 {
		c := v.dial(t)
		v.drain(t, c)
		_, err := enclavetest.Ask[wire.AddKeysReply](c, wire.TypeAddKeys, &wire.AddKeys{Algorithm: record.Ed25519, Policy: "narrow", Count: 1})
		got.gotErr(err)
		if err == nil {
			made++
		} else if !errors.Is(err, refusal.CreateLimit) {
			t.Error(err)
		}
		must(t, c.Close())
	}
	if made != maxKeys {
		t.Errorf("%d keys, where %d are permitted", made, maxKeys)
	}
	v.honest(t)
}
