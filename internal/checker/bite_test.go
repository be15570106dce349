package checker_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/keyhold/keyhold/internal/checker"
	"github.com/keyhold/keyhold/internal/e2e/local"
)

// editor writes to the tables what nobody should.
type editor struct {
	t        *testing.T
	endpoint string
}

// attributes of an item, by name and type.
type attributes map[string]map[string]any

func (e *editor) call(op string, in map[string]any) (out struct {
	Item  attributes
	Items []attributes
},
) {
	e.t.Helper()
	body, err := json.Marshal(in)
	if err != nil {
		e.t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(e.t.Context(), http.MethodPost, e.endpoint, bytes.NewReader(body))
	if err != nil {
		e.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-amz-json-1.0")
	req.Header.Set("X-Amz-Target", "DynamoDB_20120810."+op)
	req.Header.Set("X-Amz-Date", "20260101T000000Z")
	req.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/dynamodb/aws4_request, SignedHeaders=host, Signature=00")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		e.t.Fatal(err)
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		e.t.Fatalf("%s: %d %s %v", op, res.StatusCode, raw, err)
	}
	if err := json.Unmarshal(raw, &out); err != nil {
		e.t.Fatal(err)
	}
	return out
}

func (e *editor) put(table string, item attributes) {
	e.t.Helper()
	e.call("PutItem", map[string]any{"TableName": "keyhold-" + table, "Item": item})
}

func (e *editor) remove(table string, item attributes, keys ...string) {
	e.t.Helper()
	key := attributes{}
	for _, k := range keys {
		key[k] = item[k]
	}
	e.call("DeleteItem", map[string]any{"TableName": "keyhold-" + table, "Key": key})
}

// find returns the first item of a table that fits.
func (e *editor) find(table string, fits func(attributes) bool) attributes {
	e.t.Helper()
	for _, item := range e.call("Scan", map[string]any{"TableName": "keyhold-" + table}).Items {
		if fits(item) {
			return item
		}
	}
	e.t.Fatalf("nothing in table %s fits", table)
	return nil
}

// with returns the item with one attribute changed.
func (a attributes) with(name, kind string, value any) attributes {
	out := attributes{}
	for k, v := range a {
		out[k] = v
	}
	out[name] = map[string]any{kind: value}
	return out
}

// flipped returns the item with one bit of a binary attribute changed, at a place counted from the end.
func (a attributes) flipped(t *testing.T, name string, fromEnd int) attributes {
	t.Helper()
	text, _ := a[name]["B"].(string)
	raw, err := base64.StdEncoding.DecodeString(text)
	if err != nil || len(raw) < fromEnd {
		t.Fatalf("attribute %s: %v", name, err)
	}
	raw[len(raw)-fromEnd] ^= 1
	return a.with(name, "B", base64.StdEncoding.EncodeToString(raw))
}

// moved returns the item with a number changed.
func (a attributes) moved(t *testing.T, name string, by int) attributes {
	t.Helper()
	text, _ := a[name]["N"].(string)
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("attribute %s: %v", name, err)
	}
	return a.with(name, "N", strconv.Itoa(n+by))
}

