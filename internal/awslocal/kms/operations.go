package kms

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"strings"
)

type operation func(s *Server, principal string, body []byte) (any, *apiError)

// operations are those that Keyhold and its tools call.
var operations = map[string]operation{
	"CreateKey":       (*Server).createKey,
	"DescribeKey":     (*Server).describeKey,
	"GenerateDataKey": (*Server).generateDataKey,
	"Decrypt":         (*Server).decrypt,
	"GetKeyPolicy":    (*Server).getKeyPolicy,
	"PutKeyPolicy":    (*Server).putKeyPolicy,
	"ListGrants":      (*Server).listGrants,
}

// decode refuses fields that are not emulated: a DryRun that is ignored would
// be worse than one that is refused.
func decode(body []byte, into any) *apiError {
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return refuse("SerializationException", "the request is not JSON, or has a field that the local KMS does not know")
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return refuse("SerializationException", "trailing data")
	}
	return nil
}

// find resolves a bare key id or an ARN of this account and region.
func (s *Server) find(keyID string) (key, *apiError) {
	if keyID == "" {
		return key{}, invalid("KeyId is missing")
	}
	id := strings.TrimPrefix(keyID, s.arnPrefix())
	k, ok := s.keys.get(id)
	if !ok {
		return key{}, refuse("NotFoundException", "Key '"+s.arnPrefix()+"...' does not exist")
	}
	return k, nil
}

// authorize asks the key's policy. recipient is nil for a request without one.
func (s *Server) authorize(k key, principal, action string, encCtx map[string]string, rec *recipient) *apiError {
	context := map[string]string{
		"aws:principalarn":     principal,
		"aws:principalaccount": accountOf(principal),
		"kms:calleraccount":    accountOf(principal),
	}
	for name, v := range encCtx {
		name = "kms:encryptioncontext:" + strings.ToLower(name)
		if _, twice := context[name]; twice {
			return invalid("two names of the encryption context differ in case only, which the local KMS refuses")
		}
		context[name] = v
	}
	rec.addConditions(context)
	if d := k.parsed.decide(access{principal: principal, action: action, context: context}); d != allowed {
		return denied(principal, action, s.keyARN(k.ID), string(d))
	}
	return nil
}

// use finds a key, checks the attestation document and asks the policy: the part
// that GenerateDataKey and Decrypt share.
func (s *Server) use(keyID, principal, action string, encCtx map[string]string, in *recipientInput) (key, *recipient, *apiError) {
	k, apiErr := s.find(keyID)
	if apiErr != nil {
		return key{}, nil, apiErr
	}
	var rec *recipient
	if in != nil {
		if rec, apiErr = s.verifyRecipient(in); apiErr != nil {
			return key{}, nil, apiErr
		}
	}
	if apiErr := s.authorize(k, principal, action, encCtx, rec); apiErr != nil {
		return key{}, nil, apiErr
	}
	if !k.Enabled {
		return key{}, nil, refuse("DisabledException", s.keyARN(k.ID)+" is disabled.")
	}
	return k, rec, nil
}

// release puts a plaintext into the answer, sealed where there is a recipient.
func (s *Server) release(rec *recipient, plaintext []byte) (bare, sealed []byte, apiErr *apiError) {
	if rec == nil {
		return plaintext, nil, nil
	}
	enc := s.opt.Encoding
	if enc == Alternate {
		enc = Constructed + Encoding(s.sealed.Add(1)%2)
	}
	sealed, err := rec.seal(plaintext, enc)
	if err != nil {
		return nil, nil, refuse("KMSInternalException", "")
	}
	return nil, sealed, nil
}

type generateDataKeyInput struct {
	KeyID             string `json:"KeyId"`
	KeySpec           string
	NumberOfBytes     *int
	EncryptionContext map[string]string
	Recipient         *recipientInput
}

func (in *generateDataKeyInput) size() int {
	switch {
	case in.NumberOfBytes != nil && in.KeySpec == "" && *in.NumberOfBytes >= 1 && *in.NumberOfBytes <= 1024:
		return *in.NumberOfBytes
	case in.NumberOfBytes == nil && in.KeySpec == "AES_256":
		return 32
	case in.NumberOfBytes == nil && in.KeySpec == "AES_128":
		return 16
	default:
		return 0
	}
}

type dataKeyAnswer struct {
	CiphertextBlob         []byte
	Plaintext              []byte `json:",omitempty"`
	CiphertextForRecipient []byte `json:",omitempty"`
	KeyID                  string `json:"KeyId"`
}

func (s *Server) generateDataKey(principal string, body []byte) (any, *apiError) {
	var in generateDataKeyInput
	if apiErr := decode(body, &in); apiErr != nil {
		return nil, apiErr
	}
	size := in.size()
	if size == 0 {
		return nil, invalid("Please specify either number of bytes or key spec.")
	}
	k, rec, apiErr := s.use(in.KeyID, principal, "kms:GenerateDataKey", in.EncryptionContext, in.Recipient)
	if apiErr != nil {
		return nil, apiErr
	}
	dataKey := make([]byte, size)
	_, _ = rand.Read(dataKey) // never fails, crypto/rand
	blob, err := k.seal(dataKey, in.EncryptionContext)
	if err != nil {
		return nil, refuse("KMSInternalException", "")
	}
	plaintext, sealed, apiErr := s.release(rec, dataKey)
	if apiErr != nil {
		return nil, apiErr
	}
	return dataKeyAnswer{CiphertextBlob: blob, Plaintext: plaintext, CiphertextForRecipient: sealed, KeyID: s.keyARN(k.ID)}, nil
}

type decryptInput struct {
	KeyID               string `json:"KeyId"`
	CiphertextBlob      []byte
	EncryptionAlgorithm string
	EncryptionContext   map[string]string
	Recipient           *recipientInput
}

type decryptAnswer struct {
	Plaintext              []byte `json:",omitempty"`
	CiphertextForRecipient []byte `json:",omitempty"`
	KeyID                  string `json:"KeyId"`
	EncryptionAlgorithm    string
}

func (s *Server) decrypt(principal string, body []byte) (any, *apiError) {
	var in decryptInput
	if apiErr := decode(body, &in); apiErr != nil {
		return nil, apiErr
	}
	if in.EncryptionAlgorithm != "" && in.EncryptionAlgorithm != "SYMMETRIC_DEFAULT" {
		return nil, refuse("InvalidKeyUsageException", "the key is symmetric")
	}
	blobID, err := blobKeyID(in.CiphertextBlob)
	if err != nil {
		return nil, refuse("InvalidCiphertextException", "")
	}
	if in.KeyID == "" { // KMS takes the key from the blob
		in.KeyID = blobID
	}
	k, rec, apiErr := s.use(in.KeyID, principal, "kms:Decrypt", in.EncryptionContext, in.Recipient)
	if apiErr != nil {
		return nil, apiErr
	}
	if blobID != k.ID {
		return nil, refuse("IncorrectKeyException", "The key ID in the request does not identify a CMK that can perform this operation.")
	}
	opened, err := k.open(in.CiphertextBlob, in.EncryptionContext)
	if err != nil {
		return nil, refuse("InvalidCiphertextException", "")
	}
	plaintext, sealed, apiErr := s.release(rec, opened)
	if apiErr != nil {
		return nil, apiErr
	}
	return decryptAnswer{Plaintext: plaintext, CiphertextForRecipient: sealed, KeyID: s.keyARN(k.ID), EncryptionAlgorithm: "SYMMETRIC_DEFAULT"}, nil
}
