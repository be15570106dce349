// Package calls finds out which AWS operations a program can make, by following
// its code from a function: every function that can be reached, through interfaces too,
// and every method of an SDK client among them. It refuses a program that does not
// compile. It is for tests: nothing deployed imports it.
package calls

import (
	"errors"
	"fmt"
	"go/types"
	"maps"
	"slices"
	"strings"

	"golang.org/x/tools/go/callgraph"
	"golang.org/x/tools/go/callgraph/rta"
	"golang.org/x/tools/go/callgraph/vta"
	"golang.org/x/tools/go/packages"
	"golang.org/x/tools/go/ssa"
	"golang.org/x/tools/go/ssa/ssautil"
)

const clients = "github.com/aws/aws-sdk-go-v2/service/"

// Call is an operation of a service, in the spelling of IAM.
type Call struct {
	Service string // dynamodb
	Action  string // PutItem
}

func (c Call) String() string { return c.Service + ":" + c.Action }

// Program is some main packages and all that they import.
type Program struct {
	made map[string]*ssa.Package // by import path
}

// Load reads main packages, named as go list names them in dir.
func Load(dir string, paths ...string) (*Program, error) {
	loaded, err := packages.Load(&packages.Config{Mode: packages.LoadAllSyntax, Dir: dir}, paths...)
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	var errs []error
	packages.Visit(loaded, nil, func(p *packages.Package) {
		for _, e := range p.Errors {
			errs = append(errs, e)
		}
	})
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	program, made := ssautil.AllPackages(loaded, ssa.InstantiateGenerics)
	program.Build()
	p := &Program{made: map[string]*ssa.Package{}}
	for i, m := range made {
		p.made[loaded[i].PkgPath] = m
	}
	return p, nil
}

// Reach is what a function can get at.
type Reach struct {
	Calls []Call // sorted
	graph map[*ssa.Function]bool
}

// Methods returns the exported methods of a type that can be called, sorted. It is
// named as PATH.TYPE and has pointer receivers.
func (r *Reach) Methods(of string) []string {
	found := map[string]bool{}
	for f := range r.graph {
		recv := f.Signature.Recv()
		if recv != nil && recv.Type().String() == "*"+of && f.Object() != nil && f.Object().Exported() {
			found[f.Name()] = true
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// From follows the code from a function of a package that was loaded.
func (p *Program) From(path, function string) (*Reach, error) {
	made := p.made[path]
	if made == nil || made.Func(function) == nil {
		return nil, fmt.Errorf("follow %s.%s: it was not loaded", path, function)
	}
	roots := []*ssa.Function{made.Func("init"), made.Func(function)}
	rough := rta.Analyze(roots, true)
	functions := map[*ssa.Function]bool{}
	for f := range rough.Reachable {
		functions[f] = true
	}
	// The first analysis takes every function of the right type for the one that a
	// variable holds, and every method for one that reflection could call. The
	// second follows what variables can hold; only real calls count in the end.
	graph := vta.CallGraph(functions, rough.CallGraph)
	found, reach := map[Call]bool{}, &Reach{graph: map[*ssa.Function]bool{}}
	var visit func(n *callgraph.Node)
	visit = func(n *callgraph.Node) {
		if n == nil || reach.graph[n.Func] {
			return
		}
		reach.graph[n.Func] = true
		for _, c := range callsIn(n.Func) {
			found[c] = true
		}
		for _, e := range n.Out {
			visit(e.Callee)
		}
	}
	for _, f := range roots {
		visit(graph.Nodes[f])
	}
	reach.Calls = slices.SortedFunc(maps.Keys(found), func(a, b Call) int { return strings.Compare(a.String(), b.String()) })
	return reach, nil
}

// sdk reports whether a function is the SDK's own. Of what the SDK does by itself
// only what it does for a caller counts: waiters and paginators.
func sdk(f *ssa.Function) bool {
	if f.Pkg == nil || !strings.HasPrefix(f.Pkg.Pkg.Path(), "github.com/aws/") {
		return false
	}
	recv := f.Signature.Recv()
	return recv == nil || !strings.HasSuffix(recv.Type().String(), "Paginator") && !strings.HasSuffix(recv.Type().String(), "Waiter")
}

// callsIn are the operations that f calls.
func callsIn(f *ssa.Function) []Call {
	if sdk(f) {
		return nil
	}
	var out []Call
	for _, block := range f.Blocks {
		for _, in := range block.Instrs {
			if call, ok := in.(ssa.CallInstruction); ok {
				if c, ok := operation(call.Common()); ok {
					out = append(out, c)
				}
			}
		}
	}
	return out
}

// operation reports whether a call is of a method of an SDK client that sends a
// request: func(*Client) (ctx, *XInput, ...) (*XOutput, error).
func operation(c *ssa.CallCommon) (Call, bool) {
	var method *types.Func
	if c.IsInvoke() {
		method = c.Method
	} else if f := c.StaticCallee(); f != nil {
		method, _ = f.Object().(*types.Func)
	}
	if method == nil || method.Pkg() == nil {
		return Call{}, false
	}
	service, ok := strings.CutPrefix(method.Pkg().Path(), clients)
	if !ok || strings.Contains(service, "/") {
		return Call{}, false
	}
	sig := method.Signature()
	if sig.Recv() == nil || sig.Params().Len() < 2 {
		return Call{}, false
	}
	in, ok := sig.Params().At(1).Type().(*types.Pointer)
	if !ok {
		return Call{}, false
	}
	named, ok := in.Elem().(*types.Named)
	if !ok || named.Obj().Name() != method.Name()+"Input" {
		return Call{}, false
	}
	return Call{service, method.Name()}, true
}
