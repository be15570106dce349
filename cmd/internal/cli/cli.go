// Package cli is what Keyhold's commands share: how they end, show progress,
// open the tables and reach an enclave. It refuses to guess: what a flag or an
// environment variable does not say clearly is wrong usage.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"
	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/store"
)

// Main runs root and returns the exit code of the process: 0, 1 failed, 2 wrong
// usage, 3 some records refused. An error is printed once, to stderr.
//
// SIGINT and SIGTERM end the command's context; the second one ends the process
// at once.
func Main(root *cobra.Command) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // from then on signals have their default effect
	return Run(ctx, root)
}

// Run is Main without the signals, for tests.
func Run(ctx context.Context, root *cobra.Command) int {
	root.SilenceUsage, root.SilenceErrors = true, true
	ran := false
	prepare(root, &ran)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	if !ran { // cobra refused flags, arguments or the command's name
		err = Usagef("%w", err)
	}
	err = classify(ctx, err)
	report(root.ErrOrStderr(), root, cmd, err)
	return refusal.Exit(err)
}

// prepare notes when a command's own code is reached: every error before that is
// wrong usage. Commands that only group others get code of their own, because
// cobra would take an unknown subcommand for a call for help.
func prepare(c *cobra.Command, ran *bool) {
	if c.HasSubCommands() && !c.Runnable() {
		c.RunE = group
	}
	if own := c.RunE; own != nil {
		c.RunE = func(cmd *cobra.Command, args []string) error {
			*ran = true
			return own(cmd, args)
		}
	}
	for _, sub := range c.Commands() {
		prepare(sub, ran)
	}
}

func group(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return Usagef("unknown command %q for %q", args[0], c.CommandPath())
	}
	var names []string
	for _, sub := range c.Commands() {
		if sub.IsAvailableCommand() {
			names = append(names, sub.Name())
		}
	}
	return Usagef("%s: want one of %s", c.CommandPath(), strings.Join(names, ", "))
}

// coded has a code, and so an exit code, but a text of its own.
type coded struct {
	error
	code refusal.Code
}

func (c coded) Unwrap() []error { return []error{c.code, c.error} }

// Errorf returns an error with that code whose text says more than the table can.
func Errorf(code refusal.Code, format string, args ...any) error {
	return coded{fmt.Errorf(format, args...), code}
}

// Usagef returns an error that ends a command with exit code 2.
func Usagef(format string, args ...any) error { return Errorf(refusal.UsageWrong, format, args...) }

// errStopped takes the place of what a cancelled context made of a command.
var errStopped = errors.New("stopped by a signal; the same command goes on where this one ended")

// classify gives errors that come from below the table of refusals their code.
func classify(ctx context.Context, err error) error {
	if _, has := errors.AsType[refusal.Code](err); has {
		return err
	}
	send, unsent := errors.AsType[*smithyhttp.RequestSendError](err)
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.Cause(ctx)):
		return errStopped
	case errors.Is(err, store.ErrNoTables):
		return fmt.Errorf("%w (%w)", err, refusal.TablesMissing)
	case errors.Is(err, store.ErrThrottled):
		return fmt.Errorf("%w (%w)", err, refusal.StoreUnreachable)
	case errors.Is(err, syscall.ENOSPC):
		return fmt.Errorf("%w (%w)", err, refusal.DiskFull)
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("%w (%w)", err, refusal.PortInUse)
	case unsent:
		return fmt.Errorf("%w (%w)", send.Err, refusal.StoreUnreachable)
	}
	if answer, ok := errors.AsType[smithy.APIError](err); ok {
		return classifyAnswer(err, answer)
	}
	return err
}

// classifyAnswer gives an error that DynamoDB itself answered its code.
func classifyAnswer(err error, answer smithy.APIError) error {
	switch answer.ErrorCode() {
	case "AccessDeniedException", "UnrecognizedClientException", "ExpiredTokenException", "InvalidSignatureException", "MissingAuthenticationTokenException":
		return fmt.Errorf("%w (%w)", err, refusal.StoreDenied)
	}
	if answer.ErrorFault() == smithy.FaultServer {
		return fmt.Errorf("%w (%w)", err, refusal.StoreUnreachable)
	}
	return err
}

// report prints err, and for wrong usage where to read more.
func report(w io.Writer, root, cmd *cobra.Command, err error) {
	text := err.Error()
	if errors.Is(err, refusal.UsageWrong) {
		text += fmt.Sprintf("\nRun '%s --help' for usage and examples.", cmd.CommandPath())
	}
	// A command whose stderr is gone still has its exit code.
	_, _ = fmt.Fprintf(w, "%s: %s\n", root.Name(), text)
}
