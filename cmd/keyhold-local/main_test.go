package main_test

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	local "github.com/keyhold/keyhold/cmd/keyhold-local"
	"github.com/keyhold/keyhold/internal/awslocal/dynoxide"
	"github.com/keyhold/keyhold/internal/awslocal/dynoxide/dynoxidetest"
)

const (
	// programEnv turns the test binary into keyhold-local, and the processes that it starts as well.
	programEnv = "KEYHOLD_TEST_AS_PROGRAM"

	// coresEnv lifts the limit on core files before that.
	coresEnv = "KEYHOLD_TEST_CORES"

	// seedEnv repeats the moments of a run of the tests that kill.
	seedEnv = "KEYHOLD_TEST_SEED"
)

// atOnce is how many tests run together: most of them wait for leases of 10 s to run out.
const atOnce = 8

func TestMain(m *testing.M) {
	if os.Getenv(programEnv) == "1" {
		os.Exit(program()) //nolint:forbidigo // it is the main function here
	}
	flag.Parse()
	if chosen := flag.Lookup("test.parallel"); chosen.Value.String() == strconv.Itoa(runtime.GOMAXPROCS(0)) {
		if err := chosen.Value.Set(strconv.Itoa(atOnce)); err != nil {
			panic(err)
		}
	}
	m.Run()
}

func program() int {
	if os.Getenv(coresEnv) == "1" {
		if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 99
		}
	}
	return cli.Main(local.TestingOnlyCommand())
}

// database returns the binary of the local DynamoDB, and skips or fails t where there is none.
func database(t *testing.T) string {
	t.Helper()
	binary, err := dynoxide.Find()
	if err != nil {
		missing(t, err)
	}
	return binary
}

// missing skips t, or fails it where every service must be there.
func missing(t *testing.T, err error) {
	t.Helper()
	if os.Getenv(dynoxidetest.RequireEnv) == "1" || !errors.Is(err, dynoxide.ErrNotFound) {
		t.Fatal(err)
	}
	t.Skip(err)
}

// whole leaves a test of many seconds to make test, so that a plain go test stays short.
func whole(t *testing.T) {
	t.Helper()
	if testing.Short() || os.Getenv(dynoxidetest.RequireEnv) == "" {
		t.Skip("make test plays it; alone: " + dynoxidetest.RequireEnv + "=1 go test -run " + t.Name() + " ./cmd/keyhold-local")
	}
}
