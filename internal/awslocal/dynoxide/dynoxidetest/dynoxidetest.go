// Package dynoxidetest gives tests a local DynamoDB. It skips a test where none is installed, and
// fails it where KEYHOLD_REQUIRE_SERVICES=1 says that one must be.
package dynoxidetest

import (
	"context"
	"errors"
	"os"
	"sync"
	"testing"

	"github.com/keyhold/keyhold/internal/awslocal/dynoxide"
)

const (
	// EndpointEnv names a DynamoDB to use in place of a local one.
	EndpointEnv = "KEYHOLD_DYNAMODB_ENDPOINT"

	// RequireEnv set to 1 turns a missing service from a skip into a failure.
	RequireEnv = "KEYHOLD_REQUIRE_SERVICES"
)

// shared is the one server of this test binary, while a test uses it.
var shared struct {
	mu     sync.Mutex
	users  int
	server *dynoxide.Server
}

// Endpoint returns the URL of a DynamoDB that is up until t ends: the one that
// KEYHOLD_DYNAMODB_ENDPOINT names, or a server in memory that all tests running at the same time
// share and the last of them stops. So tables need names of their own.
func Endpoint(t testing.TB) string {
	t.Helper()
	if endpoint := os.Getenv(EndpointEnv); endpoint != "" {
		return endpoint
	}
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.users == 0 {
		shared.server = start(t, dynoxide.Options{})
	}
	shared.users++
	t.Cleanup(func() { release(t) })
	return shared.server.Endpoint()
}

func release(t testing.TB) {
	t.Helper()
	shared.mu.Lock()
	defer shared.mu.Unlock()
	shared.users--
	if shared.users > 0 {
		return
	}
	if err := shared.server.Kill(); err != nil { // it is in memory: there is nothing to save
		t.Errorf("stop the shared database: %v", err)
	}
	shared.server = nil
}

// Start runs a server for t alone, for tests that kill it or keep its file, and stops it with t.
func Start(t testing.TB, o dynoxide.Options) *dynoxide.Server {
	t.Helper()
	server := start(t, o)
	t.Cleanup(func() {
		if err := server.Stop(context.WithoutCancel(t.Context())); err != nil {
			t.Errorf("stop the database: %v", err)
		}
	})
	return server
}

func start(t testing.TB, o dynoxide.Options) *dynoxide.Server {
	t.Helper()
	server, err := dynoxide.Start(t.Context(), o)
	switch {
	case err == nil:
		return server
	case errors.Is(err, dynoxide.ErrNotFound) && os.Getenv(RequireEnv) != "1":
		t.Skip(err)
	default:
		t.Fatal(err)
	}
	return nil
}
