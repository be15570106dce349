package stack_test

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
	"github.com/keyhold/keyhold/parent/store/dynamo"

	"github.com/keyhold/keyhold/infra/calls"
	"github.com/keyhold/keyhold/infra/stack"
	"github.com/keyhold/keyhold/infra/target"
)

const (
	module    = "github.com/keyhold/keyhold/"
	storeType = module + "parent/store/dynamo.Store"
)

// The programs of the two modules, read once: it takes some seconds.
var (
	products = sync.OnceValues(func() (*calls.Program, error) {
		return calls.Load("../..", "./cmd/parent", "./cmd/keyhold", "./cmd/enclave")
	})
	functions = sync.OnceValues(func() (*calls.Program, error) {
		return calls.Load("..", "./lambda/control", "./lambda/ingest")
	})
)

func reach(t *testing.T, path, function string) *calls.Reach {
	t.Helper()
	if !checkAll {
		t.Skip("set KEYHOLD_INFRA_CHECK=1, or run make infra-check: this reads all of the program's source")
	}
	load := products
	if strings.HasPrefix(path, "infra/") {
		load = functions
	}
	p, err := load()
	if err != nil {
		t.Fatal(err)
	}
	r, err := p.From(module+path, function)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// requests is one call of each method of the store, with arguments that pass its
// checks.
var requests = map[string]func(ctx context.Context, s *dynamo.Store) error{
	"AbortImport": func(ctx context.Context, s *dynamo.Store) error { return second(s.AbortImport(ctx, "b")) },
	"Boots":       func(ctx context.Context, s *dynamo.Store) error { return second(s.Boots(ctx)) },
	"Imports":     func(ctx context.Context, s *dynamo.Store) error { return second(s.Imports(ctx)) },
	"Receipts": func(ctx context.Context, s *dynamo.Store) error {
		return s.Receipts(ctx, record.BootID{1}, 1, 1, func(store.Receipt) error { return nil })
	},
	"Record":      func(ctx context.Context, s *dynamo.Store) error { return second(s.Record(ctx, "r")) },
	"Requeue":     func(ctx context.Context, s *dynamo.Store) error { return s.Requeue(ctx, "b-1", now) },
	"Batch":       func(ctx context.Context, s *dynamo.Store) error { return second(s.Batch(ctx, "b-1")) },
	"CheckTables": func(ctx context.Context, s *dynamo.Store) error { return s.CheckTables(ctx) },
	"Claim": func(ctx context.Context, s *dynamo.Store) error {
		return second(s.Claim(ctx, store.Claim{Batch: batch(record.Ready), KeyID: record.KeyID{1}, ClaimID: "c", Owner: "o", Now: now}))
	},
	"Commit": func(ctx context.Context, s *dynamo.Store) error {
		return s.Commit(ctx, store.Commit{Batch: batch(record.Claimed), Result: []byte{1}, Now: now})
	},
	"CountReady":   func(ctx context.Context, s *dynamo.Store) error { return second(s.CountReady(ctx, 0)) },
	"FinishImport": func(ctx context.Context, s *dynamo.Store) error { return s.FinishImport(ctx, opened()) },
	"Idle":         func(ctx context.Context, s *dynamo.Store) error { return second(s.Idle(ctx, "p", 0, 1)) },
	"Import":       func(ctx context.Context, s *dynamo.Store) error { return second(s.Import(ctx, "i")) },
	"Key":          func(ctx context.Context, s *dynamo.Store) error { return second(s.Key(ctx, record.KeyID{1})) },
	"Keyring":      func(ctx context.Context, s *dynamo.Store) error { return second(s.Keyring(ctx, "k#1")) },
	"Keys": func(ctx context.Context, s *dynamo.Store) error {
		return s.Keys(ctx, "k#1", func([]store.Key) error { return nil })
	},
	"Lease": func(ctx context.Context, s *dynamo.Store) error { return second(s.Lease(ctx, record.KeyID{1})) },
	"NoteCrash": func(ctx context.Context, s *dynamo.Store) error {
		return s.NoteCrash(ctx, batch(record.Claimed), []uint32{0})
	},
	"OpenImport": func(ctx context.Context, s *dynamo.Store) error { return second(s.OpenImport(ctx, opened())) },
	"Payload":    func(ctx context.Context, s *dynamo.Store) error { return second(s.Payload(ctx, "b-1")) },
	"PutBatch":   func(ctx context.Context, s *dynamo.Store) error { return s.PutBatch(ctx, batch(record.Ready)) },
	"PutBoot": func(ctx context.Context, s *dynamo.Store) error {
		return s.PutBoot(ctx, store.Boot{ID: record.BootID{1}, Document: []byte{1}, Statement: []byte{1}, SeenAt: now})
	},
	"PutKeyring": func(ctx context.Context, s *dynamo.Store) error { return s.PutKeyring(ctx, "k#1", []byte{1}) },
	"PutKeys": func(ctx context.Context, s *dynamo.Store) error {
		return s.PutKeys(ctx, []store.Key{{ID: record.KeyID{1}, Keyring: "k#1", Pool: "p", Sealed: []byte{1}}})
	},
	"PutPayload": func(ctx context.Context, s *dynamo.Store) error { return second(s.PutPayload(ctx, "b-1", []byte{1})) },
	"PutReceipt": func(ctx context.Context, s *dynamo.Store) error {
		return s.PutReceipt(ctx, store.Receipt{Ref: store.ReceiptRef{BootID: record.BootID{1}, Lane: 1, Seq: 1}, Signed: []byte{1}})
	},
	"Ready": func(ctx context.Context, s *dynamo.Store) error { return second(s.Ready(ctx, 0, now, 1, "")) },
	"Release": func(ctx context.Context, s *dynamo.Store) error {
		return s.Release(ctx, batch(record.Claimed), store.End{State: record.Ready, Now: now})
	},
	"ReserveRecord": func(ctx context.Context, s *dynamo.Store) error {
		ref := store.RecordRef{ID: "r", BatchID: "b-1", PayloadHash: [32]byte{1}}
		_, err := s.ReserveRecord(ctx, ref, nil)
		_, again := s.ReserveRecord(ctx, ref, &ref)
		return cmp.Or(err, again)
	},
	"Receipt": func(ctx context.Context, s *dynamo.Store) error {
		return second(s.Receipt(ctx, store.ReceiptRef{BootID: record.BootID{1}, Lane: 1, Seq: 1}))
	},
	"Boot":   func(ctx context.Context, s *dynamo.Store) error { return second(s.Boot(ctx, record.BootID{1})) },
	"Result": func(ctx context.Context, s *dynamo.Store) error { return second(s.Result(ctx, "b-1")) },
}

var now = time.Date(2026, 11, 21, 0, 0, 0, 0, time.UTC)

func second[T any](_ T, err error) error { return err }

func batch(state record.State) store.Batch {
	return store.Batch{
		ID: "b-1", ImportID: "b", State: state, Pool: "p", Kind: record.Message, KeyID: record.KeyID{1}, Fence: 1, KeyFence: 1,
		ClaimID: "c", Owner: "o", Count: 1, PayloadRoot: [32]byte{1}, VisibleAt: now,
	}
}

func opened() store.Import {
	return store.Import{ID: "b", State: store.ImportOpen, InputHash: [32]byte{1}, BatchSize: 1, Pool: "p", Kind: record.Message, Records: 1, CreatedAt: now}
}

// recorded is what a program asks of the tables, and by which operations.
func recorded(t *testing.T, r *calls.Reach, but ...string) ([]calls.Request, []calls.Call) {
	t.Helper()
	var asked []calls.Request
	var by []calls.Call
	for _, answer := range []calls.Answer{calls.Nothing, calls.Refused, calls.Refused2} {
		rec := &calls.Recorder{Answer: answer, Old: map[string]string{"imports": abortedHalfway}}
		s := dynamo.New(rec.Client(), dynamo.Options{})
		for _, m := range r.Methods(storeType) {
			if slices.Contains(but, m) {
				continue
			}
			call, ok := requests[m]
			if !ok {
				t.Fatalf("the store's %s is called, and this test does not know with what", m)
			}
			_ = call(t.Context(), s) // an empty answer is an error of most
		}
		asked, by = append(asked, rec.Requests()...), append(by, rec.Operations()...)
	}
	return unique(asked), unique(by)
}

// abortedHalfway is an import whose abort goes on: it had one batch, which is to be
// deleted.
const abortedHalfway = `{"i": {"S": "b"}, "s": {"S": "ABORTED"}, "e": {"N": "1"}}`

func unique[T comparable](list []T) []T {
	seen := map[T]bool{}
	return slices.DeleteFunc(list, func(v T) bool {
		was := seen[v]
		seen[v] = true
		return was
	})
}

func sorted(list []calls.Request) []calls.Request {
	return slices.SortedFunc(slices.Values(list), func(a, b calls.Request) int {
		return cmp.Or(cmp.Compare(a.Table, b.Table), cmp.Compare(a.Index, b.Index), cmp.Compare(a.Action, b.Action))
	})
}

func dynamoCalls(r *calls.Reach) []calls.Call {
	return slices.DeleteFunc(slices.Clone(r.Calls), func(c calls.Call) bool { return c.Service != "dynamodb" })
}

func TestRolesMayDoWithTablesWhatTheirProgramsDoAndNothingElse(t *testing.T) {
	for _, role := range []struct{ name, path, function string }{
		{"parent", "cmd/parent", "main"},
		{"ingest", "infra/lambda/ingest", "main"},
		{"control", "infra/lambda/control", "main"},
	} {
		t.Run(role.name, func(t *testing.T) {
			r := reach(t, role.path, role.function)
			asked, by := recorded(t, r)
			if role.name == "parent" {
				asked = append(asked, allDescribed(t)...)
				asked = unique(asked)
			}
			if diff := gocmp.Diff(sorted(asked), sorted(stack.TestingOnlyAccess(role.name))); diff != "" {
				t.Errorf("the program asks for (-), the role may (+): %s", diff)
			}
			// Whatever operation the code can get at, the recording has seen.
			slices.SortFunc(by, func(a, b calls.Call) int { return cmp.Compare(a.Action, b.Action) })
			if diff := gocmp.Diff(dynamoCalls(r), by); diff != "" {
				t.Errorf("reached (-), recorded (+): %s", diff)
			}
		})
	}
}

// allDescribed is CheckTables on tables that are all there: the recorder has none,
// and it stops at the first that is missing.
func allDescribed(t *testing.T) []calls.Request {
	t.Helper()
	var out []calls.Request
	for _, in := range dynamo.Tables("") {
		out = append(out, calls.Request{Table: *in.TableName, Action: "DescribeTable"})
	}
	return out
}

func TestWhileKeysAreMadeTheParentRoleMayStoreThem(t *testing.T) {
	asked, _ := recorded(t, reach(t, "cmd/keyhold", "createKeyring"))
	may := append(stack.TestingOnlyAccess("parent"), stack.TestingOnlyAccess("creator")...)
	needed := map[calls.Request]bool{}
	for _, a := range asked {
		needed[a] = true
		if !slices.Contains(may, a) {
			t.Errorf("keyhold keyring create asks for %v, and the role may not", a)
		}
	}
	for _, a := range stack.TestingOnlyAccess("creator") {
		if !needed[a] {
			t.Errorf("the role may %v, and keyhold keyring create does not ask for it", a)
		}
	}
}

// What the tool does to make tables and keys is not for operators; everything else
// that it can get at is.
func TestOperatorsMayDoWhatTheirToolDoes(t *testing.T) {
	r := reach(t, "cmd/keyhold", "main")
	asked, _ := recorded(t, r, "CreateTables", "PutKeyring", "PutKeys")
	asked = unique(append(asked, allDescribed(t)...))
	if diff := gocmp.Diff(sorted(asked), sorted(stack.TestingOnlyAccess("operator"))); diff != "" {
		t.Errorf("the tool asks for (-), operators may (+): %s", diff)
	}
}

func TestFunctionsMayCallWhatTheyCall(t *testing.T) {
	tmpl := running(t, variant{"prod", target.AMD64})
	for _, f := range []struct{ role, path string }{{"ControlFunctionRole", "infra/lambda/control"}, {"IngestFunctionRole", "infra/lambda/ingest"}} {
		t.Run(f.role, func(t *testing.T) {
			var want []string
			for _, c := range reach(t, f.path, "main").Calls {
				if c.Service != "dynamodb" {
					want = append(want, c.String())
				}
			}
			var got []string
			for _, a := range actions(t, tmpl, f.role) {
				// Of the queue Lambda itself reads; versions of objects are read by the
				// same call; keys are used by services; logs are written by Lambda.
				switch service, _, _ := strings.Cut(a, ":"); {
				case service == "dynamodb", service == "sqs", service == "kms", service == "logs", a == "s3:GetObjectVersion":
				default:
					got = append(got, a)
				}
			}
			slices.Sort(got)
			if diff := gocmp.Diff(want, slices.Compact(got)); diff != "" {
				t.Errorf("it calls (-), its role may (+): %s", diff)
			}
		})
	}
}

// actions of all policies of a role, by the beginning of its logical id.
func actions(t *testing.T, m template, role string) []string {
	t.Helper()
	id := m.one(t, "AWS::IAM::Role", role).id
	var out []string
	for _, p := range m.resources("AWS::IAM::Policy") {
		text, err := json.Marshal(p.properties["Roles"])
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), `"`+id+`"`) {
			continue
		}
		for _, s := range list(at(t, p.properties, "PolicyDocument", "Statement")) {
			for _, a := range list(at(t, s, "Action")) {
				out = append(out, a.(string))
			}
		}
	}
	slices.Sort(out)
	return out
}

