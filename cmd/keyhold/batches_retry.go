package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/store"
)

func batchesRetryCmd() *cobra.Command {
	var at cli.StoreOptions
	var all bool
	c := &cobra.Command{
		Use:   "retry [ID...]",
		Short: "Put quarantined batches back into the queue",
		Long: `Put QUARANTINED batches back to READY, with no attempts counted. Find out first
why they failed: keyhold batches list --state QUARANTINED shows how the last
attempt of each ended.`,
		Example: `  keyhold batches list --state QUARANTINED
  keyhold batches retry payouts-2026-11-20-b0000017

  # After the cause is gone
  keyhold batches retry --all-quarantined`,
		Args: func(_ *cobra.Command, args []string) error {
			if all == (len(args) > 0) {
				return errors.New("give batch ids, or --all-quarantined")
			}
			for _, id := range args {
				if _, _, err := record.BatchID(id).Split(); err != nil {
					return fmt.Errorf("%q is no batch id: %w", id, err)
				}
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			s, err := cli.OpenStore(c.Context(), at)
			if err != nil {
				return err
			}
			ids, err := toRetry(c.Context(), s, args)
			if err != nil {
				return err
			}
			for _, id := range ids {
				if err := retry(c.Context(), s, id); err != nil {
					return err
				}
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "%d batches are READY again\n", len(ids))
			return err
		},
	}
	at.AddFlags(c)
	c.Flags().BoolVar(&all, "all-quarantined", false, "retry every batch that is QUARANTINED")
	return c
}

// toRetry are the named batches, or all that are quarantined.
func toRetry(ctx context.Context, s store.Store, args []string) (ids []record.BatchID, err error) {
	for _, id := range args {
		ids = append(ids, record.BatchID(id))
	}
	if len(args) > 0 {
		return ids, nil
	}
	err = shardBatches(ctx, s, store.QuarantinedShard, func(b *store.Batch) error {
		if b.State == record.Quarantined {
			ids = append(ids, b.ID)
		}
		return nil
	})
	return ids, err
}

func retry(ctx context.Context, s store.Intake, id record.BatchID) error {
	err := s.Requeue(ctx, id, time.Now())
	switch {
	case isNotFound(err):
		return cli.Errorf(refusal.BatchState, "there is no batch %s: see keyhold batches list", id)
	case errors.Is(err, store.ErrTaken):
		return cli.Errorf(refusal.BatchState, "batch %s is not QUARANTINED: see keyhold batches list", id)
	case err != nil:
		return fmt.Errorf("retry batch %s: %w", id, err)
	}
	return nil
}
