package main

import (
	"errors"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/keyhold/keyhold/internal/awslocal/dynoxide/dynoxidetest"
)

func TestMain(m *testing.M) { testscript.Main(m, map[string]func(){"keyhold": main}) }

func TestUsage(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/usage", RequireExplicitExec: true, RequireUniqueNames: true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("KEYHOLD_DYNAMODB_ENDPOINT", "http://127.0.0.1:9") // nobody listens on discard
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits},
	})
}

func TestStore(t *testing.T) {
	endpoint := dynoxidetest.Endpoint(t)
	testscript.Run(t, testscript.Params{
		Dir: "testdata/store", RequireExplicitExec: true, RequireUniqueNames: true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("KEYHOLD_DYNAMODB_ENDPOINT", endpoint)
			// The script's folder has its name: tables of its own.
			e.Setenv("KEYHOLD_TABLE_PREFIX", strings.TrimPrefix(filepath.Base(e.WorkDir), "script-")+"-")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": exits, "keys": makeKeys, "sign": signReady, "quarantine": quarantine, "unfinished": unfinished,
			"forge": forge,
		},
	})
}

// TestEnclave runs the production enclave with a software NSM, and for one
// script a parent beside it.
func TestEnclave(t *testing.T) {
	endpoint := dynoxidetest.Endpoint(t)
	testscript.Run(t, testscript.Params{
		Dir: "testdata/enclave", RequireExplicitExec: true, RequireUniqueNames: true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("KEYHOLD_DYNAMODB_ENDPOINT", endpoint)
			e.Setenv("KEYHOLD_TABLE_PREFIX", strings.TrimPrefix(filepath.Base(e.WorkDir), "script-")+"-")
			return startEnclave(t, e)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": exits, "parent": runParent, "restart": restartEnclave, "tamper": tamper, "flip": flip,
		},
	})
}

// exits CODE PROGRAM ARG... runs a program that must end with that code.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM ARG...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	err = ts.Exec(args[1], args[2:]...)
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}
