package main

import (
	"bufio"
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/store"
)

func recordsCmd() *cobra.Command {
	return noun("records", "Import records, follow them, and export and verify their signatures",
		recordsGenerateCmd(), recordsImportCmd(), recordsStatusCmd(), recordsExportCmd(), recordsVerifyCmd())
}

// importsFlag lets c's command line choose imports.
func importsFlag(c *cobra.Command) *[]string {
	return c.Flags().StringSlice("import", nil, "only this import `id`; may be repeated")
}

// selected are the chosen imports, or all where none is chosen.
func selected(ctx context.Context, s store.Intake, ids []string) ([]store.Import, error) {
	chosen, err := importIDs(ids)
	if err != nil {
		return nil, err
	}
	if len(chosen) == 0 {
		all, err := s.Imports(ctx)
		if err != nil {
			return nil, fmt.Errorf("list the imports: %w", err)
		}
		return all, nil
	}
	out := make([]store.Import, 0, len(chosen))
	for _, id := range chosen {
		im, err := oneImport(ctx, s, id)
		if err != nil {
			return nil, err
		}
		out = append(out, im)
	}
	return out, nil
}

func importIDs(ids []string) ([]record.ImportID, error) {
	out := make([]record.ImportID, 0, len(ids))
	for _, id := range ids {
		if err := record.CheckImportID(record.ImportID(id)); err != nil {
			return nil, cli.Usagef("%w", err)
		}
		out = append(out, record.ImportID(id))
	}
	return out, nil
}

// counted shows on p how many lines went through to w.
type counted struct {
	w io.Writer
	p *cli.Progress
	n int
}

func (c *counted) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	for _, x := range b[:n] {
		if x == '\n' {
			c.n++
		}
	}
	c.p.Set(c.n)
	return n, err
}

// writeLines lets f write JSON Lines to path and shows their number meanwhile.
func writeLines(c *cobra.Command, path, label string, total int, f func(io.Writer) error) error {
	p := cli.NewProgress(c.ErrOrStderr(), label, total)
	defer p.Finish()
	return cli.WriteOutput(path, c.OutOrStdout(), func(w io.Writer) error {
		lines := bufio.NewWriterSize(&counted{w: w, p: p}, 1<<16)
		if err := f(lines); err != nil {
			return err
		}
		if err := lines.Flush(); err != nil {
			return fmt.Errorf("write the output: %w", err)
		}
		return nil
	})
}

// recordsOf is what these imports hold. What others than DONE ones will hold in
// the end is not known.
func recordsOf(imports []store.Import) (n int) {
	for _, im := range imports {
		if im.State == store.ImportDone {
			n += im.Records - im.Duplicates
		}
	}
	return n
}

// oneImport reads an import that must be there.
func oneImport(ctx context.Context, s store.Intake, id record.ImportID) (store.Import, error) {
	im, err := s.Import(ctx, id)
	if isNotFound(err) {
		return im, cli.Errorf(refusal.ImportNotFound, "there is no import %s: see keyhold import list", id)
	}
	if err != nil {
		return im, fmt.Errorf("read import %s: %w", id, err)
	}
	return im, nil
}
