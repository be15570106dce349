package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
)

const (
	// maxConsole bounds what is kept of a machine that does not stop to print.
	maxConsole = 1 << 20
	shownLines = 25 // of the console, in an error
)

// ErrSilent is returned where the machine ended without the line that was waited
// for.
var ErrSilent = errors.New("the machine ended before")

// console keeps what a machine prints.
type console struct {
	mu      sync.Mutex
	changed sync.Cond
	printed bytes.Buffer
	ended   bool
}

// Write implements io.Writer. What is too much is dropped, so that the machine
// does not stand still.
func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	room := max(0, maxConsole-c.printed.Len())
	c.printed.Write(p[:min(len(p), room)])
	c.changed.Broadcast()
	return len(p), nil
}

func (c *console) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	c.changed.Broadcast()
}

func (c *console) text() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.ReplaceAll(c.printed.String(), "\r", "")
}

// await waits for a whole line that has all parts.
func (c *console) await(ctx context.Context, parts []string) (string, error) {
	defer context.AfterFunc(ctx, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.changed.Broadcast()
	})()
	c.mu.Lock()
	defer c.mu.Unlock()
	for seen := 0; ; {
		lines := strings.SplitAfter(c.printed.String(), "\n")
		for _, line := range lines[min(seen, len(lines)):] {
			if strings.HasSuffix(line, "\n") && has(line, parts) {
				return strings.TrimSpace(line), nil
			}
		}
		seen = max(0, len(lines)-1) // the last one is not whole
		switch {
		case c.ended:
			return "", fmt.Errorf("await %q on the console: %w", parts, ErrSilent)
		case ctx.Err() != nil:
			return "", fmt.Errorf("await %q on the console: %w", parts, ctx.Err())
		}
		c.changed.Wait()
	}
}

func has(line string, parts []string) bool {
	for _, p := range parts {
		if !strings.Contains(line, p) {
			return false
		}
	}
	return true
}

// wrap adds the last lines of the console to an error.
func (c *console) wrap(err error) error {
	lines := strings.Split(strings.TrimSpace(c.text()), "\n")
	last := lines[max(0, len(lines)-shownLines):]
	return fmt.Errorf("%w; the console ends with\n\t%s", err, strings.Join(last, "\n\t"))
}
