package main

import (
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/export"
	"github.com/keyhold/keyhold/parent/store"
)

func batchesCmd() *cobra.Command {
	return noun("batches", "List, export and retry batches", batchesListCmd(), batchesExportCmd(), batchesRetryCmd())
}

// batchLine is one batch of a list in JSON.
type batchLine struct {
	BatchID  string  `json:"batch_id"`
	ImportID string  `json:"import_id"`
	State    string  `json:"state"`
	Pool     string  `json:"pool"`
	Kind     string  `json:"kind"`
	KeyID    *string `json:"key_id"`
	Records  int     `json:"records"`
	Refused  int     `json:"refused"`
	Attempts int     `json:"attempts"`
	LastEnd  string  `json:"last_end"` // how the newest attempt ended; empty while it goes on
	Owner    string  `json:"owner"`
}

func lineOfBatch(b *store.Batch) batchLine {
	line := batchLine{
		BatchID: string(b.ID), ImportID: string(b.ImportID), State: string(b.State), Pool: b.Pool, Kind: string(b.Kind),
		KeyID: keyText(b.KeyID), Records: b.Count, Refused: b.Refused, Attempts: b.Attempts, Owner: b.Owner,
	}
	if n := len(b.History); n > 0 {
		line.LastEnd = b.History[n-1].End
	}
	return line
}

func batchStates() []record.State {
	return []record.State{record.Ready, record.Claimed, record.Signed, record.Quarantined}
}

func batchesListCmd() *cobra.Command {
	var at cli.StoreOptions
	var state string
	var asJSON bool
	c := &cobra.Command{
		Use:   "list",
		Short: "List batches with their states",
		Long: `List batches: READY to be signed, CLAIMED by a parent that signs them, SIGNED, or
QUARANTINED after too many attempts that failed. --state READY, CLAIMED or
QUARANTINED reads an index of those alone; anything else reads all batches.`,
		Example: `  # What needs an operator
  keyhold batches list --state QUARANTINED

  # All batches of one import
  keyhold batches list --import payouts-2026-11-20

  # Which parents are at work
  keyhold batches list --state CLAIMED --json | jq -r .owner | sort | uniq -c`,
		Args: cobra.NoArgs,
	}
	at.AddFlags(c)
	ids := importsFlag(c)
	c.Flags().StringVar(&state, "state", "", "only this `state`: READY, CLAIMED, SIGNED or QUARANTINED")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON Lines")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if state != "" && !slices.Contains(batchStates(), record.State(state)) {
			return cli.Usagef("--state: want one of %v", batchStates())
		}
		t := newTable(c.OutOrStdout(), asJSON, column{"BATCH", 34}, column{"STATE", 11}, column{"POOL", 16},
			column{"RECORDS", 7}, column{"REFUSED", 7}, column{"ATTEMPTS", 8}, column{"LAST_END", 0})
		return listBatches(c, at, *ids, record.State(state), func(b *store.Batch) error {
			line := lineOfBatch(b)
			return t.row(line, line.BatchID, line.State, line.Pool, line.Records, line.Refused, line.Attempts, dash(line.LastEnd))
		})
	}
	return c
}

// listBatches calls f for the batches of that state, and of these imports.
func listBatches(c *cobra.Command, at cli.StoreOptions, ids []string, state record.State, f func(b *store.Batch) error) error {
	s, err := cli.OpenStore(c.Context(), at)
	if err != nil {
		return err
	}
	imports, err := selected(c.Context(), s, ids)
	if err != nil {
		return err
	}
	keep := func(b *store.Batch) error {
		if state != "" && b.State != state || len(ids) > 0 && !slices.Contains(ids, string(b.ImportID)) {
			return nil
		}
		return f(b)
	}
	switch state {
	case record.Quarantined:
		return shardBatches(c.Context(), s, store.QuarantinedShard, keep)
	case record.Ready, record.Claimed:
		return openBatches(c.Context(), s, keep)
	case record.Signed, record.Refused, "":
	}
	return export.Controls(c.Context(), s, imports, keep)
}

func batchesExportCmd() *cobra.Command {
	var at cli.StoreOptions
	var out string
	c := &cobra.Command{
		Use:   "export",
		Short: "Write every batch with its claims and receipt, as JSON Lines",
		Long: `Write one JSON object per batch: batch_id, import_id, state, key_id, fence,
key_fence, used, used_before, attempts, record_count, owner, boot_id, claimed_at,
committed_at and receipt. A file appears only once it is whole.`,
		Example: `  keyhold batches export -o history.jsonl

  # Which keys signed how many batches
  keyhold batches export | jq -r .key_id | sort | uniq -c`,
		Args: cobra.NoArgs,
	}
	at.AddFlags(c)
	ids := importsFlag(c)
	c.Flags().StringVarP(&out, "output", "o", "-", "`file` to write, - for stdout")
	c.RunE = func(c *cobra.Command, _ []string) error {
		s, err := cli.OpenStore(c.Context(), at)
		if err != nil {
			return err
		}
		imports, err := selected(c.Context(), s, *ids)
		if err != nil {
			return err
		}
		total := 0
		for _, im := range imports {
			total += im.Batches
		}
		var n int
		err = writeLines(c, out, "exporting", total, func(w io.Writer) error {
			n, err = export.Batches(c.Context(), s, imports, nil, w)
			return err
		})
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(c.ErrOrStderr(), "exported %d batches\n", n)
		return err
	}
	return c
}
