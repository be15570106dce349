package nsmtest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"fmt"
	"maps"
	"math/big"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/keyhold/keyhold/attestation/nsm"
)

// protected is the COSE header {1: -35}, ES384 (RFC 9053, section 2.1).
var protected = []byte{0xa1, 0x01, 0x38, 0x22}

// body is the content of a document before it is encoded.
type body struct {
	moduleID                   string
	at                         time.Time
	pcrs                       map[int][]byte
	publicKey, userData, nonce []byte
}

// payload is a document in the order of fields that AWS writes.
type payload struct {
	ModuleID    string          `cbor:"module_id"`
	Digest      string          `cbor:"digest"`
	Timestamp   uint64          `cbor:"timestamp"`
	PCRs        cbor.RawMessage `cbor:"pcrs"`
	Certificate []byte          `cbor:"certificate"`
	CABundle    [][]byte        `cbor:"cabundle"`
	PublicKey   []byte          `cbor:"public_key"`
	UserData    []byte          `cbor:"user_data"`
	Nonce       []byte          `cbor:"nonce"`
}

// envelope is COSE_Sign1 without its tag, as the device returns it.
type envelope struct {
	_           struct{} `cbor:",toarray"`
	Protected   []byte
	Unprotected map[int]int
	Payload     []byte
	Signature   []byte
}

// sign encodes and signs a document, wrongly where faults say so.
func sign(c chain, b body, faults Faults) ([]byte, error) {
	maps.Copy(b.pcrs, faults.PCRs)
	if faults.Nonce != nil {
		b.nonce = faults.Nonce
	}
	content, err := encode(c, b)
	if err != nil {
		return nil, err
	}
	key := c.leaf.key
	if faults.WrongKey {
		if key, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader); err != nil {
			return nil, fmt.Errorf("generate wrong key: %w", err)
		}
	}
	signature, err := es384(key, content)
	if err != nil {
		return nil, err
	}
	if faults.MangledSignature {
		signature[len(signature)-1] ^= 1
	}
	doc, err := cbor.Marshal(envelope{
		Protected: protected, Unprotected: map[int]int{}, Payload: content, Signature: signature,
	})
	if err != nil {
		return nil, fmt.Errorf("encode envelope: %w", err)
	}
	return doc, nil
}

func encode(c chain, b body) ([]byte, error) {
	sorted, err := cbor.EncOptions{Sort: cbor.SortBytewiseLexical}.EncMode()
	if err != nil {
		return nil, fmt.Errorf("CBOR options: %w", err)
	}
	pcrs, err := sorted.Marshal(b.pcrs)
	if err != nil {
		return nil, fmt.Errorf("encode registers: %w", err)
	}
	content, err := cbor.Marshal(payload{
		ModuleID: b.moduleID, Digest: "SHA384", Timestamp: uint64(b.at.UnixMilli()), PCRs: pcrs,
		Certificate: c.leaf.cert.Raw, CABundle: c.bundle,
		PublicKey: orNil(b.publicKey), UserData: orNil(b.userData), Nonce: orNil(b.nonce),
	})
	if err != nil {
		return nil, fmt.Errorf("encode document: %w", err)
	}
	return content, nil
}

// es384 signs the Sig_structure of RFC 9052, section 4.4: r || s, 48 bytes each.
func es384(key *ecdsa.PrivateKey, content []byte) ([]byte, error) {
	toSign, err := cbor.Marshal([]any{"Signature1", protected, []byte{}, content})
	if err != nil {
		return nil, fmt.Errorf("encode what is signed: %w", err)
	}
	digest := sha512.Sum384(toSign)
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		return nil, fmt.Errorf("sign document: %w", err)
	}
	signature := make([]byte, 2*nsm.PCRSize)
	half := func(i int, v *big.Int) { v.FillBytes(signature[i*nsm.PCRSize : (i+1)*nsm.PCRSize]) }
	half(0, r)
	half(1, s)
	return signature, nil
}

// orNil makes an empty field CBOR null, as the device does.
func orNil(b []byte) []byte {
	if len(b) == 0 {
		return nil
	}
	return b
}
