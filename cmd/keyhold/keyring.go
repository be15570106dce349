package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/provision"
	"github.com/keyhold/keyhold/parent/signclient"
	"github.com/keyhold/keyhold/parent/store"
)

func keyringCmd() *cobra.Command {
	return noun("keyring", "Make a keyring with its keys, and show it", keyringCreateCmd(), keyringShowCmd())
}

type createOptions struct {
	at                      cli.StoreOptions
	enclave                 cli.EnclaveOptions
	want                    cli.AttestOptions
	algorithm, policy, pool string
	keys                    int
	asJSON                  bool
}

func keyringCreateCmd() *cobra.Command {
	var o createOptions
	c := &cobra.Command{
		Use:   "create",
		Short: "Make the config's keyring, and keys in it",
		Long: `Make sure that the keyring of the config exists and that a pool has a number of
keys in it. The enclave must first prove, with a fresh nonce, that it is a wanted
image with this very config. Keys are made inside it and leave it sealed; the
tables get nothing else.

The config says which pairs of algorithm and policy may be made, and how many. The
same command again makes what is missing, so one that was interrupted is run
again. A parent must be running, for it leads the enclave to KMS.`,
		Example: `  keyhold keyring create --enclave vsock:16 --pcr0 3f9c...07 --config config.json \
    --algorithm secp256k1 --policy payouts --pool default --keys 100

  # More keys later: 500 altogether
  keyhold keyring create --algorithm secp256k1 --policy payouts --pool default --keys 500

  # The keyring alone; where the environment names enclave, image and config, as
  # keyhold-local up prints it, no flag is needed for them
  keyhold keyring create --algorithm ed25519 --policy demo --keys 0`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return createKeyring(c, &o) },
	}
	o.at.AddFlags(c)
	o.enclave.AddFlags(c)
	o.want.AddFlags(c)
	f := c.Flags()
	f.StringVar(&o.algorithm, "algorithm", "", "secp256k1, ed25519, p256 or rsa2048 (required)")
	f.StringVar(&o.policy, "policy", "", "`name` of a policy of the config, which says what the keys may sign (required)")
	f.StringVar(&o.pool, "pool", "default", "`name` of the pool; all keys of a pool have one algorithm")
	f.IntVar(&o.keys, "keys", 0, "`number` of such keys that there shall be in the end (required)")
	f.BoolVar(&o.asJSON, "json", false, "print the summary as JSON")
	for _, name := range []string{"algorithm", "policy", "keys"} {
		must(c.MarkFlagRequired(name))
	}
	return c
}

// check refuses what the enclave would refuse, before anything is begun.
func (o *createOptions) check(cfg *config.Config) error {
	a, err := record.ParseAlgorithm(o.algorithm)
	if err != nil {
		return cli.Usagef("--algorithm: want one of %v", record.Algorithms())
	}
	if err := record.CheckPool(o.pool); err != nil {
		return cli.Usagef("--pool: %w", err)
	}
	limit := cfg.MaxCreate(a, o.policy)
	switch {
	case o.keys < 0:
		return cli.Usagef("--keys: want 0 or more")
	case limit == 0:
		return cli.Usagef("the config permits no %s keys with policy %s to be made, only %s", a, o.policy, permitted(cfg))
	case o.keys > limit:
		return cli.Usagef("--keys: the config permits %d %s keys with policy %s", limit, a, o.policy)
	}
	return nil
}

func permitted(cfg *config.Config) string {
	var pairs []string
	for _, p := range cfg.Create {
		pairs = append(pairs, fmt.Sprintf("%s with %s", p.Algorithm, p.Policy))
	}
	if len(pairs) == 0 {
		return "none at all"
	}
	return strings.Join(slices.Compact(pairs), ", ")
}

// createdLine is the JSON of keyring create.
type createdLine struct {
	Keyring     string `json:"keyring"` // NAME#EPOCH
	Fingerprint string `json:"fingerprint"`
	Created     bool   `json:"created"` // the keyring is new
	Pool        string `json:"pool"`
	Algorithm   string `json:"algorithm"`
	Policy      string `json:"policy"`
	Keys        int    `json:"keys"` // of this pool, algorithm and policy
	Made        int    `json:"made"` // of them, by this run
}

func createKeyring(c *cobra.Command, o *createOptions) error {
	w, err := readWanted(&o.want, c.ErrOrStderr())
	if err != nil {
		return err
	}
	if err := o.check(w.config); err != nil {
		return err
	}
	s, err := cli.OpenStore(c.Context(), o.at)
	if err != nil {
		return err
	}
	sum, err := o.provision(c, s, &w)
	if err != nil {
		return err
	}
	out := createdLine{
		Keyring: sum.KeyringID, Fingerprint: hex.EncodeToString(sum.Fingerprint[:]), Created: sum.Created,
		Pool: o.pool, Algorithm: o.algorithm, Policy: o.policy, Keys: sum.Had + sum.Made, Made: sum.Made,
	}
	if o.asJSON {
		return cli.PrintJSON(c.OutOrStdout(), out)
	}
	_, err = fmt.Fprintf(c.OutOrStdout(), "keyring %s, fingerprint %s\npool %s has %d %s keys with policy %s, %d of them new\n",
		out.Keyring, out.Fingerprint, out.Pool, out.Keys, out.Algorithm, out.Policy, out.Made)
	return err
}

