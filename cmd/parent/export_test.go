package main

import (
	"context"
	"log/slog"

	"github.com/keyhold/keyhold/parent/watch/sdnotify"
)

// TestingOnlyReport tells service about the parent that listens there.
func TestingOnlyReport(ctx context.Context, service sdnotify.Service, listen string) (stop func()) {
	return reporter{service: service, listen: listen, log: slog.New(slog.DiscardHandler)}.start(ctx)
}

// TestingOnlyLock is the lock that keeps starts apart.
func TestingOnlyLock(path string) func(context.Context) (func(), error) { return lockFile(path) }
