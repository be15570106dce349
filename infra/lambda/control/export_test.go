package main

import "context"

// TestingOnlyInvoke calls the function as Lambda does.
func TestingOnlyInvoke(ctx context.Context, c *Control, payload string) ([]byte, error) {
	return function{c}.Invoke(ctx, []byte(payload))
}
