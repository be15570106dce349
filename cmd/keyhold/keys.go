package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/parent/store"
)

const leaseReads = 16 // in flight

func keysCmd() *cobra.Command {
	return noun("keys", "List the keys of a keyring", keysListCmd())
}

// keyLine is one key in JSON.
type keyLine struct {
	KeyID     string     `json:"key_id"`
	Algorithm string     `json:"algorithm"`
	Address   *string    `json:"address"`    // EIP-55; null where there is none
	PublicKey string     `json:"public_key"` // hex
	Policy    string     `json:"policy"`
	Pool      string     `json:"pool"`
	Epoch     uint32     `json:"epoch"`
	Lease     *leaseLine `json:"lease,omitempty"`
}

// leaseLine says who uses a key.
type leaseLine struct {
	State   string `json:"state"` // idle or held
	Fence   uint64 `json:"fence"`
	Used    uint64 `json:"used"`
	Owner   string `json:"owner"`
	BatchID string `json:"batch_id"`
}

func (l *leaseLine) text() string {
	switch {
	case l == nil:
		return ""
	case l.BatchID != "":
		return l.State + " by " + l.BatchID
	}
	return l.State
}

type keysOptions struct {
	at           cli.StoreOptions
	ring         ringOptions
	pool         string
	lease, asRaw bool
}

func keysListCmd() *cobra.Command {
	var o keysOptions
	c := &cobra.Command{
		Use:   "list",
		Short: "List keys with their addresses",
		Long: `List the keys of a keyring as they are read, in no order: id, algorithm, address,
policy and pool. A pool of a million keys needs no memory. Private keys are sealed
and cannot be listed by anybody.`,
		Example: `  keyhold keys list --config config.json

  # The addresses of one pool
  keyhold keys list --keyring payouts#1 --pool default --json | jq -r .address

  # Which keys are at work
  keyhold keys list --config config.json --lease`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return listKeys(c, o) },
	}
	o.at.AddFlags(c)
	o.ring.addFlags(c)
	c.Flags().StringVar(&o.pool, "pool", "", "only keys of this pool")
	c.Flags().BoolVar(&o.lease, "lease", false, "say who uses each key; reads one item per key")
	c.Flags().BoolVar(&o.asRaw, "json", false, "print JSON Lines")
	return c
}

func listKeys(c *cobra.Command, o keysOptions) error {
	id, err := o.ring.id()
	if err != nil {
		return err
	}
	s, err := cli.OpenStore(c.Context(), o.at)
	if err != nil {
		return err
	}
	if _, err := readHeader(c.Context(), s, id); err != nil {
		return err
	}
	columns := []column{{"KEY", 64}, {"ALGORITHM", 9}, {"ADDRESS", 42}, {"POLICY", 16}, {"POOL", 0}}
	if o.lease {
		columns[4].width = 16
		columns = append(columns, column{"LEASE", 0})
	}
	t := newTable(c.OutOrStdout(), o.asRaw, columns...)
	return s.Keys(c.Context(), id, func(page []store.Key) error {
		lines, err := o.lines(c.Context(), s, page)
		if err != nil {
			return err
		}
		for _, l := range lines {
			cells := []any{l.KeyID, l.Algorithm, dash(deref(l.Address)), l.Policy, l.Pool}
			if o.lease {
				cells = append(cells, l.Lease.text())
			}
			if err := t.row(l, cells...); err != nil {
				return err
			}
		}
		return nil
	})
}

func (o *keysOptions) lines(ctx context.Context, s store.Leases, page []store.Key) ([]keyLine, error) {
	lines := make([]keyLine, 0, len(page))
	kept := make([]store.Key, 0, len(page))
	for _, k := range page {
		if o.pool != "" && k.Pool != o.pool {
			continue
		}
		e, err := sealed.DecodeEntry(k.Sealed)
		if err != nil {
			return nil, fmt.Errorf("key %s: %w", k.ID, err)
		}
		p := &e.Public
		line := keyLine{
			KeyID: k.ID.String(), Algorithm: string(p.Algorithm), PublicKey: fmt.Sprintf("%x", p.PublicKey),
			Policy: p.Policy, Pool: k.Pool, Epoch: p.Epoch,
		}
		if p.Address != "" {
			line.Address = &p.Address
		}
		lines, kept = append(lines, line), append(kept, k)
	}
	if !o.lease {
		return lines, nil
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(leaseReads)
	for i, k := range kept {
		g.Go(func() (err error) {
			lines[i].Lease, err = readLease(ctx, s, k)
			return err
		})
	}
	return lines, g.Wait()
}

func readLease(ctx context.Context, s store.Leases, k store.Key) (*leaseLine, error) {
	l, err := s.Lease(ctx, k.ID)
	if err != nil {
		return nil, fmt.Errorf("read the lease of key %s: %w", k.ID, err)
	}
	line := &leaseLine{State: "held", Fence: uint64(l.Fence), Used: l.Used, Owner: l.Owner, BatchID: string(l.BatchID)}
	if l.Idle() {
		line.State = "idle"
	}
	return line, nil
}

func deref(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

// ringOptions say which keyring is meant: by its id, or by the config.
type ringOptions struct {
	ring string
	cfg  cli.AttestOptions // only its Config
}

func (o *ringOptions) addFlags(c *cobra.Command) {
	c.Flags().StringVar(&o.ring, "keyring", "", "`id` of the keyring, NAME#EPOCH (default: the one that --config seals under)")
	o.cfg.AddConfigFlag(c)
}

func (o *ringOptions) id() (string, error) {
	if o.ring != "" {
		if name, epoch, ok := strings.Cut(o.ring, "#"); !ok || name == "" || epoch == "" {
			return "", cli.Usagef("--keyring: want NAME#EPOCH")
		}
		return o.ring, nil
	}
	if o.cfg.Config == "" {
		return "", cli.Usagef("no keyring: give --keyring NAME#EPOCH or --config FILE")
	}
	_, cfg, err := o.cfg.ReadConfig()
	if err != nil {
		return "", err
	}
	return sealed.KeyringID(cfg.Keyring, cfg.SealEpoch), nil
}
