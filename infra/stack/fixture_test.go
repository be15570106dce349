package stack_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/aws/aws-cdk-go/awscdk/v2"
	"github.com/aws/jsii-runtime-go"
	"github.com/cdklabs/cdk-nag-go/cdknag/v2"

	"github.com/keyhold/keyhold/infra/stack"
	"github.com/keyhold/keyhold/infra/target"
	"github.com/keyhold/keyhold/infra/target/targettest"
)

// checkAll makes the tests validate templates against CloudFormation's own rules
// and run cdk-nag. That costs ten seconds a template, so plain go test does not.
var checkAll = os.Getenv("KEYHOLD_INFRA_CHECK") != ""

func TestMain(m *testing.M) {
	if !checkAll {
		must(os.Setenv("CDK_VALIDATION", "false"))
	}
	code := m.Run()
	jsii.Close()
	os.Exit(code)
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

type object = map[string]any

// template is what was synthesized.
type template struct {
	raw    []byte
	folder string // of the assembly
	object
}

// resource is one of a template.
type resource struct {
	id, kind   string
	properties object
	object
}

// needNode skips where nothing of CDK can run.
func needNode(t testing.TB) {
	t.Helper()
	if _, err := exec.LookPath("node"); err == nil {
		return
	}
	const text = "Node.js is missing, on which CDK runs (Debian: apt-get install nodejs; versions 20, 22 and 24 work)"
	if os.Getenv("KEYHOLD_REQUIRE_SERVICES") != "" || checkAll {
		t.Fatal(text)
	}
	t.Skip(text)
}

// synth makes the template of a target.
func synth(t testing.TB, d *target.Target) (tmpl template, err error) {
	t.Helper()
	needNode(t)
	// What goes wrong on the side of Node arrives as a panic.
	defer func() {
		if r := recover(); r != nil {
			err = asError(r)
		}
	}()
	app := awscdk.NewApp(&awscdk.AppProps{AnalyticsReporting: jsii.Bool(false), Outdir: jsii.String(t.TempDir()), Context: flags(t)})
	if _, err := stack.New(app, d); err != nil {
		return template{}, err
	}
	if checkAll {
		awscdk.Aspects_Of(app).Add(cdknag.NewAwsSolutionsChecks(&cdknag.NagPackProps{Verbose: jsii.Bool(true)}), nil)
	}
	return read(t, *app.Synth(nil).Directory(), d.Name()), nil
}

func asError(panicked any) error { return fmt.Errorf("CDK: %v", panicked) }

// flags are those of cdk.json: the tests shall see what the CLI sees.
func flags(t testing.TB) *map[string]any {
	t.Helper()
	raw, err := os.ReadFile("../cdk.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct{ Context map[string]any }
	if err := json.Unmarshal(raw, &file); err != nil {
		t.Fatal(err)
	}
	if !checkAll {
		delete(file.Context, "@aws-cdk/core:validateAgainstDefaultRules")
	}
	return &file.Context
}

func read(t testing.TB, folder, name string) template {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(folder, name+".template.json"))
	if err != nil {
		t.Fatal(err)
	}
	tmpl := template{raw: raw, folder: folder}
	if err := json.Unmarshal(raw, &tmpl.object); err != nil {
		t.Fatal(err)
	}
	return tmpl
}

// resources of a type, or all where kind is empty.
func (m template) resources(kind string) []resource {
	var out []resource
	all, _ := m.object["Resources"].(object)
	for id, r := range all {
		o, _ := r.(object)
		k, _ := o["Type"].(string)
		p, _ := o["Properties"].(object)
		if kind == "" || k == kind {
			out = append(out, resource{id, k, p, o})
		}
	}
	return out
}

// one resource of a type, whose logical id begins with that.
func (m template) one(t testing.TB, kind, prefix string) resource {
	t.Helper()
	var found []resource
	for _, r := range m.resources(kind) {
		if strings.HasPrefix(r.id, prefix) {
			found = append(found, r)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d resources %s %s*, want one", len(found), kind, prefix)
	}
	return found[0]
}

// at walks into objects.
func at(t testing.TB, v any, path ...string) any {
	t.Helper()
	for i, p := range path {
		o, ok := v.(object)
		if !ok || o[p] == nil {
			t.Fatalf("there is no %s", strings.Join(path[:i+1], "."))
		}
		v = o[p]
	}
	return v
}

type variant struct {
	profile string
	arch    target.Arch
}

func (v variant) String() string { return v.profile + "-" + string(v.arch) }

var variants = []variant{{"dev", target.AMD64}, {"dev", target.ARM64}, {"prod", target.AMD64}, {"prod", target.ARM64}}

var (
	once  sync.Mutex
	cache = map[variant]template{}
)

// running is the template of a deployment that runs one release, made once.
func running(t testing.TB, v variant) template {
	t.Helper()
	once.Lock()
	defer once.Unlock()
	if m, ok := cache[v]; ok {
		return m
	}
	m, err := synth(t, targettest.Read(t, targettest.Values(v.profile, v.arch, targettest.Release(t, "one", v.arch))))
	if err != nil {
		t.Fatal(err)
	}
	cache[v] = m
	return m
}
