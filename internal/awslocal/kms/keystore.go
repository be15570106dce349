package kms

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// key is one KMS key. Its file holds the secret in the clear.
type key struct {
	ID          string    `json:"key_id"` // UUID
	Created     time.Time `json:"created"`
	Enabled     bool      `json:"enabled"`
	Description string    `json:"description"`
	Secret      []byte    `json:"secret"` // 32 bytes
	Policy      string    `json:"policy"` // as it was put
	Facts       Facts     `json:"facts"`

	parsed keyPolicy
}

// Facts are what DescribeKey and ListGrants tell of a key besides its state.
// They have no effect on what the key does.
type Facts struct {
	MultiRegion bool   `json:"multi_region"`
	Origin      string `json:"origin"`
	KeySpec     string `json:"key_spec"`
	KeyUsage    string `json:"key_usage"`
	Grants      int    `json:"grants"` // how many there are
}

// PlainFacts are those of every key that is made here.
func PlainFacts() Facts {
	return Facts{Origin: "AWS_KMS", KeySpec: "SYMMETRIC_DEFAULT", KeyUsage: "ENCRYPT_DECRYPT"}
}

// keystore keeps one file per key, replaced as a whole.
type keystore struct {
	dir string
	arn func(id string) string

	mu   sync.RWMutex
	keys map[string]key
}

func openKeystore(dir string, arn func(string) string) (*keystore, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the folder of keys: %w", err)
	}
	ks := &keystore{dir: dir, arn: arn, keys: map[string]key{}}
	paths, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil {
		return nil, fmt.Errorf("list keys: %w", err)
	}
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("read a key: %w", err)
		}
		k, err := ks.decode(data)
		if err != nil {
			return nil, fmt.Errorf("read key %s: %w", filepath.Base(path), err)
		}
		if filepath.Base(path) != k.ID+".json" {
			return nil, fmt.Errorf("read key %s: it holds another key", filepath.Base(path))
		}
		ks.keys[k.ID] = k
	}
	return ks, nil
}

func (ks *keystore) decode(data []byte) (key, error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var k key
	if err := dec.Decode(&k); err != nil {
		return key{}, errors.New("not a key file")
	}
	if _, err := parseID(k.ID); err != nil || len(k.Secret) != 32 {
		return key{}, errors.New("not a key file")
	}
	var err error
	k.parsed, err = parsePolicy([]byte(k.Policy), ks.arn(k.ID))
	return k, err
}

func (ks *keystore) get(id string) (key, bool) {
	ks.mu.RLock()
	defer ks.mu.RUnlock()
	k, ok := ks.keys[id]
	return k, ok
}

func (ks *keystore) ids() []string {
	ks.mu.RLock()
	defer ks.mu.RUnlock()
	return slices.Sorted(maps.Keys(ks.keys))
}

// add makes a key with a policy that was parsed for it.
func (ks *keystore) add(k key) error {
	ks.mu.Lock()
	defer ks.mu.Unlock()
	return ks.save(k)
}

// update changes a key by f and keeps the old one where saving fails.
func (ks *keystore) update(id string, f func(*key)) error {
	ks.mu.Lock()
	defer ks.mu.Unlock()
	k, ok := ks.keys[id]
	if !ok {
		return fmt.Errorf("update key: %w", os.ErrNotExist)
	}
	f(&k)
	return ks.save(k)
}

func (ks *keystore) save(k key) error {
	data, err := json.MarshalIndent(k, "", "  ") //nolint:gosec // the emulator keeps its keys in the clear, and says so
	if err != nil {
		return fmt.Errorf("encode key: %w", err)
	}
	if err := writeAtomically(filepath.Join(ks.dir, k.ID+".json"), data); err != nil {
		return err
	}
	ks.keys[k.ID] = k
	return nil
}

// writeAtomically leaves the old file or the new one after any crash.
func writeAtomically(path string, data []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-*") // mode 0600
	if err != nil {
		return fmt.Errorf("write a file: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write a file: %w", err)
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("replace a file: %w", err)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("open a folder: %w", err)
	}
	return errors.Join(dir.Sync(), dir.Close())
}

func newSecret() []byte {
	secret := make([]byte, 32)
	_, _ = rand.Read(secret) // never fails, crypto/rand
	return secret
}

// newID makes a random UUID, version 4.
func newID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails, crypto/rand
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return formatID(b)
}

func formatID(b [16]byte) string {
	h := hex.EncodeToString(b[:])
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}

func parseID(text string) (id [16]byte, err error) {
	b, err := hex.DecodeString(strings.ReplaceAll(text, "-", ""))
	if err != nil || len(b) != len(id) || formatID([16]byte(b)) != text {
		return id, errors.New("not a key id")
	}
	return [16]byte(b), nil
}

// A ciphertext blob is blobMagic || key id (16) || nonce (12) || AES-256-GCM.
const (
	blobMagic  = "keyhold-local-kms-1"
	blobPrefix = len(blobMagic) + 16
	nonceSize  = 12
)

var errBlob = errors.New("not a ciphertext of this key and context")

func (k key) aead() (cipher.AEAD, error) {
	block, err := aes.NewCipher(k.Secret)
	if err != nil {
		return nil, fmt.Errorf("set up AES: %w", err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, fmt.Errorf("set up GCM: %w", err)
	}
	return aead, nil
}

func (k key) seal(plaintext []byte, encCtx map[string]string) ([]byte, error) {
	id, err := parseID(k.ID)
	if err != nil {
		return nil, err
	}
	aead, err := k.aead()
	if err != nil {
		return nil, err
	}
	blob := append([]byte(blobMagic), id[:]...)
	nonce := make([]byte, nonceSize)
	_, _ = rand.Read(nonce) // never fails, crypto/rand
	aad := associatedData(blob, encCtx)
	blob = append(blob, nonce...)
	return aead.Seal(blob, nonce, plaintext, aad), nil
}

func (k key) open(blob []byte, encCtx map[string]string) ([]byte, error) {
	id, err := blobKeyID(blob)
	if err != nil || id != k.ID {
		return nil, errBlob
	}
	aead, err := k.aead()
	if err != nil {
		return nil, err
	}
	nonce, sealed := blob[blobPrefix:blobPrefix+nonceSize], blob[blobPrefix+nonceSize:]
	plaintext, err := aead.Open(nil, nonce, sealed, associatedData(blob[:blobPrefix], encCtx))
	if err != nil {
		return nil, errBlob
	}
	return plaintext, nil
}

func blobKeyID(blob []byte) (string, error) {
	if len(blob) < blobPrefix+nonceSize || string(blob[:len(blobMagic)]) != blobMagic {
		return "", errBlob
	}
	return formatID([16]byte(blob[len(blobMagic):blobPrefix])), nil
}

// associatedData is the blob's prefix and the encryption context, sorted, each
// string behind its length.
func associatedData(prefix []byte, encCtx map[string]string) []byte {
	out := bytes.Clone(prefix)
	for _, name := range slices.Sorted(maps.Keys(encCtx)) {
		for _, s := range []string{name, encCtx[name]} {
			out = binary.BigEndian.AppendUint32(out, uint32(len(s))) //nolint:gosec // bounded by the request's size
			out = append(out, s...)
		}
	}
	return out
}
