package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/export"
	"github.com/keyhold/keyhold/parent/store"
)

const watchEvery = 2 * time.Second

// status is what the totals of all imports and a count of the open batches say.
type status struct {
	Imports     int    `json:"imports"`
	Unfinished  int    `json:"imports_unfinished"` // OPEN: their records are in no total yet
	Records     int    `json:"records"`
	Batches     int    `json:"batches"`
	Open        int    `json:"batches_open"` // READY or CLAIMED
	Quarantined int    `json:"batches_quarantined"`
	Final       int    `json:"batches_final"`
	Done        int    `json:"records_final"` // in final batches; an estimate while some are open, see Estimated
	Estimated   bool   `json:"estimated"`
	Exact       *exact `json:"exact"` // null without --exact
}

// exact is what every single batch says.
type exact struct {
	Signed      int `json:"signed"`
	Refused     int `json:"refused"`
	Ready       int `json:"ready"`
	Claimed     int `json:"claimed"`
	Quarantined int `json:"quarantined"`
}

func recordsStatusCmd() *cobra.Command {
	var at cli.StoreOptions
	var each, watch, asJSON bool
	c := &cobra.Command{
		Use:   "status",
		Short: "Say how many records are signed and how many are not",
		Long: `Say how far all imports have come. The figures are the totals of the imports less
a count of the open batches, so they cost the same for a thousand records and for
a hundred million; the number of records is exact once no batch is open. --exact
reads every batch instead and tells signed records from refused ones.

With --watch the progress is shown until no batch is open any more.`,
		Example: `  keyhold records status

  # Follow it, with rate and time left
  keyhold records status --watch

  # Signed and refused, exactly
  keyhold records status --exact --json`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			s, err := cli.OpenStore(c.Context(), at)
			if err != nil {
				return err
			}
			if watch {
				if err := watchStatus(c, s); err != nil {
					return err
				}
			}
			st, err := readStatus(c.Context(), s)
			if err != nil {
				return err
			}
			if each {
				if st.Exact, err = countExactly(c, s, st.Records); err != nil {
					return err
				}
			}
			if asJSON {
				return cli.PrintJSON(c.OutOrStdout(), st)
			}
			return st.print(c.OutOrStdout())
		},
	}
	at.AddFlags(c)
	c.Flags().BoolVar(&each, "exact", false, "read every batch")
	c.Flags().BoolVar(&watch, "watch", false, "show the progress until no batch is open")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func readStatus(ctx context.Context, s store.Store) (st status, err error) {
	all, err := s.Imports(ctx)
	if err != nil {
		return st, fmt.Errorf("list the imports: %w", err)
	}
	st.Imports = len(all)
	for _, im := range all {
		switch im.State {
		case store.ImportOpen:
			st.Unfinished++
		case store.ImportDone:
			st.Records += im.Records - im.Duplicates
			st.Batches += im.Batches
		case store.ImportAborted:
		}
	}
	for shard := range store.QuarantinedShard + 1 {
		n, err := s.CountReady(ctx, shard)
		if err != nil {
			return st, fmt.Errorf("count the open batches: %w", err)
		}
		if shard == store.QuarantinedShard {
			st.Quarantined = n
		} else {
			st.Open += n
		}
	}
	// Batches of unfinished imports are open and in no total.
	st.Final = max(0, st.Batches-st.Open-st.Quarantined)
	st.Estimated = st.Final < st.Batches || st.Unfinished > 0
	if st.Batches > 0 {
		st.Done = int(float64(st.Records) * float64(st.Final) / float64(st.Batches))
	}
	return st, nil
}

func watchStatus(c *cobra.Command, s store.Store) error {
	ctx := c.Context()
	var p *cli.Progress
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		st, err := readStatus(ctx, s)
		if err != nil {
			return err
		}
		if p == nil {
			p = cli.NewProgress(c.ErrOrStderr(), "signing", st.Records)
			defer p.Finish()
			p.From(st.Done)
		}
		p.SetTotal(st.Records)
		p.Set(st.Done)
		if st.Open == 0 {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// countExactly walks every batch.
func countExactly(c *cobra.Command, s store.Store, total int) (*exact, error) {
	imports, err := selected(c.Context(), s, nil)
	if err != nil {
		return nil, err
	}
	p := cli.NewProgress(c.ErrOrStderr(), "counting", total)
	defer p.Finish()
	var n exact
	seen := 0
	err = export.Controls(c.Context(), s, imports, func(b *store.Batch) error {
		n.add(b)
		seen += b.Count
		p.Set(seen)
		return nil
	})
	return &n, err
}

func (n *exact) add(b *store.Batch) {
	switch b.State {
	case record.Signed, record.Refused:
		n.Signed += b.Count - b.Refused
		n.Refused += b.Refused
	case record.Ready:
		n.Ready += b.Count
	case record.Claimed:
		n.Claimed += b.Count
	case record.Quarantined:
		n.Quarantined += b.Count
	}
}

func (st *status) print(w io.Writer) error {
	about := ""
	if st.Estimated {
		about = "about "
	}
	percent := 0.0
	if st.Records > 0 {
		percent = 100 * float64(st.Done) / float64(st.Records)
	}
	text := fmt.Sprintf("records   %d, of them %s%d final (%.1f%%)\nbatches   %d: %d final, %d open, %d quarantined\nimports   %d, %d unfinished\n",
		st.Records, about, st.Done, percent, st.Batches, st.Final, st.Open, st.Quarantined, st.Imports, st.Unfinished)
	if e := st.Exact; e != nil {
		text += fmt.Sprintf("exactly   %d signed, %d refused, %d ready, %d claimed, %d quarantined\n",
			e.Signed, e.Refused, e.Ready, e.Claimed, e.Quarantined)
	}
	if st.Quarantined > 0 {
		text += "see       keyhold batches list --state QUARANTINED, and put them back with keyhold batches retry\n"
	}
	if st.Unfinished > 0 {
		text += "see       keyhold import list; run an unfinished import again or abort it\n"
	}
	_, err := io.WriteString(w, text)
	return err
}
