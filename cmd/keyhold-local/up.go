package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/cmd/internal/cli"
)

// startPatience bounds the wait for a process that was just started.
const startPatience = 30 * time.Second

func upCommand() *cobra.Command {
	var dir string
	var n size
	cmd := &cobra.Command{
		Use:   "up --dir DIR",
		Short: "Keep the stack running and print how to reach it",
		Long: `Starts the same stack as run and keeps it up until Ctrl-C. It prints the
environment that points the keyhold command at it.`,
		Example: `  keyhold-local up --dir /tmp/dev --parents 2 --enclaves 2

  # in another shell, after pasting the printed lines
  keyhold keyring create --algorithm secp256k1 --policy default --pool main --keys 10
  echo '{"text":"hello"}' | keyhold records import --pool main -`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dir == "" {
				return cli.Usagef("--dir is needed: the folder that keeps the stack's state")
			}
			if err := n.validate(); err != nil {
				return err
			}
			f, err := openFolder(dir)
			if err != nil {
				return err
			}
			err = withStack(cmd.Context(), f, n, func(ctx context.Context, s *stack) error {
				return up(ctx, s, f, cmd.OutOrStdout())
			})
			return errors.Join(err, f.Close())
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "folder of the stack; made where it is missing (required)")
	addSize(cmd, &n)
	return cmd
}

// up prints the environment once everything is up, and stays.
func up(ctx context.Context, s *stack, f *folder, stdout io.Writer) error {
	for i := range s.parents { // of an earlier run
		if err := os.Remove(filepath.Join(sockets, fmt.Sprintf("parent-%d.http", i))); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("clear the folder: %w", err)
		}
	}
	s.startParents() //nolint:contextcheck // processes end with the stack
	text, err := s.environment(ctx, f)
	if ctx.Err() != nil {
		return nil //nolint:nilerr // Ctrl-C is how this command ends
	}
	if err != nil {
		return err
	}
	if _, err := io.WriteString(stdout, text); err != nil {
		return fmt.Errorf("print the environment: %w", err)
	}
	for {
		if err := pause(ctx, progressEvery); err != nil {
			return nil //nolint:nilerr // Ctrl-C is how this command ends
		}
		if err := checkSpace(s.log); err != nil {
			return err
		}
	}
}

// environment waits until everything answers and says where.
func (s *stack) environment(ctx context.Context, f *folder) (string, error) {
	var text strings.Builder
	for i := range s.parents {
		addr, err := s.parentHTTP(ctx, i)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&text, "# parent %d: http://%s/metrics /healthz /readyz\n", i, addr)
	}
	for i := range s.enclaves {
		if err := s.enclaveUp(ctx, i); err != nil {
			return "", err
		}
		fmt.Fprintf(&text, "# enclave %d: unix:%s\n", i, filepath.Join(f.path, socketPath("enclave", i)))
	}
	text.WriteString("# paste this into another shell:\n")
	for _, kv := range [][2]string{
		{"KEYHOLD_DYNAMODB_ENDPOINT", s.endpoint},
		{"KEYHOLD_TABLE_PREFIX", tablePrefix},
		{"AWS_REGION", region},
		{"KEYHOLD_ENCLAVE", "unix:" + filepath.Join(f.path, socketPath("enclave", 0))},
		{"KEYHOLD_CONFIG", filepath.Join(f.path, configFile)},
		{"KEYHOLD_PCR0", hex.EncodeToString(nsmtest.Measurements(image)[0])},
		{"KEYHOLD_TEST_ROOT", filepath.Join(f.path, nsmRootFile)},
	} {
		fmt.Fprintf(&text, "export %s='%s'\n", kv[0], kv[1])
	}
	return text.String(), nil
}

// enclaveUp waits until enclave i answers.
func (s *stack) enclaveUp(ctx context.Context, i int) error {
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	c, err := s.connect(ctx, i)
	if err != nil {
		return fmt.Errorf("start enclave %d: it does not answer; see %s: %w", i, filepath.Join(logs, fmt.Sprintf("enclave-%d.log", i)), err)
	}
	c.Close()
	return nil
}

// parentHTTP waits until parent i has written where it listens.
func (s *stack) parentHTTP(ctx context.Context, i int) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	name := filepath.Join(sockets, fmt.Sprintf("parent-%d.http", i))
	for {
		if raw, err := os.ReadFile(name); err == nil {
			return strings.TrimSpace(string(raw)), nil
		}
		if err := pause(ctx, lookEvery); err != nil {
			return "", fmt.Errorf("start parent %d: it does not listen; see %s: %w", i, filepath.Join(logs, fmt.Sprintf("parent-%d.log", i)), err)
		}
	}
}
