package intake_test

import (
	"strings"
	"testing"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/intake"
)

func TestALineIsOneRecordOrIsRefused(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", record.MaxPayloadLen)
	for _, tc := range []struct{ name, line, id, payload, want string }{
		{"text", `{"text":"hi"}`, "", "hi", ""},
		{"payload", `{"payload":"aGk="}`, "", "hi", ""},
		{"id and text in any order", `{"text":"hi","id":"a-1"}`, "a-1", "hi", ""},
		{"white space around", "  {\"text\" : \"hi\" }\t", "", "hi", ""},
		{"escapes", `{"text":"\u00e9\n"}`, "", "é\n", ""},
		{"the longest payload", `{"text":"` + long + `"}`, "", long, ""},
		{"one byte longer", `{"text":"` + long + `x"}`, "", "", "too long"},
		{"neither", `{"id":"a"}`, "", "", "exactly one"},
		{"both", `{"payload":"aGk=","text":"hi"}`, "", "", "exactly one"},
		{"an empty object", `{}`, "", "", "exactly one"},
		{"an empty text", `{"text":""}`, "", "", "empty"},
		{"base64 without padding", `{"payload":"aGk"}`, "", "", "base64"},
		{"base64 with loose bits", `{"payload":"aGl="}`, "", "", "base64"},
		{"URL base64", `{"payload":"_-=="}`, "", "", "base64"},
		{"unknown key", `{"text":"hi","kind":"raw"}`, "", "", "key other"},
		{"key in another case", `{"Text":"hi"}`, "", "", "key other"},
		{"doubled key", `{"text":"hi","text":"ho"}`, "", "", "twice"},
		{"a number", `{"text":1}`, "", "", "not a string"},
		{"null", `{"text":null}`, "", "", "not a string"},
		{"nested", `{"text":{"text":"hi"}}`, "", "", "not a string"},
		{"an array", `["hi"]`, "", "", "not a JSON object"},
		{"cut off", `{"text":"hi"`, "", "", "not valid JSON"},
		{"trailing value", `{"text":"hi"} {}`, "", "", "more than one"},
		{"trailing bytes", `{"text":"hi"}x`, "", "", "more than one"},
		{"invalid UTF-8", "{\"text\":\"\xff\"}", "", "", "UTF-8"},
		{"an id with a space", `{"id":"a b","text":"hi"}`, "", "", "id"},
		{"an empty id", `{"id":"","text":"hi"}`, "", "", "id"},
		{"an id of 257 bytes", `{"id":"` + strings.Repeat("a", 257) + `","text":"hi"}`, "", "", "id"},
		{"an id in the form of ours", `{"id":"in-1-b0000001.7","text":"hi"}`, "", "", "kept for"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r, err := intake.ParseLine([]byte(tc.line), record.Message)
			if tc.want == "" {
				if err != nil || r.ID != tc.id || string(r.Payload) != tc.payload {
					t.Fatalf("got %q %q, %v", r.ID, r.Payload, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want an error with %q", err, tc.want)
			}
			if strings.Contains(err.Error(), "hi") {
				t.Errorf("the error repeats the input: %v", err)
			}
		})
	}
}

func TestADigestHas32Bytes(t *testing.T) {
	t.Parallel()
	for text, ok := range map[string]bool{strings.Repeat("d", 32): true, strings.Repeat("d", 31): false, strings.Repeat("d", 33): false} {
		if _, err := intake.ParseLine([]byte(`{"text":"`+text+`"}`), record.Digest); (err == nil) != ok {
			t.Errorf("%d bytes: %v", len(text), err)
		}
	}
}

func FuzzParseLine(f *testing.F) {
	for _, s := range []string{`{"text":"hi"}`, `{"id":"a","payload":"aGk="}`, `{"text":"hi","text":"x"}`, `{`, `[]`, `{"text":"\ud800"}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		r, err := intake.ParseLine(line, record.Message)
		if err != nil {
			return
		}
		if len(r.Payload) == 0 || len(r.Payload) > record.MaxPayloadLen || r.ID != "" && record.CheckID(r.ID) != nil {
			t.Fatalf("accepted id %q and %d bytes", r.ID, len(r.Payload))
		}
	})
}
