package main

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	mrand "math/rand/v2"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/cmd/internal/cli"
	"github.com/keyhold/keyhold/internal/record"
)

// generated is one line that records import reads.
type generated struct {
	ID      string `json:"id,omitempty"`
	Payload string `json:"payload"`
}

type generateOptions struct {
	records, size int
	ids           bool
	seed, out     string
}

func (o *generateOptions) check() error {
	if o.records < 1 {
		return cli.Usagef("--records: want 1 or more")
	}
	if o.size < 1 || o.size > record.MaxPayloadLen {
		return cli.Usagef("--size: want 1 to %d bytes", record.MaxPayloadLen)
	}
	return nil
}

func recordsGenerateCmd() *cobra.Command {
	var o generateOptions
	c := &cobra.Command{
		Use:   "generate",
		Short: "Write random records, to try things out",
		Long: `Write random records as JSON Lines, in the form that records import reads. With
--seed the same command writes the same file again.`,
		Example: `  # 1000 records of 100 bytes
  keyhold records generate --records 1000 -o records.jsonl

  # Straight into an import
  keyhold records generate --records 1000 | keyhold records import - --pool default

  # With ids, and the same file every time
  keyhold records generate --records 50 --ids --seed demo -o demo.jsonl`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := o.check(); err != nil {
				return err
			}
			src, err := randomSource(o.seed)
			if err != nil {
				return err
			}
			return writeLines(c, o.out, "generating", o.records, func(w io.Writer) error {
				return generate(w, src, o)
			})
		},
	}
	c.Flags().IntVar(&o.records, "records", 0, "`number` of records (required)")
	c.Flags().IntVar(&o.size, "size", 100, "`bytes` of each payload")
	c.Flags().BoolVar(&o.ids, "ids", false, "give every record an id")
	c.Flags().StringVar(&o.seed, "seed", "", "any `text`: the same seed gives the same records")
	c.Flags().StringVarP(&o.out, "output", "o", "-", "`file` to write, - for stdout")
	must(c.MarkFlagRequired("records"))
	return c
}

// randomSource is ChaCha8: of the system's randomness, or of a seed.
func randomSource(seed string) (io.Reader, error) {
	key := sha256.Sum256([]byte(seed))
	if seed == "" {
		if _, err := rand.Read(key[:]); err != nil {
			return nil, fmt.Errorf("draw a seed: %w", err)
		}
	}
	return mrand.NewChaCha8(key), nil
}

func generate(w io.Writer, src io.Reader, o generateOptions) error {
	enc := json.NewEncoder(w)
	b := make([]byte, o.size)
	var id [16]byte
	for range o.records {
		if _, err := io.ReadFull(src, b); err != nil {
			return fmt.Errorf("draw a payload: %w", err)
		}
		line := generated{Payload: base64.StdEncoding.EncodeToString(b)}
		if o.ids {
			if _, err := io.ReadFull(src, id[:]); err != nil {
				return fmt.Errorf("draw an id: %w", err)
			}
			line.ID = hex.EncodeToString(id[:])
		}
		if err := enc.Encode(line); err != nil {
			return fmt.Errorf("write the records: %w", err)
		}
	}
	return nil
}