// TestTheCheckerBites edits the tables of a good run one by one; the checker must find each edit, for the
// promise that it breaks, and nothing once it is undone.
func TestTheCheckerBites(t *testing.T) {
	t.Parallel()
	w := newWork(t, 400, 10, 8)
	w.finish(t, &local.Killer{}, 0)
	e := &editor{t: t, endpoint: w.serve(t)}
	o := w.options(t, e.endpoint)
	good := w.judge(t, o)
	if good.Wrong != 0 || good.Signed != w.records || good.Judged != 50 {
		t.Fatalf("the run before any edit: %+v", good)
	}
	// Of a batch whose receipt is not the first of its lane, so that there is one before it.
	control := e.find("batches", func(a attributes) bool { return a["rq"]["N"] != "" && a["rq"]["N"] != "1" })
	batch, _ := control["b"]["S"].(string)
	of := func(name, value string) func(attributes) bool {
		return func(a attributes) bool { return a[name]["S"] == value }
	}
	part := func(q string) func(attributes) bool {
		return func(a attributes) bool { return a["b"]["S"] == batch && a["q"]["S"] == q }
	}
	any1 := func(attributes) bool { return true }
	ofReceipt := func(a attributes) bool { return a["n"]["N"] == control["rq"]["N"] }
	ofKey := func(a attributes) bool { return a["k"]["B"] == control["k"]["B"] }
	segment := []string{"b", "q"}
	for _, tc := range []struct {
		name  string
		table string
		fits  func(attributes) bool
		keys  []string                                // of the table, where the item is removed
		edit  func(*testing.T, attributes) attributes // nil: the item is removed
		want  string
	}{
		{"a signature", "segments", part("result"), nil, flip("d", 40), "G1: record " + batch},
		{"a recovery id", "segments", part("result"), nil, flip("d", 1), "G1: record " + batch},
		{"a result removed", "segments", part("result"), segment, nil, "G1: batch " + batch},
		{"a payload", "segments", part("payload"), nil, flip("d", 1), "H3: batch " + batch},
		{"a payload removed", "segments", part("payload"), segment, nil, "G1: batch " + batch},
		{"a segment of nobody", "batches", of("b", batch), []string{"b"}, nil, "G1: a segment"},
		{"a receipt's body", "receipts", ofReceipt, nil, flip("d", 150), "H3: receipt"},
		{"a receipt's signature", "receipts", ofReceipt, nil, flip("d", 1), "H3: receipt"},
		{"a receipt removed", "receipts", ofReceipt, []string{"l", "n"}, nil, "H3: "},
		{"a boot document", "boots", any1, nil, flip("d", 1), "H3: boot"},
		{"a boot statement", "boots", any1, nil, flip("st", 1), "H3: boot"},
		{"a boot removed", "boots", any1, []string{"bt"}, nil, "H3: receipt"},
		{"a batch back to READY", "batches", of("b", batch), nil, set("s", "S", "READY"), "G1: batch " + batch},
		{"a batch's fence", "batches", of("b", batch), nil, move("f", 1), "H3: batch " + batch},
		{"a batch's key fence", "batches", of("b", batch), nil, move("kf", 40), "G2: "},
		{"a batch's stamp", "batches", of("b", batch), nil, move("u", 1000), "G2: "},
		{"a batch's claim time", "batches", of("b", batch), nil, move("ca", -3_600_000_000_000), "G3: batch " + batch},
		{"a batch's key", "batches", of("b", batch), nil, flip("k", 1), "H3: batch " + batch},
		{"a batch's count", "batches", of("b", batch), nil, move("n", 1), "G1: batch " + batch},
		{"a batch's receipt", "batches", of("b", batch), nil, move("rq", 1000), "H3: batch " + batch},
		{"a batch's owner", "batches", of("b", batch), nil, set("o", "S", "somebody"), "G2: "},
		{"a lease that is held", "leases", ofKey, nil, set("o", "S", "somebody"), "G5: key"},
		{"a lease's fence", "leases", ofKey, nil, set("f", "N", "0"), "G2: batch"},
		{"a lease removed", "leases", ofKey, []string{"k"}, nil, "G2: "},
		{"a key removed", "sealed_keys", ofKey, []string{"k"}, nil, "H3: receipt"},
		{"an import that is open", "imports", any1, nil, set("s", "S", "OPEN"), "G5: import"},
		{"an import of more", "imports", any1, nil, move("n", 1), "G5: import"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			was := e.find(tc.table, tc.fits)
			if tc.edit == nil {
				e.remove(tc.table, was, tc.keys...)
			} else {
				e.put(tc.table, tc.edit(t, was))
			}
			report := w.judge(t, o)
			e.put(tc.table, was)
			if !strings.Contains(strings.Join(report.Findings, "\n"), tc.want) {
				t.Errorf("the findings %q do not name %q", report.Findings, tc.want)
			}
		})
	}
	t.Run("older idle keys that nobody takes", func(t *testing.T) {
		var added []attributes
		for i := range inFlight + 1 {
			id := base64.StdEncoding.EncodeToString(append(make([]byte, 31), byte(i)))
			added = append(added, attributes{"k": {"B": id}, "f": {"N": "0"}, "u": {"N": "0"}})
			e.put("leases", added[i])
			e.put("sealed_keys", attributes{"k": {"B": id}})
		}
		report := w.judge(t, o)
		for _, a := range added {
			e.remove("leases", a, "k")
			e.remove("sealed_keys", a, "k")
		}
		if !strings.Contains(strings.Join(report.Findings, "\n"), "G4: batch") || report.Overtaken <= inFlight {
			t.Errorf("the findings %q do not name G4", report.Findings)
		}
	})
	for _, file := range []string{w.export, w.history} {
		t.Run("a line of an export", func(t *testing.T) { spoil(t, w, o, file) })
	}
	if again := w.judge(t, o); again.Wrong != 0 {
		t.Errorf("with every edit undone: %+v", again)
	}
}

func flip(name string, fromEnd int) func(*testing.T, attributes) attributes {
	return func(t *testing.T, a attributes) attributes { t.Helper(); return a.flipped(t, name, fromEnd) }
}

func move(name string, by int) func(*testing.T, attributes) attributes {
	return func(t *testing.T, a attributes) attributes { t.Helper(); return a.moved(t, name, by) }
}

func set(name, kind string, value any) func(*testing.T, attributes) attributes {
	return func(_ *testing.T, a attributes) attributes { return a.with(name, kind, value) }
}

// spoil exchanges the batch of one line, and drops one.
func spoil(t *testing.T, w *work, o checker.Options, file string) {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := os.WriteFile(file, raw, 0o600); err != nil {
			t.Error(err)
		}
	}()
	first := bytes.IndexByte(raw, '\n') + 1
	for name, bad := range map[string][]byte{
		"changed": bytes.Replace(raw, []byte("run-b0000007"), []byte("run-b0000008"), 1),
		"dropped": raw[first:],
	} {
		if err := os.WriteFile(file, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		if report := w.judge(t, o); report.Wrong == 0 {
			t.Errorf("a line was %s, and nothing was found", name)
		}
	}
}
