package main

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/cmd/internal/cli"
)

func attestCmd() *cobra.Command {
	var o attestOptions
	c := &cobra.Command{
		Use:   "attest",
		Short: "Let an enclave prove what it is, now",
		Long: `Challenge an enclave with a fresh nonce, verify its attestation document up to
Amazon's root, and print what it proves: image (PCR0 to 2 and 8), config (PCR16) with
its contents, instance (PCR4) and role (PCR3), the chain of certificates, the boot
with its receipt key, and the newest receipt of every lane, signed by that key. Keep
the lanes' heads outside: receipts that are withheld later are missed by them.

Everything that is wanted must be as wanted: --pcr0 or --measurements, --config, and
where they are given --role-arn and --instance-id. The exit code is 1 where anything
is not; each mismatch is named, with what to do next. What is printed then is the
enclave's own word, proved by nothing.

With --document a stored document is verified, at its own time: who made it, never
that the enclave is there now.`,
		Example: `  keyhold attest --enclave vsock:16 --measurements dist/amd64/measurements.json --config config.json

  # On this very instance, with this role
  keyhold attest --enclave vsock:16 --pcr0 3f9c...07 --config config.json \
    --instance-id i-0123456789abcdef0 --role-arn arn:aws:iam::111122223333:role/keyhold-parent

  # Keep the document, and verify it years later
  keyhold attest --save challenge.bin
  keyhold attest --document challenge.bin --pcr0 3f9c...07 --config config.json

  # A witness: note the heads of the lanes every hour
  keyhold attest --json | jq -c '{boot_id, time, lanes}' >> heads.jsonl`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return runAttest(c, &o) },
	}
	o.addFlags(c)
	return c
}

func runAttest(c *cobra.Command, o *attestOptions) error {
	w, err := o.wanted(c)
	if err != nil {
		return err
	}
	r := &attestReport{Lanes: []attestedLane{}}
	var s *shown
	if o.document != "" {
		s, err = o.stored(c, &w)
	} else {
		s, err = o.challenged(c, &w, r)
	}
	if err != nil {
		return err
	}
	if o.save != "" {
		if err := saveDocument(o.save, s.raw); err != nil {
			return err
		}
	}
	r.fill(s, &w, o)
	if o.asJSON {
		err = cli.PrintJSON(c.OutOrStdout(), r)
	} else {
		_, err = io.WriteString(c.OutOrStdout(), r.text())
	}
	return errors.Join(err, s.refused)
}

// challenged is what the enclave shows now. Its error means that it showed
// nothing at all.
func (o *attestOptions) challenged(c *cobra.Command, w *wanted, r *attestReport) (*shown, error) {
	client, err := connect(c.Context(), &o.enclave)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	p, raw, refused := challenge(c.Context(), client, w)
	if raw == nil {
		return nil, fmt.Errorf("enclave at %s: %w", o.enclave.Address, refused)
	}
	r.State, r.BootID = string(client.Hello().State), client.BootID().String()
	s := &shown{raw: raw, nonce: p.nonce, at: p.at, proof: p, refused: refused}
	s.doc, _ = attestation.Parse(raw) // nil is one of the checks
	return s, nil
}

// errPurpose says that the document is none of ours.
var errPurpose = errors.New("its user data is not that of a Keyhold document")

// stored is what a file shows.
func (o *attestOptions) stored(c *cobra.Command, w *wanted) (*shown, error) {
	if c.Flags().Changed("enclave") || o.save != "" {
		return nil, cli.Usagef("--document takes the place of --enclave and --save")
	}
	raw, err := readDocument(c.InOrStdin(), o.document)
	if err != nil {
		return nil, err
	}
	s := &shown{raw: raw, at: time.Now()}
	s.doc, _ = attestation.Parse(raw) // nil is one of the checks
	_, err = attestation.VerifyRecorded(raw, attestation.RecordedPolicy{Root: w.root, Images: w.images})
	if err == nil && kindOf(s.doc.UserData) == "" {
		err = errPurpose
	}
	if err != nil {
		s.refused = failed("stored document", err)
	}
	return s, nil
}

// maxDocumentFile is more than a document has in base64, in bytes.
const maxDocumentFile = 64 << 10

// readDocument reads a document as it is or in base64, as consoles show it.
func readDocument(stdin io.Reader, path string) ([]byte, error) {
	src := stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("read the document: %w", err)
		}
		defer f.Close() //nolint:errcheck // it was only read
		src = f
	}
	b, err := io.ReadAll(io.LimitReader(src, maxDocumentFile))
	if err != nil {
		return nil, fmt.Errorf("read the document: %w", err)
	}
	// CBOR starts with 0x84 or 0xd2, which base64 does not know.
	text := strings.Join(strings.Fields(string(b)), "")
	if raw, err := base64.StdEncoding.DecodeString(text); err == nil && len(raw) > 0 {
		return raw, nil
	}
	return b, nil
}

func saveDocument(path string, raw []byte) error {
	return cli.WriteOutput(path, io.Discard, func(w io.Writer) error {
		_, err := bytes.NewReader(raw).WriteTo(w)
		return err
	})
}