// list is v, or v alone.
func list(v any) []any {
	if l, ok := v.([]any); ok {
		return l
	}
	return []any{v}
}

// Permissions for tables come from the lists that are compared with the code, and
// from nowhere else.
func TestNoOtherPolicyIsAboutTables(t *testing.T) {
	tmpl := running(t, variant{"prod", target.AMD64})
	for _, p := range tmpl.resources("AWS::IAM::Policy") {
		ours := strings.HasPrefix(p.id, "ParentTables") || strings.HasPrefix(p.id, "IngestTables") || strings.HasPrefix(p.id, "ControlTables")
		text, err := json.Marshal(p.properties["PolicyDocument"])
		if err != nil {
			t.Fatal(err)
		}
		if has := strings.Contains(string(text), "dynamodb:"); has != ours {
			t.Errorf("policy %s: about tables %v, want %v", p.id, has, ours)
		}
	}
}

func TestTheEnclaveAsksKMSForNothingElseThanItMay(t *testing.T) {
	tmpl := running(t, variant{"prod", target.AMD64})
	var may []any
	for _, e := range tmpl.resources("AWS::EC2::VPCEndpoint") {
		if strings.HasPrefix(e.id, "VpcKms") {
			may = list(at(t, list(at(t, e.properties, "PolicyDocument", "Statement"))[0], "Action"))
		}
	}
	var asks, lets []string
	for _, c := range reach(t, "cmd/enclave", "main").Calls {
		asks = append(asks, c.String())
	}
	for _, a := range may {
		lets = append(lets, fmt.Sprint(a))
	}
	slices.Sort(lets)
	if diff := gocmp.Diff(asks, lets); diff != "" {
		t.Errorf("the enclave asks (-), the endpoint lets through (+): %s", diff)
	}
}
