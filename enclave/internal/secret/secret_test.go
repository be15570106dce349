package secret_test

import (
	"bytes"
	"encoding/base64"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/fxamacker/cbor/v2"

	"github.com/keyhold/keyhold/enclave/internal/secret"
)

const marker = "marker-7f3a-only-in-the-secret--"

// leaks reports whether text shows the marker in one of the forms that fmt and
// the encoders of the standard library have.
func leaks(text string) bool {
	raw := []byte(marker)
	forms := []string{
		marker,
		hex.EncodeToString(raw),
		strings.ToUpper(hex.EncodeToString(raw)),
		base64.StdEncoding.EncodeToString(raw),
		strings.Trim(fmt.Sprintf("%d", raw), "[]"), // 109 97 114 ...
		"0x6d, 0x61, 0x72",
		"0x6d 0x61 0x72",
	}
	for _, f := range forms {
		if strings.Contains(text, f) {
			return true
		}
	}
	return false
}

type holder struct {
	Exported *secret.Bytes
	pointer  *secret.Bytes
	value    secret.Bytes
	inMap    map[string]*secret.Bytes
	anything any
}

type exported struct{ F *secret.Bytes }

func shapes() map[string]any {
	s := secret.New([]byte(marker))
	h := holder{Exported: s, pointer: s, value: *s, inMap: map[string]*secret.Bytes{"k": s}, anything: *s}
	return map[string]any{
		"pointer":           s,
		"value":             *s,
		"pointer to it":     &s,
		"struct":            h,
		"pointer to struct": &h,
		"slice":             []*secret.Bytes{s},
		"slice of values":   []secret.Bytes{*s},
		"map":               map[string]*secret.Bytes{"k": s},
		"wrapped in error":  fmt.Errorf("open: %v", s),
	}
}

func TestEveryVerbAndFlagPrintsNoSecret(t *testing.T) {
	for name, v := range shapes() {
		for _, flag := range []string{"", "+", "#", "-", " ", "0", "40", "+#", "# "} {
			for verb := 'A'; verb <= 'z'; verb++ {
				if got := fmt.Sprintf("%"+flag+string(verb), v); leaks(got) {
					t.Errorf("%s with %%%s%c prints the secret", name, flag, verb)
				}
			}
		}
	}
}

func TestTheLeakDetectorSeesALeak(t *testing.T) {
	for _, format := range []string{"%s", "%x", "%X", "%v", "%d", "%#v"} {
		if !leaks(fmt.Sprintf(format, []byte(marker))) {
			t.Errorf("a plain slice printed with %s is not detected", format)
		}
	}
}

func TestNoLogHandlerShowsASecret(t *testing.T) {
	for name, v := range shapes() {
		var out bytes.Buffer
		for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
			slog.New(h).With(slog.Any("with", v)).InfoContext(t.Context(), "m", slog.Any("attr", v), slog.Group("g", slog.Any("in", v)))
		}
		if leaks(out.String()) {
			t.Errorf("%s: the log shows the secret", name)
		}
	}
}

func TestEveryEncoderFails(t *testing.T) {
	s := secret.New([]byte(marker))
	encoders := map[string]func(any) ([]byte, error){
		"json": json.Marshal,
		"xml":  xml.Marshal,
		"cbor": cbor.Marshal,
		"gob": func(v any) ([]byte, error) {
			var b bytes.Buffer
			err := gob.NewEncoder(&b).Encode(v)
			return b.Bytes(), err
		},
	}
	for name, encode := range encoders {
		for shape, v := range map[string]any{"pointer": s, "value": *s, "field": exported{s}} {
			out, err := encode(v)
			if !errors.Is(err, secret.ErrEncode) && (err == nil || !strings.Contains(err.Error(), secret.ErrEncode.Error())) {
				t.Errorf("%s of a %s: error %v, want ErrEncode", name, shape, err)
			}
			if leaks(string(out)) {
				t.Errorf("%s of a %s: the output shows the secret", name, shape)
			}
		}
	}
	for name, encode := range map[string]func() ([]byte, error){"text": s.MarshalText, "binary": s.MarshalBinary} {
		if out, err := encode(); !errors.Is(err, secret.ErrEncode) || out != nil {
			t.Errorf("%s: got %d bytes and %v, want ErrEncode", name, len(out), err)
		}
	}
}

func TestDestroyErasesTheBytesInPlace(t *testing.T) {
	raw := []byte(marker)
	s := secret.New(raw)
	s.Destroy()
	s.Destroy()
	if !bytes.Equal(raw, make([]byte, len(marker))) { //nolint:forbidigo // a test on zeros
		t.Error("the bytes are still in memory")
	}
	called := false
	err := s.Use(func([]byte) error { called = true; return nil })
	if !errors.Is(err, secret.ErrDestroyed) || called {
		t.Errorf("Use after Destroy: error %v, called %t", err, called)
	}
	if s.Len() != 0 || s.Equal(s) {
		t.Error("a destroyed secret still has a length or equals itself")
	}
}

func TestANilSecretIsDestroyedAlready(t *testing.T) {
	var s *secret.Bytes
	s.Destroy()
	if err := s.Use(func([]byte) error { return nil }); !errors.Is(err, secret.ErrDestroyed) {
		t.Errorf("Use of nil: %v", err)
	}
	if s.Equal(s) || secret.New(nil).Equal(s) {
		t.Error("nil equals something")
	}
}

func TestEqualComparesContent(t *testing.T) {
	a, b, c := secret.New([]byte("one")), secret.New([]byte("one")), secret.New([]byte("two"))
	if !a.Equal(b) || !a.Equal(a) || a.Equal(c) || a.Equal(secret.New([]byte("on"))) {
		t.Error("Equal is wrong about content")
	}
}

func TestUseHandsOnTheCallersError(t *testing.T) {
	want := errors.New("from f")
	if err := secret.New([]byte("x")).Use(func([]byte) error { return want }); !errors.Is(err, want) {
		t.Errorf("got %v", err)
	}
}

func TestDestroyWaitsForThoseWhoRead(t *testing.T) {
	s := secret.New([]byte(marker))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			err := s.Use(func(b []byte) error {
				if string(b) != marker {
					return errors.New("seen half erased")
				}
				return nil
			})
			if err != nil && !errors.Is(err, secret.ErrDestroyed) {
				t.Error(err)
			}
		})
	}
	wg.Go(s.Destroy)
	wg.Wait()
}
