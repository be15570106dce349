package main_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"

	"github.com/keyhold/keyhold/internal/awshttp"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/parent/intake"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/dynamo"
)

// keyringID is the one keyring of local mode.
const keyringID = "local#1"

// tables opens the tables of a stack that is up.
func tables(env map[string]string) *dynamo.Store {
	endpoint := env["KEYHOLD_DYNAMODB_ENDPOINT"]
	client := dynamodb.New(dynamodb.Options{
		Region: env["AWS_REGION"], BaseEndpoint: &endpoint, HTTPClient: awshttp.New(awshttp.Options{}),
		Credentials: credentials.NewStaticCredentialsProvider("test", "test", ""),
	})
	return dynamo.New(client, dynamo.Options{Prefix: env["KEYHOLD_TABLE_PREFIX"]})
}

// must ends a test that cannot go on.
func must[T any](t *testing.T, v T, err error) T {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func gcm(t *testing.T, key []byte) cipher.AEAD {
	t.Helper()
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	return must(t, aead, err)
}

// unwrap opens a wrapped data key as the emulated KMS does, whose key lies in the run's folder in the
// clear. The blob is a magic word, the key's id, a nonce and the ciphertext.
func unwrap(t *testing.T, dir string, h *sealed.Header) []byte {
	t.Helper()
	const magic, id, nonce = len("keyhold-local-kms-1"), 16, 12
	file := oneFile(t, dir, "kms", "keys", "*.json")
	var key struct {
		Secret []byte `json:"secret"`
	}
	raw, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(raw, &key)
	}
	if err != nil {
		t.Fatal(err)
	}
	aad := bytes.Clone(h.WrappedDEK[:magic+id])
	context := sealed.EncryptionContext(h.Keyring, h.Epoch)
	for _, name := range slices.Sorted(maps.Keys(context)) {
		for _, s := range []string{name, context[name]} {
			aad = append(binary.BigEndian.AppendUint32(aad, uint32(len(s))), s...)
		}
	}
	blob := h.WrappedDEK[magic+id:]
	dek, err := gcm(t, key.Secret).Open(nil, blob[:nonce], blob[nonce:], aad)
	return must(t, dek, err)
}

// oneFile returns the one file that matches.
func oneFile(t *testing.T, path ...string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(path...))
	if err != nil || len(found) != 1 {
		t.Fatalf("%v: found %v, %v; want one file", path, found, err)
	}
	return found[0]
}

// opened is what must never be seen outside of the enclave.
type opened struct {
	dek     []byte
	root    []byte            // HKDF's extract of it
	private map[string][]byte // scalar, seed or PKCS #8, by key id
	sealing map[string][]byte // the AES key of each entry
}

