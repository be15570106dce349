package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/store"
)

func importCmd() *cobra.Command {
	return noun("import", "List imports, and abort one that never finished", importListCmd(), importAbortCmd())
}

// importLine is one import in JSON.
type importLine struct {
	ImportID   string  `json:"import_id"`
	State      string  `json:"state"`
	Pool       string  `json:"pool"`
	Kind       string  `json:"kind"`
	KeyID      *string `json:"key_id"`
	Records    int     `json:"records"`
	Duplicates int     `json:"duplicates"`
	Batches    int     `json:"batches"`
	BatchSize  int     `json:"batch_size"`
	CreatedAt  string  `json:"created_at"`
	DoneAt     *string `json:"done_at"`
}

func lineOfImport(im *store.Import) importLine {
	line := importLine{
		ImportID: string(im.ID), State: string(im.State), Pool: im.Pool, Kind: string(im.Kind), KeyID: keyText(im.KeyID),
		Records: im.Records, Duplicates: im.Duplicates, Batches: im.Batches, BatchSize: im.BatchSize,
		CreatedAt: im.CreatedAt.UTC().Format(time.RFC3339Nano),
	}
	if !im.DoneAt.IsZero() {
		t := im.DoneAt.UTC().Format(time.RFC3339Nano)
		line.DoneAt = &t
	}
	return line
}

func importListCmd() *cobra.Command {
	var at cli.StoreOptions
	var asJSON bool
	c := &cobra.Command{
		Use:   "list",
		Short: "List all imports",
		Long: `List all imports by id. OPEN is one that never finished: none of its records may
be imported elsewhere until it is run again, or aborted.`,
		Example: `  keyhold import list

  # Those that never finished
  keyhold import list --json | jq -r 'select(.state=="OPEN") | .import_id'`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			s, err := cli.OpenStore(c.Context(), at)
			if err != nil {
				return err
			}
			all, err := s.Imports(c.Context())
			if err != nil {
				return fmt.Errorf("list the imports: %w", err)
			}
			t := newTable(c.OutOrStdout(), asJSON, column{"IMPORT", 32}, column{"STATE", 7}, column{"POOL", 16},
				column{"KIND", 7}, column{"RECORDS", 10}, column{"DUPLICATES", 10}, column{"BATCHES", 8}, column{"CREATED", 0})
			for i := range all {
				line := lineOfImport(&all[i])
				err := t.row(line, line.ImportID, line.State, line.Pool, line.Kind, line.Records, line.Duplicates, line.Batches,
					all[i].CreatedAt.UTC().Format(time.RFC3339))
				if err != nil {
					return err
				}
			}
			return nil
		},
	}
	at.AddFlags(c)
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON Lines")
	return c
}

func importAbortCmd() *cobra.Command {
	var at cli.StoreOptions
	c := &cobra.Command{
		Use:   "abort ID",
		Short: "Give up an import that never finished, and free its record ids",
		Long: `Give up an import that is OPEN. Its record ids are free again, and its batches
that nobody has begun to sign are deleted; those that were begun stay and are
signed, and their number is printed. Running it again goes on where it stopped.
An import that is DONE cannot be aborted.`,
		Example: `  keyhold import list
  keyhold import abort payouts-2026-11-20`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			id := record.ImportID(args[0])
			if err := record.CheckImportID(id); err != nil {
				return cli.Usagef("%w", err)
			}
			s, err := cli.OpenStore(c.Context(), at)
			if err != nil {
				return err
			}
			kept, err := s.AbortImport(c.Context(), id)
			switch {
			case isNotFound(err):
				return cli.Errorf(refusal.ImportNotFound, "there is no import %s: see keyhold import list", id)
			case errors.Is(err, store.ErrTaken):
				return cli.Errorf(refusal.BatchState, "import %s is DONE: all of its records are to be signed, and it cannot be aborted", id)
			case err != nil:
				return fmt.Errorf("abort import %s: %w", id, err)
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "import %s is aborted and its record ids are free; %d batches that were begun are kept\n", id, kept)
			return err
		},
	}
	at.AddFlags(c)
	return c
}