// provision makes the keyring first and stores what the boot says of itself, so
// that the receipt of every key can be verified later. Then it makes the keys.
func (o *createOptions) provision(c *cobra.Command, s store.Store, w *wanted) (provision.Summary, error) {
	ctx := c.Context()
	opts := provision.Options{Algorithm: record.Algorithm(o.algorithm), Policy: o.policy, Pool: o.pool}
	first, err := o.open(ctx, w)
	if err != nil {
		return provision.Summary{}, err
	}
	ring, err := provision.Run(ctx, first, s, w.config, opts)
	first.Close()
	if err != nil {
		return ring, err
	}
	second, err := o.open(ctx, w) // whose hello has the boot statement
	if err != nil {
		return ring, err
	}
	defer second.Close()
	h := second.Hello()
	if len(h.Document) == 0 {
		return ring, fmt.Errorf("keyring %s: the enclave lost it: %w", ring.KeyringID, refusal.NoKeyring)
	}
	if err := s.PutBoot(ctx, store.Boot{ID: h.BootID, Document: h.Document, Statement: h.Statement, SeenAt: time.Now()}); err != nil {
		return ring, fmt.Errorf("store boot %s: %w", h.BootID, err)
	}
	p := cli.NewProgress(c.ErrOrStderr(), "making keys", o.keys)
	defer p.Finish()
	p.From(ring.Had)
	opts.Count, opts.Progress = o.keys, func(done, _ int) { p.Set(done) }
	sum, err := provision.Run(ctx, second, s, w.config, opts)
	sum.Created = ring.Created
	return sum, err
}

// open connects, hands over the config where nobody has, and lets the enclave
// prove what it is. A boot statement that hello brought is verified with it.
func (o *createOptions) open(ctx context.Context, w *wanted) (*signclient.Client, error) {
	c, err := connect(ctx, &o.enclave)
	if err != nil {
		return nil, err
	}
	if _, err = c.Configure(ctx, &wire.Configure{Config: w.raw}); err == nil {
		_, _, err = challenge(ctx, c, w)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("enclave at %s: %w", o.enclave.Address, err)
	}
	return c, nil
}

// headerLine is the JSON of keyring show.
type headerLine struct {
	Keyring     string `json:"keyring"`
	Epoch       uint32 `json:"epoch"`
	ID          string `json:"id"` // NAME#EPOCH
	Fingerprint string `json:"fingerprint"`
	KMSKeyARN   string `json:"kms_key_arn"`
	WrappedLen  int    `json:"wrapped_data_key_bytes"`
}

func keyringShowCmd() *cobra.Command {
	var at cli.StoreOptions
	var ring ringOptions
	var asJSON bool
	c := &cobra.Command{
		Use:   "show",
		Short: "Show a keyring's header and fingerprint",
		Long: `Show what is public of a keyring: its name and epoch, the KMS key that wraps its
data key, and its fingerprint, which every receipt and boot statement leads to.`,
		Example: `  keyhold keyring show --config config.json
  keyhold keyring show --keyring payouts#1 --json`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			id, err := ring.id()
			if err != nil {
				return err
			}
			s, err := cli.OpenStore(c.Context(), at)
			if err != nil {
				return err
			}
			h, err := readHeader(c.Context(), s, id)
			if err != nil {
				return err
			}
			f := h.Fingerprint()
			out := headerLine{h.Keyring, h.Epoch, h.ID(), hex.EncodeToString(f[:]), h.KMSKeyARN, len(h.WrappedDEK)}
			if asJSON {
				return cli.PrintJSON(c.OutOrStdout(), out)
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "keyring      %s\nepoch        %d\nfingerprint  %s\nKMS key      %s\n",
				out.Keyring, out.Epoch, out.Fingerprint, out.KMSKeyARN)
			return err
		},
	}
	at.AddFlags(c)
	ring.addFlags(c)
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func readHeader(ctx context.Context, s store.Keyrings, id string) (*sealed.Header, error) {
	raw, err := s.Keyring(ctx, id)
	if isNotFound(err) {
		return nil, cli.Errorf(refusal.NoKeyring, "there is no keyring %s: make it with keyhold keyring create", id)
	}
	if err != nil {
		return nil, fmt.Errorf("read keyring %s: %w", id, err)
	}
	h, err := sealed.DecodeHeader(raw)
	if err != nil {
		return nil, fmt.Errorf("keyring %s: %w", id, err)
	}
	return h, nil
}