// open opens every sealed key. It is written from the design, not from enclave/internal/keyring.
func open(t *testing.T, dir string, s *dynamo.Store) opened {
	t.Helper()
	raw, err := s.Keyring(t.Context(), keyringID)
	if err != nil {
		t.Fatal(err)
	}
	h, err := sealed.DecodeHeader(raw)
	if err != nil {
		t.Fatal(err)
	}
	out := opened{dek: unwrap(t, dir, h), private: map[string][]byte{}, sealing: map[string][]byte{}}
	if out.root, err = hkdf.Extract(sha256.New, out.dek, nil); err != nil {
		t.Fatal(err)
	}
	fingerprint := sha256.Sum256(h.WrappedDEK)
	err = s.Keys(t.Context(), keyringID, func(page []store.Key) error {
		for _, k := range page {
			e, err := sealed.DecodeEntry(k.Sealed)
			if err != nil {
				return err
			}
			info := "keyhold-seal-v1\x00" + string(e.Public.KeyID[:]) + string(fingerprint[:])
			key, err := hkdf.Expand(sha256.New, out.root, info, 32)
			if err != nil {
				return err
			}
			id := e.Public.KeyID.String()
			out.sealing[id] = key
			if out.private[id], err = gcm(t, key).Open(nil, e.Nonce, e.Ciphertext, e.Public.AAD()); err != nil {
				return fmt.Errorf("key %s: %w", id, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// needles are the secrets in every spelling that a leak would have.
func (o *opened) needles() *needles {
	n := &needles{}
	spell := func(name string, b []byte) {
		turned := bytes.Clone(b)
		slices.Reverse(turned) // limbs of a big number, least significant first
		text := hex.EncodeToString(b)
		n.add(name, b)
		n.add(name+" turned round", turned)
		n.add(name+" in hex", []byte(text))
		n.add(name+" in upper-case hex", []byte(strings.ToUpper(text)))
		n.base64(name+" in base64", b)
	}
	spell("data key", o.dek)
	spell("root of the keyring", o.root)
	for id, b := range o.private {
		spell("private key "+id, b)
	}
	for id, b := range o.sealing {
		spell("sealing key "+id, b)
	}
	return n
}

// signMarked imports records that hold marker, and waits until they are signed.
func signMarked(t *testing.T, r *running, s *dynamo.Store, marker string, sigLen int) {
	t.Helper()
	var input strings.Builder
	const records = 200
	for i := range records {
		fmt.Fprintf(&input, "{\"id\":\"marked-%d\",\"text\":\"%s %d\"}\n", i, marker, i)
	}
	options := intake.Options{
		ImportID: "marked", Pool: "main", Kind: record.Message, BatchSize: 10, SigLen: sigLen, SpoolDir: t.TempDir(), Now: time.Now,
	}
	sum, err := intake.Run(t.Context(), s, strings.NewReader(input.String()), options)
	if err != nil || sum.Import.Records != records {
		t.Fatalf("import: %+v, %v", sum, err)
	}
	options.ImportID = "broken"
	bad := fmt.Sprintf("{\"id\":\"other\",\"text\":\"%s\",\"%s\":1}\n", marker, marker)
	if _, err := intake.Run(t.Context(), s, strings.NewReader(bad), options); err == nil || strings.Contains(err.Error(), marker) {
		t.Errorf("a broken line: error %q, want one without the payload", err)
	}
	r.until("the marked records are signed", func() bool {
		for shard := range store.ReadyShards {
			if n, err := s.CountReady(t.Context(), shard); err != nil || n > 0 {
				return false
			}
		}
		return true
	})
}

func TestNoSecretIsFoundOutsideOfTheEnclave(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		algorithm record.Algorithm
		keys      int
	}{{record.Secp256k1, 12}, {record.Ed25519, 12}, {record.RSA2048, 3}} {
		t.Run(string(tc.algorithm), func(t *testing.T) {
			t.Parallel()
			w := newWork(t, 200, tc.keys, 10)
			w.algorithm = string(tc.algorithm)
			made := w.start(t)
			made.mustEnd(0, "")
			w.holds(t, made.report())
			r := start(t, w.dir, nil, "up")
			env, parents := r.printed()
			s := tables(env)
			marker := "marker-" + rand.Text()
			signMarked(t, r, s, marker, tc.algorithm.SignatureLen())

			secrets := open(t, w.dir, s)
			if len(secrets.private) != tc.keys {
				t.Fatalf("%d keys were opened, want %d", len(secrets.private), tc.keys)
			}
			metrics, _ := get(t, parents[0]+"/metrics")
			ready, _ := get(t, parents[0]+"/readyz")
			searchMemory(t, r, &secrets, marker)
			r.signal("supervisor", syscall.SIGINT)
			r.mustEnd(0, "")
			searchText(t, w, &secrets, marker, map[string]string{
				"metrics": metrics, "readiness": ready,
				"run's stdout": made.stdout.String(), "run's stderr": made.stderr.String(),
				"up's stdout": r.stdout.String(), "up's stderr": r.stderr.String(),
			})
		})
	}
}

// searchMemory finds no secret in the parent, and, so that this means something, all of them in the
// enclave. Only root may look there: to others the enclave's memory is closed.
func searchMemory(t *testing.T, r *running, secrets *opened, marker string) {
	t.Helper()
	n := secrets.needles()
	n.add("payload", []byte(marker))
	n.base64("payload", []byte(marker))
	found, size, err := n.inMemory(r.signal("parent-0", 0))
	if err != nil {
		t.Fatal(err)
	}
	if found["payload"] == 0 {
		t.Error("the search does not find the payload in the parent, which it passes through")
	}
	delete(found, "payload")
	if len(found) > 0 {
		t.Errorf("found in the parent's memory: %v", found)
	}
	t.Logf("searched %d MiB of the parent", size>>20)

	found, size, err = n.inMemory(r.signal("enclave-0", 0))
	if os.Geteuid() != 0 {
		if err == nil {
			t.Error("the enclave's memory is open to its user")
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range append([]string{"root of the keyring"}, names("private key ", secrets.private)...) {
		if found[name] == 0 {
			t.Errorf("the search does not find the %s in the enclave, which uses it", name)
		}
	}
	for name := range found {
		if strings.Contains(name, " in ") { // hex or base64
			t.Errorf("the enclave spells out a secret: %s", name)
		}
	}
	t.Logf("searched %d MiB of the enclave", size>>20)
}

func names(prefix string, m map[string][]byte) []string {
	var out []string
	for id := range m {
		out = append(out, prefix+id)
	}
	return out
}

// searchText finds no secret in any file of the run or anything it said, and the payload in the
// database alone.
func searchText(t *testing.T, w *work, secrets *opened, marker string, said map[string]string) {
	t.Helper()
	n := secrets.needles()
	n.add("payload", []byte(marker))
	n.base64("payload", []byte(marker))
	search := func(name, text string) {
		found := map[string]int{}
		if err := n.in(strings.NewReader(text), found); err != nil {
			t.Fatal(err)
		}
		switch n := found["payload"]; {
		case n == 0 && name == "dynamodb.db":
			t.Error("the search does not find the payload in the database, which keeps it")
		case n > 0 && !strings.HasPrefix(name, "dynamodb.db"):
			t.Errorf("%s: payload found %d times", name, n)
		}
		delete(found, "payload")
		if len(found) > 0 {
			t.Errorf("%s: found %v", name, found)
		}
	}
	for name, text := range said {
		search(name, text)
	}
	files := 0
	err := filepath.WalkDir(w.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(w.dir, path)
		search(name, string(raw))
		files++
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, file := range map[string]string{"export": w.export, "history": w.history} {
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		search(name, string(raw))
	}
	t.Logf("searched %d files", files)
}

func TestAnEnclaveThatCrashesLeavesNoCore(t *testing.T) {
	t.Parallel()
	if pattern := readFile(t, "/proc/sys/kernel/core_pattern"); strings.ContainsAny(pattern, "|/%") {
		t.Skipf("cores do not go to the working folder here: %q", pattern)
	}
	w := newWork(t, 200, 2, 50)
	w.holds(t, w.finish(t))
	// GOTRACEBACK=crash: a Go program that a signal ends asks for a core.
	r := start(t, w.dir, []string{coresEnv + "=1", "GOTRACEBACK=crash"}, "up")
	env, parents := r.printed()
	r.until("the enclave is ready", func() bool { return live(t, parents[0]) == 1 })
	secrets := open(t, w.dir, tables(env))

	enclave := r.signal("enclave-0", syscall.SIGSEGV)
	r.until("the enclave is started again", func() bool { now := r.signal("enclave-0", 0); return now != 0 && now != enclave })
	if cores := cores(t, w.dir); len(cores) > 0 {
		t.Errorf("the enclave left %v", cores)
	}
	said := readFile(t, filepath.Join(w.dir, "logs", "enclave-0.log"))
	found := map[string]int{}
	if err := secrets.needles().in(strings.NewReader(said), found); err != nil || len(found) > 0 {
		t.Errorf("its last words hold secrets: %v, %v", found, err)
	}
	if !strings.Contains(said, "SIGSEGV") {
		t.Error("it has no last words: this test searched nothing")
	}
	parent := r.signal("parent-0", syscall.SIGSEGV)
	r.until("the parent is started again", func() bool { now := r.signal("parent-0", 0); return now != 0 && now != parent })
	if len(cores(t, w.dir)) == 0 {
		t.Error("the parent left no core: this test would not see one of the enclave")
	}
	r.signal("supervisor", syscall.SIGINT)
	r.mustEnd(0, "")
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	raw, err := os.ReadFile(name)
	return string(must(t, raw, err))
}

func cores(t *testing.T, dir string) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, "core*"))
	return must(t, found, err)
}
