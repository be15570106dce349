package main_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/memory"

	main "github.com/keyhold/keyhold/infra/lambda/ingest"
)

var now = time.Date(2026, 11, 21, 4, 0, 0, 0, time.UTC)

// bucket has files by name.
type bucket map[string]string

func (b bucket) Open(_ context.Context, name, key, version string) (io.ReadCloser, error) {
	text, ok := b[key]
	if !ok || name != "archive" || version != "v1" {
		return nil, errors.New("there is no such file")
	}
	return io.NopCloser(strings.NewReader(text)), nil
}

// world is a store with one key in the pool payouts.
func world(t *testing.T, files bucket) (*main.Ingest, *memory.Store) {
	t.Helper()
	s := memory.New()
	public := append([]byte{4}, bytes.Repeat([]byte{7}, 64)...)
	id := sealed.KeyID(record.Secp256k1, public)
	entry := sealed.EncodeEntry(&sealed.Entry{Public: sealed.Public{
		Version: 1, Keyring: "main", Epoch: 1, KeyID: id, Algorithm: record.Secp256k1, PublicKey: public,
		Address: "0x0000000000000000000000000000000000000000", Policy: "payouts", Fingerprint: sealed.Fingerprint{1},
	}, Nonce: make([]byte, sealed.NonceLen), Ciphertext: make([]byte, 48)})
	if err := s.PutKeys(t.Context(), []store.Key{{ID: id, Keyring: "main#1", Pool: "payouts", Sealed: entry}}); err != nil {
		t.Fatal(err)
	}
	return &main.Ingest{Bucket: "archive", Store: s, Objects: files, Now: func() time.Time { return now }, Logger: slog.New(slog.DiscardHandler)}, s
}

// told is what S3 puts into the queue about a file, and what Lambda makes of it.
func told(t *testing.T, where, key string) []byte {
	t.Helper()
	notice, err := json.Marshal(map[string]any{"Records": []any{map[string]any{"s3": map[string]any{
		"bucket": map[string]any{"name": where}, "object": map[string]any{"key": key, "versionId": "v1"},
	}}}})
	if err != nil {
		t.Fatal(err)
	}
	return message(t, string(notice))
}

func message(t *testing.T, body string) []byte {
	t.Helper()
	b, err := json.Marshal(map[string]any{"Records": []any{map[string]any{"messageId": "m", "body": body}}})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const two = `{"text": "one"}` + "\n" + `{"text": "two"}` + "\n"

func TestAFileIsImportedOnceHoweverOftenItIsTold(t *testing.T) {
	t.Parallel()
	i, s := world(t, bucket{"incoming/payouts/message/a b.jsonl": two})
	for range 2 {
		if err := main.TestingOnlyInvoke(t.Context(), i, told(t, "archive", "incoming/payouts/message/a+b.jsonl")); err != nil {
			t.Fatal(err)
		}
	}
	all, err := s.Imports(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 1 || all[0].State != store.ImportDone || all[0].Records != 2 || all[0].Pool != "payouts" || all[0].Kind != record.Message {
		t.Errorf("imports: %+v", all)
	}
}

func TestWhatIsNoFileToImportIsRefused(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		payload func(t *testing.T) []byte
	}{
		{"another bucket", func(t *testing.T) []byte {
			t.Helper()
			return told(t, "other", "incoming/payouts/message/a.jsonl")
		}},
		{"another place", func(t *testing.T) []byte {
			t.Helper()
			return told(t, "archive", "outgoing/payouts/message/a.jsonl")
		}},
		{"a deeper place", func(t *testing.T) []byte {
			t.Helper()
			return told(t, "archive", "incoming/x/payouts/message/a.jsonl")
		}},
		{"no kind", func(t *testing.T) []byte {
			t.Helper()
			return told(t, "archive", "incoming/payouts/letter/a.jsonl")
		}},
		{"no pool", func(t *testing.T) []byte {
			t.Helper()
			return told(t, "archive", "incoming//message/a.jsonl")
		}},
		{"a pool without keys", func(t *testing.T) []byte {
			t.Helper()
			return told(t, "archive", "incoming/empty/message/a.jsonl")
		}},
		{"a file that is gone", func(t *testing.T) []byte {
			t.Helper()
			return told(t, "archive", "incoming/payouts/message/gone.jsonl")
		}},
		{"a file with a bad line", func(t *testing.T) []byte {
			t.Helper()
			return told(t, "archive", "incoming/payouts/message/bad.jsonl")
		}},
		{"no notification", func(t *testing.T) []byte {
			t.Helper()
			return message(t, "hello")
		}},
		{"an empty notification", func(t *testing.T) []byte {
			t.Helper()
			return message(t, "{}")
		}},
		{"no event of a queue", func(*testing.T) []byte { return []byte("{}") }},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			i, s := world(t, bucket{
				"incoming/payouts/message/bad.jsonl": two + `{"text": ""}` + "\n", "incoming/empty/message/a.jsonl": two,
				"outgoing/payouts/message/a.jsonl": two, "incoming/x/payouts/message/a.jsonl": two, "incoming/payouts/letter/a.jsonl": two,
			})
			if err := main.TestingOnlyInvoke(t.Context(), i, test.payload(t)); err == nil {
				t.Error("it was taken")
			}
			if all, err := s.Imports(t.Context()); err != nil || len(all) > 0 {
				t.Errorf("imports: %+v, %v", all, err)
			}
		})
	}
}

func TestTheTestOfANotificationIsNoFile(t *testing.T) {
	t.Parallel()
	i, _ := world(t, nil)
	if err := main.TestingOnlyInvoke(t.Context(), i, message(t, `{"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "archive"}`)); err != nil {
		t.Error(err)
	}
}
