package main

import "context"

// TestingOnlyInvoke calls the function as Lambda does.
func TestingOnlyInvoke(ctx context.Context, i *Ingest, payload []byte) error {
	_, err := function{i}.Invoke(ctx, payload)
	return err
}
